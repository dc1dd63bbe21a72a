"""`blip2 match`: how well images and texts fit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from blip2.cli.console import listing, open_model, result_json
from blip2.cli.options import Calibrated, Device, Dtype, Json, Model, Quantize


def match(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE", help="Image files.", show_default=False)],
    *,
    text: Annotated[list[str], typer.Option("--text", "-t", help="A text; may be given often.", show_default=False)],
    json: Json = False,
    model: Model = "mini",
    calibration: Calibrated = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantize: Quantize = None,
) -> None:
    """Tell how well images and texts fit.

    Every image is held against every text. Prints image, text, the probability that they match (ITM) and the cosine
    of their vectors (ITC): a table on a terminal, tab-separated lines in a pipe. What the probability is worth, and how
    `blip2 calibrate` mends it: docs/matching.md.

    ```
    blip2 match photo.jpg --text "a dog on a beach" --text "a red car"
    blip2 match holiday/*.jpg -t "a sunset" --json
    ```
    """
    found = open_model(model, device, dtype, quantize, calibration or True).match(images, text)
    rows = [
        (str(image), words, itm, itc)
        for image, probabilities, cosines in zip(images, found.itm.tolist(), found.itc.tolist(), strict=True)
        for words, itm, itc in zip(text, probabilities, cosines, strict=True)
    ]
    if json:
        for image, words, itm, itc in rows:
            result_json({"image": image, "text": words, "itm": itm, "itc": itc})
        return
    columns = ("image", "text", "match", "cosine")
    listing(columns, [(image, words, f"{itm:.3f}", f"{itc:.3f}") for image, words, itm, itc in rows], right=columns[2:])
