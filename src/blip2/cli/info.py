"""`blip2 info`: what a model is made of, and what it costs in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from blip2.cli.console import note, result_json, table
from blip2.cli.options import Json

if TYPE_CHECKING:
    from blip2.weights.inventory import Part

_GB = 1e9


def info(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="`mini`, a published configuration, or the directory of a model.")
    ],
    *,
    json: Json = False,
) -> None:
    """Show parts, size and licences of a model.

    Nothing is loaded. Memory is that of the parameters alone, in GB (10^9 bytes), by the precision of the frozen
    parts; the trained part stays in float32. Published configurations need no weights for this.

    ```
    blip2 info mini
    blip2 info pretrain_opt2.7b --json
    ```
    """
    from blip2.weights.inventory import named_config, parts_of

    parts = parts_of(named_config(model))
    if json:
        for part in parts:
            sizes = {"float32_bytes": part.bytes(4), "bfloat16_bytes": part.bytes(2)}
            result_json({**vars(part), **sizes})
        return
    rows = [(p.role, p.name, _count(p), _size(p.bytes(4)), _size(p.bytes(2)), p.licence) for p in parts]
    if all(part.parameters is not None for part in parts):
        total = sum(part.parameters or 0 for part in parts)
        sizes = [sum(part.bytes(width) or 0 for part in parts) for width in (4, 2)]
        rows.append(("total", "", f"{total:,}", _size(sizes[0]), _size(sizes[1]), ""))
    else:
        note("The parameters of some parts are known to their own library only; there is no total.")
    columns = ("part", "name", "parameters", "float32 GB", "bfloat16 GB", "licence")
    table(columns, rows, right=columns[2:5])


def _count(part: Part) -> str:
    return "?" if part.parameters is None else f"{part.parameters:,}"


def _size(count: int | None) -> str:
    return "?" if count is None else f"{count / _GB:.2f}"
