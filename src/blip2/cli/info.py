"""`blip2 info`: what a model is made of, what it costs in memory, what fits here, and what to know before using it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from blip2.cli.console import note, result, result_json, table
from blip2.cli.options import Json

if TYPE_CHECKING:
    from blip2.weights.inventory import Memory, Part, Place


def info(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="`mini`, a published model or configuration, or the directory of a model."
        ),
    ],
    *,
    json: Json = False,
) -> None:
    """Show parts, size, memory, licences and known risks of a model.

    Nothing is loaded, and published models need no weights for this. Memory is that of the parameters in GiB (2^30
    bytes), by the precision of the frozen parts: the bridge stays in float32, int8, fp8 and int4 are for the blocks'
    linear layers and leave the rest in 16 bits. With Adam each weight that is trained takes four numbers. A model
    fits where a GiB is left for activations and caches.

    ```
    blip2 info mini
    blip2 info Salesforce/blip2-opt-2.7b
    blip2 info pretrain_flant5xl --json
    ```
    """
    from blip2 import kernels
    from blip2.weights.assemble import named_config
    from blip2.weights.inventory import largest_of, memory_of, parts_of, places

    config = named_config(model)
    parts = parts_of(config)
    memory, here = memory_of(config, parts), places()
    if json:
        chosen = {"kernels": kernels.chosen(), "kernels_on_cuda": kernels.chosen_on_cuda()}
        result_json({**_values(parts, memory, here), **chosen})
        return
    rows = [(part.role, part.name, _count(part.parameters), "yes" if part.trained else "frozen") for part in parts]
    if memory:
        rows.append(("total", "", _count(sum(part.parameters or 0 for part in parts)), ""))
    table(("part", "name", "parameters", "trained"), rows, right=("parameters",))
    if largest := largest_of(parts):
        size = 4 * largest.parameters / 2**20
        result(f"largest layer: {largest.name}, {largest.parameters:,} parameters, {size:,.2f} MiB in float32")
    if memory:
        result("")
        _show_memory(memory, here)
    else:
        note("The parameters of some parts are known to their own library only; there is no total.")
    result("")
    table(("weights", "products with them on this CPU"), list(kernels.chosen().items()))
    if on_cuda := kernels.chosen_on_cuda():
        table(("weights", "products with them on CUDA"), list(on_cuda.items()))
    for part in parts:
        result(f"\n{part.name}\n  licence: {part.notice.licence}\n  risks: {part.notice.risks}")


def _show_memory(memory: list[Memory], here: list[Place]) -> None:
    columns = ["GiB", "inference", "training the bridge", "training all", *(f"fits {place.name}" for place in here)]
    card = any(line.card is not None for line in memory)
    if card:
        columns.insert(2, "published card")
    rows: list[list[str]] = []
    for line in memory:
        row = [line.precision, _gib(line.inference), _gib(line.bridge), _gib(line.everything)]
        if card:
            row.insert(2, "" if line.card is None else f"{line.card:.2f}")
        rows.append([*row, *(place.fits(line) for place in here)])
    table(columns, rows, right=columns[1 : 5 if card else 4])
    if card:
        result("(the published card counts OPT's tied output matrix twice, and every weight at the named precision)")
    for place in here:
        result(f"{place.name}: {_gib(place.total)} GiB, {_gib(place.free)} free")


def _values(parts: list[Part], memory: list[Memory], here: list[Place]) -> dict[str, object]:
    listed: list[dict[str, object]] = []
    for part in parts:
        known = {key: getattr(part, key) for key in ("role", "name", "parameters", "trained")}
        listed.append({**known, **vars(part.notice), "largest": vars(part.largest) if part.largest else None})
    lines = [{**vars(line), "fits": {place.name: place.fits(line) for place in here}} for line in memory]
    return {"parts": listed, "memory": lines, "machine": [vars(place) for place in here]}


def _count(parameters: int | None) -> str:
    return "?" if parameters is None else f"{parameters:,}"


def _gib(size: int | None) -> str:
    return "" if size is None else f"{size / 2**30:.2f}"
