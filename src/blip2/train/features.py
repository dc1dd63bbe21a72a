"""Frozen features, computed once and kept on disk in half precision.

A view of a source's pictures is a folder named by all that its numbers depend on: encoder, pixel transform, pictures,
augmentation. Two runs may share it, and a run killed at any moment leaves nothing that passes for a finished feature.

Letters: N samples, B rows, P patches, D width.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import filelock
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from blip2.data.sources import Prototype, Sample
from blip2.errors import DataError
from blip2.protocols import ImageEncoder
from blip2.train.digests import picture_digests
from blip2.train.pixels import Pixels

_TODO, _DONE, _DROPPED = range(3)  # marks, one byte a picture
_BATCH = 16  # pictures encoded together
_SAVED = 256  # pictures flushed and marked together: what a kill can cost


class FeatureCache:
    """Patch features of a source's pictures.

    Args:
        directory: holds any number of caches.
        encoder: frozen; called without gradient. Its type of number and its `layout`, where it has one, are part of
            the key.
        encoder_id: what tells it from others: name, SHA-256 of its weights, and whatever else shapes its output.
        transform: RGB pictures to float[B, 3, H, W]; its `repr` is part of the key, so it must state every setting.
        samples: with pictures.
        views: how many a picture has: view 0 is the plain one, those from 1 on are drawn by `augment`.
        augment: a picture and a seed to float[3, H, W]; its `repr` is part of the key too.
        unreadable: `error` stops at a picture that cannot be opened, `drop` leaves it out of `samples`.
        progress: called with the number of pictures done, over all views, and the number there are.
    Attributes:
        samples: those that have features; rows count these.
        dropped: ids of the pictures left out.
    Raises:
        DataError: a picture cannot be opened, the disk is full, or a feature does not fit half precision.
    """

    def __init__(
        self,
        directory: str | Path,
        encoder: ImageEncoder,
        encoder_id: str,
        transform: Callable[[Sequence[Any]], Tensor],
        samples: Sequence[Sample],
        *,
        views: int = 1,
        augment: Callable[[Any, int], Tensor] | None = None,
        unreadable: Literal["error", "drop"] = "error",
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        if views > 1 and augment is None:
            raise DataError(f"{views} views of each picture are asked for, but no augmentation is given")
        for part in (transform, augment):
            if " at 0x" in repr(part):
                raise DataError(
                    f"{part!r}: the features cannot be named by it; give it a repr that states its settings"
                )
        pixels = Pixels(samples, transform, augment)
        content = hashlib.sha256()
        with _disk(Path(directory)):
            digests = picture_digests(pixels.refs, Path(directory) / "pictures.json")
        for sample, digest in zip(samples, digests, strict=True):
            content.update(json.dumps([sample.id, digest]).encode())
        weight = _weight(encoder)
        identity = [encoder_id, getattr(encoder, "layout", 0), str(torch.float32 if weight is None else weight.dtype)]
        self._views: list[_View] = []
        for view in range(views):
            seen = None if view == 0 else [view, repr(augment)]
            key = json.dumps([*identity, repr(transform), content.hexdigest(), seen])
            stored = _View(Path(directory) / hashlib.sha256(key.encode()).hexdigest()[:24], len(samples))
            report = None if progress is None else _offset(progress, view * len(samples), views * len(samples))
            with _disk(Path(directory)):
                stored.fill(encoder, pixels, view, unreadable, report)
            self._views.append(stored)
        marks = self._views[0].marks()
        self._rows: list[int] = np.flatnonzero(marks == _DONE).tolist()
        self.samples = [samples[row] for row in self._rows]
        self.dropped = [samples[row].id for row in np.flatnonzero(marks == _DROPPED).tolist()]
        if not self.samples:
            raise DataError(f"none of {len(samples)} pictures could be opened; the first is {pixels.refs[0]}")

    def patches(self, rows: Sequence[int], views: Sequence[int]) -> Tensor:
        """Features of some rows.

        Args:
            rows: positions in `samples`.
            views: one for each row.
        Returns:
            float16[B, P, D].
        """
        features = {view: self._views[view].features() for view in set(views)}
        found = [features[view][self._rows[row]] for row, view in zip(rows, views, strict=True)]
        return torch.from_numpy(np.stack(found))


class PrototypeFeatures:
    """Class prototypes in the place of pictures' features.

    Args:
        draw: the encoder's `prototypes`: classes and the numbers of their views, to float[B, P, D].
        count: of the encoder's classes.
        samples: all with a `Prototype` for image.
    Raises:
        DataError: a sample has a picture, or names a class that the encoder does not have.
    """

    def __init__(
        self, draw: Callable[[Sequence[int], Sequence[int]], Tensor], count: int, samples: Sequence[Sample]
    ) -> None:
        self._draw = draw
        self._classes: list[int] = []
        for sample in samples:
            if not isinstance(sample.image, Prototype):
                raise DataError(f"{sample.id!r} has a picture; prototypes stand for classes only")
            if not 0 <= sample.image.index < count:
                raise DataError(f"{sample.id!r}: class {sample.image.index} of an encoder with {count}")
            self._classes.append(sample.image.index)

    def patches(self, rows: Sequence[int], views: Sequence[int]) -> Tensor:
        """float16[B, P, D]; a class has any number of views."""
        return self._draw([self._classes[row] for row in rows], views).half().cpu()


@dataclass(frozen=True)
class _View:
    """One view of N pictures on disk: `features` float16[N, P, D], `marks` uint8[N], `shape.json` of [P, D]."""

    path: Path
    count: int

    def marks(self) -> NDArray[np.uint8]:
        file = self.path / "marks"
        marks = np.zeros(self.count, dtype=np.uint8)
        if file.exists():
            stored = np.fromfile(file, dtype=np.uint8)[: self.count]
            marks[: len(stored)] = stored
        return marks

    def features(self) -> NDArray[np.float16]:
        shape = json.loads((self.path / "shape.json").read_text())
        return np.memmap(self.path / "features", dtype=np.float16, mode="r", shape=(self.count, *shape))

    def fill(
        self,
        encoder: ImageEncoder,
        pixels: Pixels,
        view: int,
        unreadable: Literal["error", "drop"],
        progress: Callable[[int], None] | None,
    ) -> None:
        """Compute what is not there yet; another process that does so is waited for."""
        self.path.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(self.path / "lock"):
            todo = np.flatnonzero(self.marks() != _DONE)
            if unreadable == "drop":
                todo = np.flatnonzero(self.marks() == _TODO)
            for start in range(0, len(todo), _SAVED):
                rows = todo[start : start + _SAVED].tolist()
                marks: dict[int, int] = {}
                try:
                    for first in range(0, len(rows), _BATCH):
                        marks |= self._encode(encoder, pixels, rows[first : first + _BATCH], view, unreadable)
                        if progress is not None:
                            progress(self.count - len(todo) + start + min(first + _BATCH, len(rows)))
                finally:
                    self._mark(marks)

    def _encode(
        self,
        encoder: ImageEncoder,
        pixels: Pixels,
        rows: Sequence[int],
        view: int,
        unreadable: Literal["error", "drop"],
    ) -> dict[int, int]:
        """Features of a few rows, written but not yet sure to be on disk; their marks."""
        opened = {row: each for row in rows if (each := _open(pixels, row, view, unreadable)) is not None}
        if opened:
            self._store(list(opened), _encode(encoder, torch.stack(list(opened.values())), pixels, rows))
        return {row: _DONE if row in opened else _DROPPED for row in rows}

    def _store(self, rows: Sequence[int], features: NDArray[np.float16]) -> None:
        shape = self.path / "shape.json"
        if not shape.exists():
            needed, free = self.count * features[0].nbytes, shutil.disk_usage(self.path).free
            if needed > free:
                raise OSError(errno.ENOSPC, f"{needed / 1e6:.0f} MB are needed and {free / 1e6:.0f} MB are free")
            new = shape.with_suffix(".new")
            new.write_text(json.dumps(features.shape[1:]))
            new.replace(shape)
        with _open_to_write(self.path / "features") as file:
            os.truncate(file, self.count * features[0].nbytes)  # a hole, until rows are written into it
            for row, feature in zip(rows, features, strict=True):
                _write(file, feature.tobytes(), row * feature.nbytes)

    def _mark(self, marks: dict[int, int]) -> None:
        """Only after the features are safely on disk."""
        if _DONE in marks.values():
            with _open_to_write(self.path / "features") as file:
                os.fsync(file)
        with _open_to_write(self.path / "marks") as file:
            for row, mark in marks.items():
                _write(file, bytes([mark]), row)
            os.fsync(file)


def _offset(progress: Callable[[int, int], None], before: int, total: int) -> Callable[[int], None]:
    return lambda done: progress(before + done, total)


def _open(pixels: Pixels, row: int, view: int, unreadable: Literal["error", "drop"]) -> Tensor | None:
    """A view of a picture, or None where one that cannot be opened is to be dropped."""
    try:
        return pixels.view(row, view)
    except DataError:
        if unreadable == "error":
            raise
        return None


def _weight(encoder: ImageEncoder) -> Tensor | None:
    """Any of its weights: they share device and type."""
    return next(encoder.parameters(), None) if isinstance(encoder, nn.Module) else None


def _encode(encoder: ImageEncoder, images: Tensor, pixels: Pixels, rows: Sequence[int]) -> NDArray[np.float16]:
    """float16[B, P, D]."""
    weight = _weight(encoder)
    with torch.inference_mode():
        patches = encoder(images if weight is None else images.to(weight)).half()
    if not patches.isfinite().all():
        names = ", ".join(pixels.ids[row] for row in rows)
        raise DataError(f"the encoder's features of one of {names} are beyond half precision; train on pixels instead")
    return patches.cpu().numpy()


def _write(file: int, data: bytes, offset: int) -> None:
    """All of the data: near a full disk the system may take a part, and refuse the rest only when asked again."""
    while data:
        written = os.pwrite(file, data, offset)
        data, offset = data[written:], offset + written


@contextmanager
def _open_to_write(path: Path) -> Generator[int]:
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        yield file
    finally:
        os.close(file)


@contextmanager
def _disk(directory: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        way_out = "make room and start again: what is done is kept" if full else "choose another folder for features"
        raise DataError(f"{directory}: features cannot be written ({error.strerror}); {way_out}") from None
