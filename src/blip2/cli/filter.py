"""`blip2 filter`: of texts that pictures came with, those that match."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from blip2.cli.console import note, open_model
from blip2.cli.evaluate import Data, Images, Layout, Limit, Split, read_samples
from blip2.cli.measured import Measurement, bars
from blip2.cli.options import Batch, By, Calibrated, Device, Dtype, FitBy, Model, Quantize
from blip2.errors import ConfigError


def filter(
    data: Data,
    *,
    threshold: Annotated[
        float, typer.Option(help="What a text reaches at least: a probability, or a cosine by itc.", show_default=False)
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="A folder for kept and dropped.", show_default=False)],
    by: By = FitBy.itm,
    format: Layout = "auto",
    split: Split = None,
    images: Images = None,
    limit: Limit = None,
    model: Model = "mini",
    calibration: Calibrated = None,
    batch_size: Batch = 16,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantize: Quantize = None,
) -> None:
    """Keep the texts that match their pictures: the web's, a table's, a model's.

    Writes `kept.jsonl`, a picture a line with the texts that reach the threshold, which `blip2 train` reads, and
    `dropped.jsonl`, a text a line with the reason. A run that was stopped goes on where it was, and another threshold
    takes no second look at the pictures. Pictures that cannot be read are dropped and named, and the exit code is 1.

    ```
    blip2 filter photos.csv --threshold 0.5 --out filtered
    blip2 filter "web/{000000..000099}.tar" --by itc --threshold 0.3 --out filtered
    ```
    """
    low, high = (0, 1) if by == FitBy.itm else (-1, 1)
    if not low <= threshold <= high:
        raise ConfigError(f"--threshold: by {by.value} it is a number from {low} to {high}, not {threshold:g}")
    from blip2 import filtering

    run = Measurement.of("filter", data, model, quantize, out, None)
    samples = read_samples(data, format, split, images)[:limit]
    filtering.check_texts(samples)
    opened = open_model(model, device, dtype, quantize, calibration or True)
    corrected = opened.calibration and dataclasses.asdict(opened.calibration)
    words = (text for sample in samples for text in (sample.id, *sample.captions))
    run = run.with_model(opened, words, calibration=corrected, batch_size=batch_size)
    with run.kept() as kept, bars() as progress:
        rows = filtering.judge(opened, samples, kept=kept, batch_size=batch_size, progress=progress)
        found = filtering.write(out, samples, rows, threshold, by.value)
    for error in found.unreadable:
        note(f"error: {error}")
    note(
        f"{found.kept} texts kept, {found.dropped} dropped, {len(found.unreadable)} pictures could not be read: "
        f"{out / filtering.KEPT}, {out / filtering.DROPPED}"
    )
    if found.unreadable:
        raise typer.Exit(1)
