"""Texts that people or the web gave to pictures, kept where they match: the filter of BLIP's CapFilt.

What each text is worth is kept as it comes, so that a run which is stopped goes on where it was, and another threshold
costs no second look at the pictures.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL.Image import Image

from blip2.blip2 import Blip2
from blip2.choosing import By, fits
from blip2.data.sources import Prototype, Sample
from blip2.errors import DataError
from blip2.evaluate.kept import Kept, Row, write_lines
from blip2.evaluate.run import NamedProgress, of_readable, picture_of, silent

KEPT, DROPPED = "kept.jsonl", "dropped.jsonl"
BATCH = 16


@dataclass(frozen=True)
class Filtered:
    """How many texts stayed, and how many did not.

    Attributes:
        unreadable: pictures that could not be read, whose texts are dropped too.
    """

    kept: int
    dropped: int
    unreadable: tuple[str, ...]


def judge(
    model: Blip2,
    samples: Sequence[Sample],
    *,
    kept: Kept | None = None,
    batch_size: int = BATCH,
    progress: NamedProgress = silent,
) -> list[Row]:
    """Of each sample what its texts are worth, `{"itm": [...], "itc": [...]}`, or `{"error": ...}`.

    Args:
        kept: what an earlier run of the same has judged is not judged again.
    Raises:
        ConfigError: the model does not match.
    """

    def worth(readable: Sequence[Sample], pictures: Sequence[Image]) -> list[Row]:
        rows: list[Row] = [{"itm": [], "itc": []} for _ in readable]
        texts = [(number, text) for number, sample in enumerate(readable) for text in sample.captions]
        found = fits(model, model.encode(pictures), [text for _, text in texts], [number for number, _ in texts])
        for (number, _), itm, itc in zip(texts, *(each.tolist() for each in found), strict=True):
            rows[number]["itm"].append(itm)
            rows[number]["itc"].append(itc)
        return rows

    def work(batch: Sequence[Sample]) -> list[Row]:
        return of_readable(batch, lambda sample: picture_of(sample.id, sample.image), worth)

    return (kept or Kept()).complete(
        samples, lambda sample: sample.id, work, batch_size, lambda done, total: progress("pictures", done, total)
    )


def write(folder: Path, samples: Sequence[Sample], rows: Sequence[Row], threshold: float, by: By = "itm") -> Filtered:
    """`kept.jsonl` and `dropped.jsonl` of judged samples, each whole or not at all.

    A line of `kept.jsonl` is a picture with the texts that reach the threshold, as `blip2 train` reads it where
    pictures are files; a line of `dropped.jsonl` is a text, or a picture that cannot be read, with the reason.

    Args:
        rows: what `judge` gave.
    Raises:
        DataError: the folder cannot be written.
    """
    stay: list[dict[str, Any]] = []
    go: list[dict[str, Any]] = []
    unreadable: list[str] = []
    for sample, row in zip(samples, rows, strict=True):
        place = {"id": sample.id, "image": _place(sample, folder)}
        if "error" in row:
            unreadable.append(row["error"])
            go.append({**place, "captions": list(sample.captions), "reason": row["error"]})
            continue
        reach = [number for number, worth in enumerate(row[by]) if worth >= threshold]
        if reach:
            worths = {name: [row[name][number] for number in reach] for name in ("itm", "itc")}
            stay.append({**place, "captions": [sample.captions[number] for number in reach], **worths})
        for number in sorted(set(range(len(sample.captions))) - set(reach)):
            reason = f"{by} {row[by][number]:.3f} is below {threshold:g}"
            go.append({**place, "caption": sample.captions[number], "reason": reason})
    write_lines(folder / KEPT, stay)
    write_lines(folder / DROPPED, go)
    kept = sum(len(row["captions"]) for row in stay)
    return Filtered(kept, sum(len(sample.captions) for sample in samples) - kept, tuple(unreadable))


def check_texts(samples: Sequence[Sample]) -> None:
    """Whether each sample has something to judge.

    Raises:
        DataError: a class prototype, or a picture without a text.
    """
    for sample in samples:
        if isinstance(sample.image, Prototype) or not sample.captions:
            raise DataError(f"{sample.id!r}: only pictures with texts can be filtered; take it out")


def _place(sample: Sample, folder: Path) -> str:
    """A picture from the folder on, or the stretch of a shard that it is."""
    assert not isinstance(sample.image, Prototype)
    if sample.image.size is not None:
        return str(sample.image)
    return Path(os.path.relpath(sample.image.path.resolve(), folder.resolve())).as_posix()
