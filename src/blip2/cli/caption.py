"""`blip2 caption`: a picture, a folder, or a training set."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from blip2.cli.console import TASK, note, one_line, open_model, progress, result, result_json
from blip2.cli.options import (
    AutoBatch,
    BestOf,
    By,
    Chosen,
    Details,
    Device,
    Dtype,
    FitBy,
    Json,
    Model,
    Paths,
    Quantize,
    Threshold,
    check_out,
    chosen_of,
    writes,
)
from blip2.errors import ConfigError

if TYPE_CHECKING:
    from blip2.batching import Size
    from blip2.blip2 import Blip2
    from blip2.results import Generation


class Existing(StrEnum):
    skip = "skip"
    overwrite = "overwrite"
    append = "append"


_FILES = "Files"
Prompt = Annotated[str | None, typer.Option("--prompt", "-p", help="What the text starts from.", show_default=False)]
Num = Annotated[int, typer.Option("--num", "-n", min=1, help="Captions for each image.")]
Stream = Annotated[bool, typer.Option("--stream", help="Show the caption of one image as it is written.")]
Out = Annotated[
    Path | None,
    typer.Option("--out", "-o", help="A .jsonl file, a line an image.", show_default=False, rich_help_panel=_FILES),
]
Txt = Annotated[bool, typer.Option("--txt", help="A .txt file beside each image.", rich_help_panel=_FILES)]
Keep = Annotated[Existing, typer.Option(help="What happens where a caption is there.", rich_help_panel=_FILES)]
Prefix = Annotated[str, typer.Option(help="Stands before each caption as it is.", rich_help_panel=_FILES)]
Trigger = Annotated[str, typer.Option(help="A word before each caption, with a comma.", rich_help_panel=_FILES)]


@writes
def caption(
    paths: Paths,
    *,
    prompt: Prompt = None,
    num: Num = 1,
    json: Json = False,
    details: Details = False,
    stream: Stream = False,
    best_of: BestOf = None,
    by: By = FitBy.itm,
    threshold: Threshold = None,
    out: Out = None,
    txt: Txt = False,
    existing: Keep = Existing.skip,
    prefix: Prefix = "",
    trigger: Trigger = "",
    model: Model = "mini",
    batch_size: AutoBatch = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantize: Quantize = None,
    options: Chosen,
) -> None:
    """Describe images: files, folders, patterns.

    One image prints its caption, several print `path<TAB>caption`. With `--out` or `--txt` captions go to files, and a
    run that was stopped goes on where it was. Images that cannot be read are named on stderr, and the exit code is 1.
    With `--best-of` several captions are written and those that match best kept; `--json` and `--details` tell how sure
    the models are.

    ```
    blip2 caption photo.jpg
    blip2 caption photo.jpg --prompt "a photo of" --num 3
    blip2 caption holiday/ --out captions.jsonl
    blip2 caption training-set/ --txt --trigger myword
    blip2 caption holiday/ --best-of 5 --top-p 0.9 --threshold 0.5 --out captions.jsonl
    ```
    """
    from blip2 import image

    to_files = out is not None or txt
    _check_files(out, txt)
    _check(
        to_files, {"stream": stream, "json": json, "details": details}, bool(prefix or trigger) or existing != "skip"
    )
    keywords: Chosen = {**options, **({"num_captions": num} if num > 1 else {}), **chosen_of(best_of, by, threshold)}
    files = image.find_images(paths)
    if stream and (len(files) > 1 or num > 1 or best_of or threshold is not None):
        raise ConfigError("--stream writes one caption of one image, as it comes")
    opened = open_model(model, device, dtype, quantize)
    if stream:
        _stream(opened, files[0], prompt, keywords)
    elif to_files:
        labels = {"existing": existing.value, "prefix": prefix, "trigger": trigger, "batch_size": batch_size or "auto"}
        _to_files(opened, files, out, txt, prompt, {**keywords, **labels})
    else:
        _to_stdout(opened, files, json, details, batch_size or "auto", {**keywords, "prompt": prompt})


def _check_files(out: Path | None, txt: bool) -> None:
    if out is None:
        return
    if txt:
        raise ConfigError("--out and --txt: choose one")
    check_out(out)
    if out.suffix == ".txt":
        raise ConfigError(f"--out {out}: is JSON lines, call it .jsonl; --txt puts a .txt beside each image")


def _check(to_files: bool, shown: dict[str, bool], labelled: bool) -> None:
    if to_files and any(shown.values()):
        raise ConfigError(f"--{next(name for name in shown if shown[name])} does not go with --out or --txt")
    if sum(shown.values()) > 1 and shown["stream"]:
        raise ConfigError("--stream does not go with --json or --details")
    if labelled and not to_files:
        raise ConfigError("--existing, --prefix and --trigger are for captions in files: add --out FILE or --txt")


def _stream(model: Blip2, file: Path, prompt: str | None, options: dict[str, Any]) -> None:
    for piece in model.caption(file, prompt, stream=True, **options):
        print(piece, end="", flush=True)
    print()


def _to_files(
    model: Blip2, files: Sequence[Path], out: Path | None, txt: bool, prompt: str | None, options: dict[str, Any]
) -> None:
    from blip2 import bulk

    with progress("captions", len(files)) as bars:
        report = bulk.caption_files(
            model,
            files,
            out,
            form="txt" if txt else "jsonl",
            prompt=prompt,
            progress=lambda done, total: bars.update(TASK, completed=done, total=total),
            **options,
        )
    for failure in report.failed:
        note(f"error: {failure.error}")
    note(f"{report.done} captioned, {report.skipped} were there, {len(report.failed)} could not be read")
    if report.failed:
        raise typer.Exit(1)


def _to_stdout(
    model: Blip2, files: Sequence[Path], json: bool, details: bool, batch_size: Size, options: dict[str, Any]
) -> None:
    from blip2 import bulk
    from blip2.batching import BatchSize

    failed = False
    asked = json or details
    found = bulk.captions(model, files, BatchSize(batch_size, model.device), details=asked, **options)
    with progress("captions", len(files)) as bars, closing(found) as stream:
        for batch in stream:
            for path, row in batch:
                if not isinstance(row, bulk.Failure):
                    rows: list[Any] = [each for each in (row if isinstance(row, list) else [row]) if each is not None]
                    if asked:
                        _tell(path, rows, details)
                    else:
                        _print(path, rows, alone=len(files) == 1)
                    continue
                failed = True
                note(f"error: {row.error}")
                if asked:
                    result_json({"image": str(path), "error": row.error})
            bars.advance(TASK, len(batch))
    if failed:
        raise typer.Exit(1)


def _print(path: Path, texts: Sequence[str], *, alone: bool) -> None:
    """The captions of one image, a line each."""
    if not texts:
        note(f"{path}: no caption reaches the threshold")
    for text in map(one_line, texts):
        result(text if alone else f"{path}\t{text}")


def _tell(path: Path, rows: Sequence[Generation], details: bool) -> None:
    """The captions of one image as JSON, with how sure the models are of each."""
    if details:
        result_json({"image": str(path), "captions": [{**asdict(row), "confidence": row.confidence} for row in rows]})
        return
    told: dict[str, list[Any]] = {"caption": [row.text for row in rows], "confidence": [row.confidence for row in rows]}
    if all(row.match is not None for row in rows):
        told["match"] = [row.match for row in rows]
    if len(rows) == 1:
        result_json({"image": str(path), **{name: values[0] for name, values in told.items()}})
    else:
        result_json({"image": str(path), "captions": told.pop("caption"), **told})
