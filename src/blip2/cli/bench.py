"""`blip2 bench`: what a model takes on this machine, beside what the machine allows."""

from __future__ import annotations

import json as jsons
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from blip2.cli.console import TASK, note, open_model, progress, result, table
from blip2.cli.options import Device, Dtype, Quantize, check_out

if TYPE_CHECKING:
    from blip2.bench.machine import Machine, Rates
    from blip2.bench.run import Row

ROWS = 10  # about: of the progress bar


def bench(
    model: Annotated[
        str, typer.Argument(metavar="[MODEL]", help="`mini`, a directory, or OWNER/NAME[@REVISION] on the hub.")
    ] = "mini",
    *,
    images: Annotated[
        Path | None, typer.Option(help="A folder of pictures; noise is drawn without.", show_default=False)
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write all numbers to this file.", show_default=False)] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw seconds and their limits into this .svg.", show_default=False)
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantize: Quantize = None,
) -> None:
    """Measure a model: captions, questions, matching, a folder, loading, memory.

    First the machine is measured: bytes it reads and operations it does in a second. Each row then shows the median of
    up to three runs after one that warmed up, what comes out of it in a second, the weights read and the operations
    done in a second (and how much of the machine's own rate that is), and the least time those rates allow for the
    work: a row at 1.0 times its limit could not be faster on this machine. Operations count the matrix products.
    A caption of a folder ends where the model ends it; the other texts have a fixed length. With `mini` it takes about
    a minute.

    ```
    blip2 bench
    blip2 bench Salesforce/blip2-opt-2.7b --quantize int8 --json speed.json
    blip2 bench mini --images holiday/ --plot speed.svg
    ```
    """
    for file in (json, plot):
        if file is not None:
            check_out(file)
    from blip2 import image
    from blip2.bench import machine, run

    files = image.find_images([images]) if images else []
    start = time.perf_counter()
    opened = open_model(model, device, dtype, quantize)
    loaded = time.perf_counter() - start
    precision = run.precision(opened, quantize)
    own, rates = machine.describe(opened.device), machine.measure(opened.device)
    rows: list[Row] = []
    with progress("measuring", ROWS) as bars:
        for row in run.Bench(opened, rates, precision, files).rows():
            rows.append(row)
            bars.advance(TASK)
    peak = run.peak_memory(opened.device)
    _show(own, rates, precision, rows)
    result(f"\nloaded in {loaded:.2f} s" + (f"; at most {peak / 1e9:.2f} GB of memory" if peak else ""))
    if json is not None:
        values = {"model": model, "precision": precision, "load": loaded, "peak": peak}
        _write_json(json, values | {"machine": asdict(own), "rates": asdict(rates), "rows": [asdict(r) for r in rows]})
    if plot is not None:
        _write_plot(plot, rows)


def _show(own: Machine, rates: Rates, precision: str, rows: list[Row]) -> None:
    place = own.device or f"{own.processor}, {own.threads} of {own.cores} cores"
    peak = rates.peak(precision)
    result(f"{place}; {', '.join(f'{name} {version}' for name, version in own.versions.items())}")
    result(f"reads {rates.bandwidth / 1e9:.1f} GB/s, multiplies {precision} at {peak / 1e9:,.0f} Gop/s\n")
    cells = [
        (
            row.what,
            f"{row.median:.3f}",
            f"{row.pace:.2f} {row.unit}",
            _share(row.bandwidth, rates.bandwidth, 1),
            _share(row.operations, peak, 0),
            f"{row.limit:.3f}" if row.limit else "",
            f"{row.median / row.limit:.1f}" if row.limit else "",
        )
        for row in rows
    ]
    numbers = ("seconds", "a second", "GB/s", "Gop/s", "limit, s", "times it")
    table(("work", *numbers), cells, right=numbers)


def _share(value: float | None, whole: float, digits: int) -> str:
    return "" if value is None else f"{value / 1e9:,.{digits}f} ({100 * value / whole:.0f} %)"


def _write_json(file: Path, values: dict[str, Any]) -> None:
    from blip2.files import replacing

    with replacing(file) as partial:
        partial.write_text(jsons.dumps(values, indent=2) + "\n", encoding="utf-8")
    note(f"numbers in {file}")


def _write_plot(file: Path, rows: list[Row]) -> None:
    from blip2 import drawing
    from blip2.files import replacing

    shown = {row.what: {"measured": row.median, **({"limit": row.limit} if row.limit else {})} for row in rows}
    with replacing(file) as partial:
        partial.write_text(drawing.bars(shown), encoding="utf-8")
    note(f"drawn in {file}")
