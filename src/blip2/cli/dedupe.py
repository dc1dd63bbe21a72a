"""`blip2 dedupe`: pictures that are nearly the same."""

from __future__ import annotations

from typing import Annotated

import typer

from blip2.cli.console import TASK, note, progress, result, result_json
from blip2.cli.index import Cache, OwnModel, Place, opened_index, report_failures, shown_path
from blip2.cli.options import Batch, Device, Dtype, Json, Quantize

DUPLICATE = 0.95  # as `search.index` has it, which would load torch for `--help`


def dedupe(
    place: Place,
    *,
    threshold: Annotated[
        float, typer.Option(min=0.01, max=1, help="Least similarity of two images that look alike.")
    ] = DUPLICATE,
    cache: Cache = True,
    json: Json = False,
    model: OwnModel = None,
    batch_size: Batch = 16,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantize: Quantize = None,
) -> None:
    """Find pictures that are nearly the same.

    Prints groups: each image with its similarity to the first of its group, and an empty line between groups; with
    `--json` a group a line. Nothing is ever deleted: look at them, and decide yourself.

    ```
    blip2 dedupe holiday.index
    blip2 dedupe holiday/ --threshold 0.99 --json
    ```
    """
    made = opened_index(
        place, model=model, cache=cache, batch_size=batch_size, device=device, dtype=dtype, quantize=quantize
    )
    with progress("compared", len(made)) as bars:
        groups = made.duplicates(threshold, progress=lambda done, total: bars.update(TASK, completed=done, total=total))
    for number, group in enumerate(groups):
        rows = [(shown_path(place, hit.path), hit.score) for hit in group]
        if json:
            result_json({"images": [path for path, _ in rows], "similarities": [score for _, score in rows]})
            continue
        if number:
            result("")
        for path, score in rows:
            result(f"{path}\t{score:.3f}")
    note(f"{len(groups)} groups among {len(made)} images")
    report_failures(made)
