"""An index brought up to date: what is new or changed is encoded, what is gone leaves.

Letters: B images, Q queries an image, E width of the image-text space, P patches, D their width.
"""

from __future__ import annotations

import glob
import os
import time
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from blip2 import image
from blip2.batching import BatchSize
from blip2.bulk import Failure, each
from blip2.errors import ConfigError, ImageError
from blip2.protocols import Progress
from blip2.results import ImageFeatures, Matches
from blip2.search.duplicates import thumbnail
from blip2.search.store import Collection, File, Store, tidied

COMMIT_SECONDS = 10.0  # of work that a kill can cost
COMMIT_BYTES = 64 << 20  # of vectors and patches that wait to be written

Paths: TypeAlias = Iterable[str | os.PathLike[str]]
_Seen: TypeAlias = tuple[Tensor, Tensor, Tensor | None]
"""Of an image: vectors float16[Q, E], thumbnail uint8[T], patches float16[P, D] where they are kept."""


class Embedder(Protocol):
    """What is asked of a model; `Blip2` has it all."""

    @property
    def identity(self) -> str: ...
    @property
    def transform(self) -> image.Transform: ...
    @property
    def device(self) -> torch.device: ...
    def encode(self, images: Any) -> ImageFeatures: ...
    def embed_images(self, images: Any) -> Tensor: ...
    def embed_texts(self, texts: Any) -> Tensor: ...
    def unread(self, text: str) -> int: ...
    def match(self, images: Any, texts: Any) -> Matches: ...


def refreshed(
    model: Embedder,
    collection: Collection,
    paths: Paths,
    store: Store | None,
    batch_size: int,
    progress: Progress | None,
) -> Collection:
    """The collection of its roots and these paths as they are now, written as it grows where there is a store.

    Raises:
        ImageError: a path does not exist, or nothing is found anywhere.
        DataError: the store cannot be written.
    """
    roots, files = _found(collection, [os.path.abspath(path) for path in paths])  # noqa: PTH100  (keeps links)
    known = collection.files()
    stamps = {path: known[path] if is_away else _stamp(path) for path, is_away in files.items()}
    todo = [path for path in files if known.get(path) != stamps[path]]
    gone = set(known) - set(files)
    if not todo and not gone and roots == collection.roots and not collection.failed:
        return collection
    started = replace(collection.without(gone), roots=roots, failed=())
    work = _Work(model, started, store)
    before = len(files) - len(todo)
    try:
        size = BatchSize(batch_size, model.device)
        with closing(each(work.seen, map(Path, todo), model.transform, size)) as stream:
            if progress:
                progress(before, len(files))
            for batch in stream:
                work.add(batch, stamps)
                before += len(batch)
                if progress:
                    progress(before, len(files))
    finally:
        work.commit()
    return work.collection


def _found(collection: Collection, given: Sequence[str]) -> tuple[tuple[str, ...], dict[str, bool]]:
    """All roots, and the files that they stand for, in order, with whether a file is known but away with its folder."""
    roots = tuple(dict.fromkeys([*collection.roots, *given]))
    found = dict.fromkeys(map(str, image.find_images(given) if given else ()), False)
    for root in collection.roots:
        try:
            found |= dict.fromkeys(map(str, image.find_images([root])), False)
        except ImageError:  # nothing is there any more
            if not os.path.lexists(root) and not glob.has_magic(root):  # nor the folder: its disk may be unplugged
                inside = os.path.join(root, "")  # noqa: PTH118  (ends in a slash)
                found |= {path: True for path in collection.files() if path.startswith(inside) and path not in found}
    if not found:
        raise ImageError(f"{', '.join(roots) or 'an empty list of paths'}: no images found")
    return roots, dict(sorted(found.items(), key=lambda item: Path(item[0])))


def _stamp(path: str) -> File:
    try:
        status = os.stat(path)  # noqa: PTH116  (names of any bytes)
    except OSError:  # a broken link: opening it will say so
        return path, -1, -1
    return path, status.st_size, status.st_mtime_ns


@dataclass
class _Work:
    """A collection, and what was encoded since it was last written."""

    model: Embedder
    collection: Collection
    store: Store | None
    files: list[File] = field(default_factory=list[File])
    vectors: list[Tensor] = field(default_factory=list[Tensor])  # float16[Q, E] each
    thumbnails: list[Tensor] = field(default_factory=list[Tensor])  # uint8[T] each
    patches: list[Tensor] = field(default_factory=list[Tensor])  # float16[P, D] each
    failed: list[Failure] = field(default_factory=list[Failure])
    since: float = field(default_factory=time.monotonic)

    def seen(self, squares: Tensor) -> list[_Seen]:
        """What is kept of each image: uint8[B, S, S, 3] as the model's transform squeezes them."""
        features = self.model.encode(squares)
        vectors = self.model.embed_images(features).half().cpu()
        patches: list[Tensor | None] = [None] * len(vectors)
        if self.collection.keeps_patches:
            half = features.patches.half().cpu()
            if not half.isfinite().all():
                raise ConfigError("this model's patches are beyond half precision; make an index without them")
            patches = list(half)
        return list(zip(vectors, map(thumbnail, squares), patches, strict=True))

    def add(self, batch: Sequence[tuple[Path, _Seen | Failure]], stamps: dict[str, File]) -> None:
        for path, found in batch:
            if isinstance(found, Failure):
                self.failed.append(found)
                continue
            vectors, small, patches = found
            self.files.append(stamps[str(path)])
            self.vectors.append(vectors)
            self.thumbnails.append(small)
            if patches is not None:
                self.patches.append(patches)
        waiting = sum(part.nbytes for part in (*self.vectors, *self.patches))
        if self.store and (waiting >= COMMIT_BYTES or time.monotonic() - self.since >= COMMIT_SECONDS):
            self.commit()

    def commit(self) -> None:
        collection = self.collection
        if self.files:
            patches = torch.stack(self.patches) if self.patches else None
            collection = collection.plus(self.files, torch.stack(self.vectors), torch.stack(self.thumbnails), patches)
        broken = {str(failure.image) for failure in self.failed}
        collection = replace(collection.without(broken), failed=tuple(self.failed))
        if self.store:
            self.collection = self.store.write(collection)
        else:
            self.collection = replace(collection, segments=tidied(collection.segments))
        self.files, self.vectors, self.thumbnails, self.patches = [], [], [], []
        self.since = time.monotonic()
