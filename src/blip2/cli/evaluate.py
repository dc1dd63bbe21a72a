"""`blip2 evaluate`: retrieval, captions and answers on your own data, as a table and as JSON."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import rich.progress
import typer

from blip2.cli.console import open_model, stderr, table
from blip2.cli.options import Device, Dtype, Model, Quantize

if TYPE_CHECKING:
    from blip2.data.sources import Format, Sample
    from blip2.evaluate.estimate import Estimate
    from blip2.evaluate.run import Progress

_HELP = """Measure a model on your own data.

Each measure comes with its 95% bootstrap interval over pictures.

```
blip2 evaluate retrieval flickr8k/ --split test
blip2 evaluate captions photos.csv --limit 500
```
"""
app = typer.Typer(no_args_is_help=True, help=_HELP)

Data = Annotated[
    str, typer.Argument(help="Shards, a table, a folder, or a Flickr8k or COCO distribution.", show_default=False)
]
Layout = Annotated[
    str, typer.Option("--format", help="auto, webdataset, flickr8k, coco, table or folder.", rich_help_panel="Data")
]
Split = Annotated[
    str | None, typer.Option(help="Of Flickr8k (test) or COCO (val2017).", show_default=False, rich_help_panel="Data")
]
Limit = Annotated[
    int | None,
    typer.Option(min=1, help="Only the first N pictures: a quick look.", show_default=False, rich_help_panel="Data"),
]
Out = Annotated[
    Path | None,
    typer.Option(help="Write numbers, intervals, texts, command and time here, as JSON.", show_default=False),
]
Beams = Annotated[int, typer.Option("--num-beams", min=1, help="Beams; 1 is greedy.")]


@app.command()
def retrieval(
    data: Data,
    rerank: Annotated[int, typer.Option(min=0, help="Re-rank so many of each query's best by matching.")] = 0,
    itm_weight: Annotated[
        float, typer.Option(min=0, help="Of a match's logit beside the cosine; 1 as published, mini wants 0.05.")
    ] = 1.0,
    out: Out = None,
    format: Layout = "auto",
    split: Split = None,
    limit: Limit = None,
    model: Model = "mini",
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantize: Quantize = None,
) -> None:
    """Find pictures by their captions and captions by their pictures: R@1, R@5 and R@10.

    ```
    blip2 evaluate retrieval flickr8k/test-000000.tar --rerank 32
    ```
    """
    started = time.monotonic()
    samples = _read(data, format, split, limit)
    from blip2.evaluate.run import evaluate_retrieval

    with _bars() as progress:
        found = evaluate_retrieval(
            open_model(model, device, dtype, quantize), samples, top=rerank, weight=itm_weight, progress=progress
        )
    numbers = {
        f"{way} R@{depth} ({name.upper()})": estimate
        for name, recall in found.items()
        for way, depths in (("text to image", recall.text_to_image), ("image to text", recall.image_to_text))
        for depth, estimate in depths.items()
    }
    _show(numbers)
    _write(out, "retrieval", model, data, len(samples), numbers, started)


@app.command()
def captions(
    data: Data,
    num_beams: Beams = 5,
    out: Out = None,
    format: Layout = "auto",
    split: Split = None,
    limit: Limit = None,
    model: Model = "mini",
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantize: Quantize = None,
) -> None:
    """Caption each picture and compare with its own captions: BLEU, METEOR, ROUGE-L, CIDEr.

    ```
    blip2 evaluate captions coco/ --split val2017 --limit 500 --out captions.json
    ```
    """
    started = time.monotonic()
    samples = _read(data, format, split, limit)
    from blip2.evaluate.run import evaluate_captions

    with _bars() as progress:
        numbers, written = evaluate_captions(
            open_model(model, device, dtype, quantize), samples, num_beams=num_beams, progress=progress
        )
    texts = [{"id": sample.id, "caption": text} for sample, text in zip(samples, written, strict=True)]
    _show(numbers)
    _write(out, "captions", model, data, len(samples), numbers, started, captions=texts)


@app.command()
def answers(
    data: Data,
    questions: Annotated[
        Path | None, typer.Option(help="A .jsonl of questions that join the pictures by id.", show_default=False)
    ] = None,
    num_beams: Beams = 5,
    out: Out = None,
    format: Layout = "auto",
    split: Split = None,
    limit: Limit = None,
    model: Model = "mini",
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantize: Quantize = None,
) -> None:
    """Answer the questions about each picture: accuracy by kind, beside what the most frequent answer gets.

    ```
    blip2 evaluate answers photos.jsonl --questions questions.jsonl
    ```
    """
    started = time.monotonic()
    samples = _read(data, format, split, limit, questions)
    from blip2.evaluate.run import evaluate_answers

    with _bars() as progress:
        found, given = evaluate_answers(
            open_model(model, device, dtype, quantize), samples, num_beams=num_beams, progress=progress
        )
    asked = [(sample.id, *pair) for sample in samples for pair in sample.questions]
    texts = [
        {"id": key, "question": question, "answer": answer, "given": text}
        for (key, question, answer), text in zip(asked, given, strict=True)
    ]
    numbers = {kind: result.accuracy for kind, result in found.items()}
    floors = {kind: {"accuracy": result.floor, "answer": result.answer} for kind, result in found.items()}
    _show(numbers, {kind: f'{result.floor:.3f} (always "{result.answer}")' for kind, result in found.items()})
    _write(out, "answers", model, data, len(samples), numbers, started, floors=floors, answers=texts)


def _read(data: str, format: str, split: str | None, limit: int | None, questions: Path | None = None) -> list[Sample]:
    """The samples, before the slow loading of the model: a wrong name is told at once."""
    from blip2.data import sources

    return sources.read(data, cast("Format", format), split=split, questions=questions)[:limit]


@contextmanager
def _bars() -> Generator[Progress]:
    """A bar on stderr for each thing that is done, if that is a terminal."""
    bars = rich.progress.Progress(console=stderr(), disable=not sys.stderr.isatty())
    tasks: dict[str, rich.progress.TaskID] = {}

    def show(what: str, done: int, total: int) -> None:
        if what not in tasks:
            tasks[what] = bars.add_task(what, total=total)
        bars.update(tasks[what], completed=done)

    with bars:
        yield show


def _show(numbers: Mapping[str, Estimate], floors: Mapping[str, str] | None = None) -> None:
    columns = ["measure", "value", "95% interval", *(["floor"] if floors else [])]
    rows = [
        [name, f"{found.value:.3f}", f"{found.low:.3f} to {found.high:.3f}", *([floors[name]] if floors else [])]
        for name, found in numbers.items()
    ]
    table(columns, rows, right=columns[1:])


def _write(
    out: Path | None,
    task: str,
    model: str,
    data: str,
    images: int,
    numbers: Mapping[str, Estimate],
    started: float,
    **more: Any,
) -> None:
    if out is None:
        return
    report = {
        "task": task,
        "model": model,
        "data": data,
        "images": images,
        "numbers": {name: dataclasses.asdict(found) for name, found in numbers.items()},
        "command": shlex.join(["blip2", *sys.argv[1:]]),
        "seconds": round(time.monotonic() - started, 1),
        **more,
    }
    out.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
