"""Captions of many images, on disk: as one JSON Lines file, or as a text file beside each image.

What is finished stays finished: stop a run however you like, start it again, and it goes on where it was. One
damaged image never stops it.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from blip2 import image
from blip2.batching import BatchSize, Size
from blip2.bulk.reading import each
from blip2.bulk.sinks import Captioned, Existing, Failure, Report, sink
from blip2.errors import ConfigError
from blip2.protocols import Progress


class Captioner(Protocol):
    """What is asked of a model: a text, or several, for each image of a batch."""

    @property
    def transform(self) -> image.Transform: ...

    @property
    def device(self) -> torch.device: ...

    def caption(self, images: Tensor, *, batch_size: int, **options: Any) -> Sequence[Any]: ...


def caption_files(
    model: Captioner,
    paths: Iterable[str | os.PathLike[str]],
    out: str | os.PathLike[str] | None = None,
    *,
    form: Literal["jsonl", "txt"] = "jsonl",
    existing: Existing = "skip",
    prefix: str = "",
    trigger: str = "",
    batch_size: Size = "auto",
    progress: Progress | None = None,
    **options: Any,
) -> Report:
    """Caption files and folders of images, batch by batch onto the disk.

    Args:
        paths: what `image.find_images` takes.
        out: the JSON Lines file; nothing for `txt`.
        form: `jsonl` writes a line {"image", "caption"} an image ("captions", a list, where `num_captions` asks for
            several, and empty where none reaches the `threshold`; {"image", "error"} for one that cannot be read), with
            paths relative to the file's folder and `/` between their parts. `txt` writes `photo.txt` beside
            `photo.jpg`, a line a caption; an image without one gets no file, and the next run tries it again.
        existing: what to do with an image that has its captions already: leave it (so that a stopped run goes on),
            write them anew, or add the new ones to them.
        prefix: stands before each caption as it is.
        trigger: a word before each caption and prefix, with a comma; for training sets that teach a new word.
        batch_size: images in one call of the model; `auto` finds on the first ones how many are fastest. Halved where
            memory runs out. It never changes a caption.
        options: keywords of `Blip2.caption`.
    Raises:
        ImageError: no image is found.
        ConfigError: the arguments do not fit together.
        DataError: the file at `out` is not one of ours, is being written by another run, or cannot be written.
    """
    refused = sorted({"stream", "details"} & set(options))
    if refused:
        raise ConfigError(f"{refused[0]} does not go with files: they hold the texts and nothing else")
    size = BatchSize(batch_size, model.device)
    images = image.find_images(paths)
    before = f"{trigger}, {prefix}" if trigger else prefix
    done = 0
    with sink(form, out, existing) as files:
        todo, failed = files.plan(images)
        skipped = len(images) - len(todo) - len(failed)
        if progress:
            progress(skipped + len(failed), len(images))
        with closing(captions(model, todo, size, **options)) as stream:
            for batch in stream:
                results = [_labelled(path, found, before) for path, found in batch]
                files.write(results)
                failures = [result for result in results if isinstance(result, Failure)]
                failed += failures
                done += len(results) - len(failures)
                if progress:
                    progress(skipped + done + len(failed), len(images))
    return Report(done, skipped, tuple(failed))


def captions(
    model: Captioner, paths: Iterable[Path], size: BatchSize, **options: Any
) -> Generator[list[tuple[Path, Any]]]:
    """What `Blip2.caption` gives for each image, batch by batch, in order; `Failure` for one that it cannot read.

    Args:
        options: keywords of `Blip2.caption`.
    """

    def verb(squares: Tensor) -> Sequence[Any]:
        return model.caption(squares, batch_size=len(squares), **options)

    return each(verb, paths, model.transform, size)


def _labelled(path: Path, found: Any, before: str) -> Captioned | Failure:
    """A text, several or none, with what stands before each."""
    if isinstance(found, Failure):
        return found
    row: Sequence[str] = (found,) if isinstance(found, str) else found or ()
    return Captioned(path, tuple(before + text for text in row))
