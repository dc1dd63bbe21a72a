"""`blip2 match`: how well images and texts fit."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from blip2.cli.console import listing, note, of_readable, open_model, result_json
from blip2.cli.options import AutoBatch, Calibrated, Device, Dtype, Json, Model, Paths, Quantize, check_texts

if TYPE_CHECKING:
    from blip2 import bulk
    from blip2.batching import BatchSize
    from blip2.blip2 import Blip2

COLUMNS = ("image", "text", "match", "cosine")


def match(
    paths: Paths,
    *,
    text: Annotated[list[str], typer.Option("--text", "-t", help="A text; may be given often.", show_default=False)],
    json: Json = False,
    model: Model = "mini",
    calibration: Calibrated = None,
    batch_size: AutoBatch = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantize: Quantize = None,
) -> None:
    """Tell how well images and texts fit.

    Every image is held against every text. Prints image, text, the probability that they match (ITM) and the cosine
    of their vectors (ITC): a table on a terminal, tab-separated lines in a pipe. Images that cannot be read are named
    on stderr, and the exit code is 1. What the probability is worth, and how `blip2 calibrate` mends it:
    docs/matching.md.

    ```
    blip2 match photo.jpg --text "a dog on a beach" --text "a red car"
    blip2 match holiday/ -t "a sunset" --json
    ```
    """
    from blip2 import image
    from blip2.batching import BatchSize

    check_texts("a text to match", *text)
    files = image.find_images(paths)
    opened = open_model(model, device, dtype, quantize, calibration or True)
    for words in text:
        if cut := opened.unread(words):
            note(f"{words[:40]!r} is too long for the model: its last {cut} tokens are not read")
    _show(opened, files, text, BatchSize(batch_size or "auto", opened.device), json=json)


def _show(model: Blip2, files: Sequence[Path], texts: Sequence[str], size: BatchSize, *, json: bool) -> None:
    """Each image beside each text, as they come; a table is drawn when all are there."""

    def fits(squares: Any) -> list[tuple[list[float], list[float]]]:
        found = model.match(squares, texts)
        return list(zip(found.itm.tolist(), found.itc.tolist(), strict=True))

    failed: list[bulk.Failure] = []
    rows: list[tuple[str, ...]] = []
    with closing(of_readable(fits, files, model.transform, size, failed)) as stream:
        for path, row in stream:
            for words, itm, itc in zip(texts, *row, strict=True):
                if json:
                    result_json({"image": str(path), "text": words, "itm": itm, "itc": itc})
                else:
                    rows.append((str(path), words, f"{itm:.3f}", f"{itc:.3f}"))
            if not sys.stdout.isatty():
                listing(COLUMNS, rows)
                rows = []
    if rows:
        listing(COLUMNS, rows, right=COLUMNS[2:])
    if failed:
        raise typer.Exit(1)
