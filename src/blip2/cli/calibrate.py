"""`blip2 calibrate`: matching probabilities that mean what they say."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from blip2.cli.console import note, open_model
from blip2.cli.evaluate import Data, Images, Layout, Limit, Split, read_samples
from blip2.cli.measured import bars, show
from blip2.cli.options import Batch, Device, Dtype, Model, Quantize, check_out
from blip2.errors import ConfigError, DataError
from blip2.files import replacing

if TYPE_CHECKING:
    from blip2.calibration import Calibration
    from blip2.data.sources import Sample
    from blip2.evaluate.reliability import Pairs

Samples = tuple["list[Sample]", "list[Sample]"]
Test = Annotated[
    str | None,
    typer.Option(help="What it is measured on; half of DATA without.", show_default=False, rich_help_panel="Data"),
]
TestSplit = Annotated[
    str | None, typer.Option(help="The same, where DATA has splits.", show_default=False, rich_help_panel="Data")
]
BaseRate = Annotated[float, typer.Option(help="Share of the pairs that match, where the model is used.")]
Out = Annotated[
    Path | None, typer.Option("--out", "-o", help="A file, in place of the model's own folder.", show_default=False)
]
Plot = Annotated[Path | None, typer.Option(help="An .svg of what was said and what is so.", show_default=False)]


def calibrate(
    data: Data,
    *,
    test: Test = None,
    test_split: TestSplit = None,
    base_rate: BaseRate = 0.5,
    out: Out = None,
    plot: Plot = None,
    format: Layout = "auto",
    split: Split = None,
    images: Images = None,
    limit: Limit = None,
    model: Model = "mini",
    batch_size: Batch = 32,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantize: Quantize = None,
) -> None:
    """Make the probabilities of `match` mean what they say.

    Takes pictures with texts that the model was not trained on. Each picture is judged beside its own texts and as
    many of other pictures; a temperature and, where it helps, a bias are fitted; and what they change is measured on
    pictures that they were not fitted on: negative log-likelihood and calibration error, with 95% intervals.

    The result goes into the model's folder as `calibration.json`, beside a LAVIS file as `NAME.calibration.json`, where
    every command finds it; for a model on the hub name `--out`, and give it to `match --calibration`.

    ```
    blip2 calibrate photos.csv --model runs/stage2/model
    blip2 calibrate "flickr8k/val-*.tar" --test "flickr8k/test-*.tar" --plot reliability.svg
    ```
    """
    place = _place(model, out)
    for file in (place, plot):
        if file is not None:
            check_out(file)
    fitted, held = _samples(data, test, format, split, test_split, images, limit)
    from blip2 import calibration
    from blip2.evaluate.reliability import judged
    from blip2.weights import calibrated

    calibration.check_base_rate(base_rate)
    opened = open_model(model, device, dtype, quantize, False)
    with bars() as progress:
        pairs = [judged(opened, some, batch_size=batch_size, progress=progress) for some in (fitted, held)]
    found = calibration.fit(pairs[0].logits, pairs[0].matches, base_rate)
    _measure(pairs[1], found, plot)
    calibrated.write(place, found, opened.identity)
    note(
        f"temperature {found.temperature:.4g}, bias {found.bias:.4g} where {base_rate:g} of the pairs match, from "
        f"{len(fitted)} pictures; measured on {len(pairs[1].matches)} pairs of {len(held)} pictures; written to {place}"
    )


def _measure(pairs: Pairs, found: Calibration, plot: Path | None) -> None:
    """What a calibration changes on pairs that it was not fitted on, as a table and a picture."""
    from blip2 import drawing, matching
    from blip2.evaluate.reliability import reliability

    sides = {
        name: reliability(matching.probability(pairs.logits, how), pairs, found.base_rate)
        for name, how in (("as it is", None), ("calibrated", found))
    }
    show(
        {f"negative log-likelihood, {name}": each.nll for name, each in sides.items()}
        | {f"calibration error, {name}": each.ece for name, each in sides.items()}
    )
    if plot is None:
        return
    points = {
        name: [(each.probability, each.share.value, each.share.low, each.share.high) for each in side.bins]
        for name, side in sides.items()
    }
    with replacing(plot) as partial:
        partial.write_text(drawing.reliability(points), encoding="utf-8")


def _place(model: str, out: Path | None) -> Path:
    """Where the calibration goes, known before anything is computed."""
    from blip2.weights.assemble import model_directory
    from blip2.weights.calibrated import place

    if out is not None:
        return out
    found = Path(model) if Path(model).is_file() else model_directory(model)
    if not found.exists():
        raise ConfigError(f"{model}: is no folder to write into; name a file with --out")
    return place(found)


def _samples(
    data: str,
    test: str | None,
    format: str,
    split: str | None,
    test_split: str | None,
    images: Path | None,
    limit: int | None,
) -> Samples:
    """Pictures to fit on, and others to measure on."""
    found = read_samples(data, format, split, images)
    if test is None and test_split is None:
        found = found[:limit]
        if len(found) < 4:
            raise DataError(f"{data}: half of {len(found)} pictures is too few; give more, or others with --test")
        return found[::2], found[1::2]
    held = read_samples(test or data, format, test_split, images)
    if {str(sample.image) for sample in found} & {str(sample.image) for sample in held}:
        raise DataError(f"{test or data}: has pictures of the fit: what is measured on them is worth nothing")
    return found[:limit], held[:limit]
