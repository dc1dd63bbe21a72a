"""`blip2 classify`: images sorted under labels of your own."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from blip2.cli.console import note, of_readable, open_model, result, result_json
from blip2.cli.options import AutoBatch, Calibrated, Device, Dtype, FitBy, Json, Model, Paths, Quantize
from blip2.errors import PromptError

if TYPE_CHECKING:
    from blip2 import bulk
    from blip2.batching import BatchSize
    from blip2.zero_shot import Classifier


def classify(
    paths: Paths,
    *,
    label: Annotated[
        list[str] | None, typer.Option("--label", "-l", help="A label; give it often.", show_default=False)
    ] = None,
    labels: Annotated[Path | None, typer.Option(help="A text file of labels, one a line.", show_default=False)] = None,
    template: Annotated[
        list[str] | None,
        typer.Option(
            "--template",
            "-t",
            help="A sentence with {} where the label stands; may be given often. [default: our own for this model]",
            show_default=False,
        ),
    ] = None,
    by: Annotated[FitBy, typer.Option(help="Compare vectors (itc), or ask the matching head, slowly.")] = FitBy.itc,
    top: Annotated[int, typer.Option("--top", "-k", min=1, help="How many labels to show.")] = 5,
    json: Json = False,
    model: Model = "mini",
    calibration: Calibrated = None,
    batch_size: AutoBatch = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantize: Quantize = None,
) -> None:
    """Tell which of your labels images show, without training.

    Files, folders, patterns. Each label is read once, in several sentences. One image prints its labels and their
    scores, the best first, several print `path<TAB>label<TAB>score`. The score is the cosine of their vectors, or with
    `--by itm` the probability that they match. Images that cannot be read are named on stderr, and the exit code is 1.

    ```
    blip2 classify photo.jpg --label dog --label cat --label boat
    blip2 classify holiday/ --labels labels.txt --top 1
    blip2 classify photo.jpg --labels birds.txt --template "a photo of a {}, a bird" --by itm
    ```
    """
    from blip2 import image, zero_shot
    from blip2.batching import BatchSize

    names = [*(label or []), *(zero_shot.read_labels(labels) if labels else [])]
    if not names:
        raise PromptError("no labels to choose from: name each with --label, or a file of them with --labels")
    zero_shot.checked_labels(names)  # what is wrong is said before a model is loaded
    zero_shot.checked_templates(template or zero_shot.BARE)
    files = image.find_images(paths)
    opened = open_model(model, device, dtype, quantize, calibration or True)
    long = [name for name in names if opened.unread(name)]
    if long:
        note(f"{len(long)} labels are too long to be read to their end: {long[0][:60]}...")
    classifier = zero_shot.Classifier.of(opened, names, template or None, by.value)
    size = BatchSize(batch_size or "auto", opened.device)
    _show(classifier, files, size, top, json=json)


def _show(classifier: Classifier, files: Sequence[Path], size: BatchSize, top: int, *, json: bool) -> None:
    """Each image's best labels, as they come."""
    failed: list[bulk.Failure] = []
    with closing(of_readable(classifier.classify, files, classifier.model.transform, size, failed)) as stream:
        for path, row in stream:
            best = row.top(top)
            if json:
                result_json({"image": str(path), "labels": [{"label": n, "score": score} for n, score in best]})
            else:
                before = "" if len(files) == 1 else f"{path}\t"
                for name, score in best:
                    result(f"{before}{name}\t{score:.3f}")
    if failed:
        raise typer.Exit(1)
