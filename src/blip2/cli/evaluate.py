"""`blip2 evaluate`: captions, answers and retrieval, on the official files or your own data."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from blip2.cli.console import note, open_model
from blip2.cli.measured import Measurement, bars, java_splits, tell_failed, tell_unread
from blip2.cli.options import Batch, BestOf, By, Chosen, Device, Dtype, FitBy, Model, Quantize, chosen_of, writes
from blip2.errors import ConfigError, DataError

if TYPE_CHECKING:
    from blip2.blip2 import Blip2
    from blip2.data.sources import Format, Sample
    from blip2.evaluate.estimate import Estimate
    from blip2.evaluate.questions import Question

_HELP = """Measure a model, as the field does.

On the official files of COCO, NoCaps, Flickr30k, Flickr8k, VQAv2, OK-VQA and GQA, or on your own data. Each measure
comes with its 95% bootstrap interval over pictures. With `--out FOLDER` every text is kept as it comes, so that a run
that was stopped goes on where it was; `predictions.json` in it is what the official evaluations read.

```
blip2 evaluate caption dataset_coco.json --images coco/ --split test --protocol paper --out runs/coco
blip2 evaluate vqa photos.csv --questions questions.jsonl
```
"""
app = typer.Typer(no_args_is_help=True, help=_HELP)


class Named(StrEnum):
    """The protocols of `blip2.evaluate.protocols`, which cannot be asked without importing torch."""

    own = "own"
    paper = "paper"
    lavis = "lavis"


Data = Annotated[
    str,
    typer.Argument(
        help="A .json of COCO, NoCaps or Karpathy; shards, a table, a folder, a Flickr8k or COCO distribution.",
        show_default=False,
    ),
]
Layout = Annotated[
    str,
    typer.Option(
        "--format", help="auto, webdataset, flickr8k, coco, karpathy, table or folder.", rich_help_panel="Data"
    ),
]
Split = Annotated[
    str | None,
    typer.Option(
        help="Of Karpathy's files and Flickr8k (test) or COCO (val2017).", show_default=False, rich_help_panel="Data"
    ),
]
Images = Annotated[
    Path | None,
    typer.Option(help="Folder of the pictures that a .json names.", show_default=False, rich_help_panel="Data"),
]
Limit = Annotated[
    int | None,
    typer.Option(min=1, help="Only the first N: a quick look.", show_default=False, rich_help_panel="Data"),
]
Protocol = Annotated[
    Named, typer.Option(help="Prompts and settings: the model's own, the paper's, or those of its public code.")
]
Out = Annotated[
    Path | None,
    typer.Option("--out", "-o", help="A folder for texts as they come, predictions and numbers.", show_default=False),
]
Report = Annotated[
    Path | None, typer.Option(help="A page with the numbers and the worst and best cases.", show_default=False)
]

Java = Annotated[
    bool | None,
    typer.Option(
        "--java/--no-java",
        help="Java's tokenizer and METEOR; without: our own tokenizer. Unless told, where a Java works.",
        show_default=False,
    ),
]


@app.command()
@writes
def caption(
    data: Data,
    *,
    protocol: Protocol = Named.own,
    java: Java = None,
    spice: Annotated[bool, typer.Option("--spice", help="SPICE too: it needs Java 8 or 11, and its data.")] = False,
    best_of: BestOf = None,
    by: By = FitBy.itm,
    out: Out = None,
    report: Report = None,
    format: Layout = "auto",
    split: Split = None,
    images: Images = None,
    limit: Limit = None,
    model: Model = "mini",
    batch_size: Batch = 16,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantize: Quantize = None,
    options: Chosen,
) -> None:
    """Caption each picture and compare with its own captions: BLEU, METEOR, ROUGE-L, CIDEr.

    NoCaps' domains are reported apart too. A test set whose captions are kept back gives predictions without numbers.

    ```
    blip2 evaluate caption dataset_coco.json --images coco/ --split test --protocol paper --out runs/coco
    blip2 evaluate caption nocaps_val_4500_captions.json --images nocaps/ --protocol paper --spice
    blip2 evaluate caption photos.csv --limit 500 --report captions.html
    ```
    """
    run = Measurement.of("caption", data, model, quantize, out, report)
    everything = read_samples(data, format, split, images, unlabelled=out is not None)
    samples = everything[:limit]
    scored = _scored(samples)
    from blip2.evaluate import captioning, protocols, writing
    from blip2.evaluate import report as pages

    by_java = scored and java_splits(java, spice)
    failed: dict[str, str] = {}
    opened = open_model(model, device, dtype, quantize)
    how = protocols.captioning(protocol.value, opened).with_options({**options, **chosen_of(best_of, by)})
    made = how.settings(opened.config.prompts.caption)
    run = run.with_model(opened, (sample.id for sample in everything), **made)
    with run.kept() as kept, bars() as progress:
        written = writing.write_captions(opened, samples, how, kept=kept, batch_size=batch_size, progress=progress)
        texts = [found.text for found in written]
        numbers = writing.score_captions(samples, texts, java=by_java, spice=spice, failed=failed) if scored else {}
        by_java = by_java and captioning.TOKENIZER not in failed
        rows = [{"image_id": _number(sample.id), "caption": text} for sample, text in zip(samples, texts, strict=True)]
        run.finish(numbers, rows, images=len(samples), tokenizer="Java's" if by_java else "our own", failed=failed)
    if not scored:
        note("no numbers: the captions of these pictures are kept back; hand in predictions.json")
    elif report is not None:
        title = f"Captions of {model}: {Path(data).name}"
        pages.write(report, title, numbers, run.settings(), pages.of_captions(samples, written, java=by_java))
    tell_failed(failed, written, java)


@app.command()
@writes
def vqa(
    data: Annotated[
        str,
        typer.Argument(
            help="The questions .json of VQAv2 or OK-VQA; or pictures of your own with questions.", show_default=False
        ),
    ],
    *,
    annotations: Annotated[
        Path | None,
        typer.Option(help="The .json of their answers.", show_default=False, rich_help_panel="Data"),
    ] = None,
    questions: Annotated[
        Path | None,
        typer.Option(
            help="A .jsonl of questions that join your own pictures by id.", show_default=False, rich_help_panel="Data"
        ),
    ] = None,
    protocol: Protocol = Named.own,
    out: Out = None,
    report: Report = None,
    format: Layout = "auto",
    split: Split = None,
    images: Images = None,
    limit: Limit = None,
    model: Model = "mini",
    batch_size: Batch = 16,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantize: Quantize = None,
    options: Chosen,
) -> None:
    """Answer questions about pictures: VQA accuracy, beside what the best single answer gets.

    A test set whose answers are kept back gives predictions without numbers.

    ```
    blip2 evaluate vqa questions.json --annotations annotations.json --images coco/ --protocol paper --out runs/vqa
    blip2 evaluate vqa photos.jsonl --questions questions.jsonl
    ```
    """
    run = Measurement.of("vqa", data, model, quantize, out, report)
    from blip2.evaluate import questions as official
    from blip2.evaluate import writing

    if Path(data).suffix.lower() == ".json":
        if questions is not None or split is not None or format != "auto":
            raise ConfigError(
                f"{data}: holds the questions: --questions, --split and --format are for data of your own"
            )
        asked = official.vqa(Path(data), annotations, _folder(data, images))
    elif annotations is not None:
        raise ConfigError(f"{data}: --annotations goes with the questions .json of VQAv2 or OK-VQA")
    else:
        samples = read_samples(data, format, split, images, questions=questions)
        asked = official.of_samples(samples, writing.vqa_kind)
    _check_answers(run, asked[:limit])
    opened = open_model(model, device, dtype, quantize)
    _answers(run, asked, limit, opened, protocol, batch_size, options)


@app.command()
@writes
def gqa(
    data: Annotated[str, typer.Argument(help="GQA's questions .json.", show_default=False)],
    *,
    protocol: Protocol = Named.own,
    out: Out = None,
    report: Report = None,
    images: Images = None,
    limit: Limit = None,
    model: Model = "mini",
    batch_size: Batch = 16,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantize: Quantize = None,
    options: Chosen,
) -> None:
    """Answer GQA's questions: accuracy by type, consistency and distribution.

    Consistency needs the file of all questions; the balanced one leaves out what others entail.

    ```
    blip2 evaluate gqa testdev_balanced_questions.json --images gqa/images --protocol paper --out runs/gqa
    ```
    """
    run = Measurement.of("gqa", data, model, quantize, out, report)
    from blip2.evaluate import questions as official

    asked = official.gqa(Path(data), _folder(data, images))
    _check_answers(run, asked[:limit])
    opened = open_model(model, device, dtype, quantize)
    _answers(run, asked, limit, opened, protocol, batch_size, options)


@app.command()
def retrieval(
    data: Data,
    rerank: Annotated[
        int | None, typer.Option(min=0, help="Re-rank so many of each query's best by matching.", show_default=False)
    ] = None,
    itm_weight: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Of a match's logit beside the cosine; 1 as published; 0.05 suited mini's fifth bridge.",
            show_default=False,
        ),
    ] = None,
    protocol: Protocol = Named.own,
    out: Out = None,
    report: Report = None,
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
    """Find pictures by their captions and captions by their pictures: R@1, R@5 and R@10.

    The paper's protocol takes each caption as a query of its own, ranks by cosine (ITC), and re-ranks the best 128 of
    each query by cosine plus matching logit (ITM).

    ```
    blip2 evaluate retrieval flickr8k/test-000000.tar --rerank 32
    blip2 evaluate retrieval dataset_flickr30k.json --images flickr30k/ --split test --protocol paper --out runs/f30k
    ```
    """
    run = Measurement.of("retrieval", data, model, quantize, out, report)
    samples = read_samples(data, format, split, images)[:limit]
    from blip2.evaluate import protocols
    from blip2.evaluate import report as pages
    from blip2.evaluate.run import rank_pictures

    how = protocols.ranking(protocol.value, rerank, itm_weight)
    opened = open_model(model, device, dtype, quantize)
    words = (text for sample in samples for text in (sample.id, *sample.captions))
    settings = {"protocol": how.name, "top": how.top, "weight": how.weight, "texts": how.texts}
    run = run.with_model(opened, words, batch_size=batch_size, **settings)
    with run.kept() as kept, bars() as progress:
        found = rank_pictures(opened, samples, how, kept=kept, batch_size=batch_size, progress=progress)
        numbers = {
            f"{way} R@{depth} ({name.upper()})": estimate
            for name, recall in found.recalls.items()
            for way, depths in (("text to image", recall.text_to_image), ("image to text", recall.image_to_text))
            for depth, estimate in depths.items()
        }
        run.finish(numbers, found.best(samples) if out is not None else None, images=len(samples))
    if report is not None:
        title = f"Retrieval by {model}: {Path(data).name}"
        pages.write(report, title, numbers, run.settings(), pages.of_ranking(samples, found))


def _check_answers(run: Measurement, asked: Sequence[Question]) -> None:
    """Before the slow loading of the model."""
    if not asked:
        raise DataError(f"{run.about['data']}: has no questions; see the formats in docs/evaluation.md")
    if run.out is None and not all(question.answers for question in asked):
        raise ConfigError("the answers of these questions are kept back: give --out FOLDER for the predictions")


def _answers(
    run: Measurement,
    everything: Sequence[Question],
    limit: int | None,
    opened: Blip2,
    protocol: Named,
    batch_size: int,
    options: Chosen,
) -> None:
    """What `vqa` and `gqa` do alike."""
    from blip2.evaluate import protocols, writing
    from blip2.evaluate import report as pages

    asked = everything[:limit]
    scored = all(question.answers for question in asked)
    how = protocols.answering(protocol.value, opened).with_options(options)
    made = how.settings(opened.config.prompts.question)
    run = run.with_model(opened, (text for one in everything for text in (one.key, one.text)), **made)
    with run.kept() as kept, bars() as progress:
        written = writing.write_answers(opened, asked, how, kept=kept, batch_size=batch_size, progress=progress)
        texts = [found.text for found in written]
        found = writing.score_answers(asked, texts) if scored else {}
        numbers: dict[str, Estimate | float] = {kind: result.accuracy for kind, result in found.items()}
        if run.task == "gqa" and scored:
            numbers |= _gqa_numbers(asked, texts)
        names = ("questionId", "prediction") if run.task == "gqa" else ("question_id", "answer")
        rows = [dict(zip(names, (row.id, text), strict=True)) for row, text in zip(asked, texts, strict=True)]
        floors = {kind: f'{result.floor:.3f} (always "{result.answer}")' for kind, result in found.items()}
        lowest = {kind: {"accuracy": result.floor, "answer": result.answer} for kind, result in found.items()}
        run.finish(numbers, rows, floors=floors, questions=len(asked), lowest=lowest)
    if not scored:
        note("no numbers: the answers of these questions are kept back; hand in predictions.json")
    elif run.report is not None:
        title = f"Answers of {run.about['model']}: {Path(run.about['data']).name}"
        pages.write(run.report, title, numbers, run.settings(), pages.of_answers(asked, written))
    tell_unread(written)


def _gqa_numbers(asked: Sequence[Question], texts: Sequence[str]) -> dict[str, Estimate | float]:
    from blip2.evaluate import gqa

    given = {question.key: text for question, text in zip(asked, texts, strict=True)}
    found = {"consistency": gqa.consistency(asked, given), "distribution (0 is best)": gqa.distribution(asked, given)}
    return {name: value for name, value in found.items() if value is not None}


def read_samples(
    data: str,
    format: str,
    split: str | None,
    images: Path | None,
    *,
    questions: Path | None = None,
    unlabelled: bool = False,
) -> list[Sample]:
    """The samples, before the slow loading of the model: a wrong name is told at once."""
    from blip2.data import sources

    kind = cast("Format", format)
    return sources.read(data, kind, split=split, questions=questions, images=images, unlabelled=unlabelled)


def _scored(samples: Sequence[Sample]) -> bool:
    """Whether there are captions to compare with: of all pictures or of none."""
    bare = [sample.id for sample in samples if not sample.captions]
    if bare and len(bare) < len(samples):
        raise DataError(f"{bare[0]!r} has no caption to compare with, though others have: mend it, or leave it out")
    return not bare


def _folder(data: str, images: Path | None) -> Path:
    return Path(data).parent if images is None else images


def _number(key: str) -> int | str:
    """An image's id as the official results have it: a number, where it is one."""
    return int(key) if key.isascii() and key.isdigit() else key
