"""`blip2 verify`: a checkpoint against transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from blip2.cli.console import note, result_json, table
from blip2.cli.options import Json


def verify(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A directory of transformers, or OWNER/NAME on the hub.")
    ],
    images: Annotated[
        list[Path] | None, typer.Argument(metavar="[IMAGE]...", help="Pictures to compare on.", show_default=False)
    ] = None,
    *,
    json: Json = False,
) -> None:
    """Compare a model with what transformers computes from the same files.

    Both run in float32 on the CPU, one after the other, from pixels to tokens: patches, queries, visual prefix, first
    logits, greedy and five-beam captions. Needs `pip install transformers`, and memory for one of the two at a time.
    The exit code is 1 where something differs.

    ```
    blip2 verify Salesforce/blip2-opt-2.7b photo.jpg
    ```
    """
    from blip2.weights.verify import verify as run

    lines = run(model, images or ())
    if json:
        for line in lines:
            result_json(vars(line))
    else:
        rows = [(line.what, _shown(line.difference), "yes" if line.equal else "NO") for line in lines]
        table(("what", "largest difference, relative", "equal"), rows, right=("largest difference, relative",))
    if not all(line.equal for line in lines):
        note("They differ.")
        raise typer.Exit(1)


def _shown(difference: float | None) -> str:
    return "" if difference is None else f"{difference:.1e}"
