"""Images found by words or by another image: a plain index in memory, kept in one file.

Letters: N images, Q queries an image, E width of the image-text space.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from blip2 import image
from blip2.batching import BatchSize, batches
from blip2.bulk import Failure, Progress, each
from blip2.errors import ConfigError, DataError, ImageError
from blip2.files import cache_directory, replacing
from blip2.results import Matches

FORMAT_VERSION = 1  # of the index file
RERANK_BATCH = 8  # whole pictures in memory at once
BLOCK = 64  # images compared at once: their products stay in the processor's cache
Stamp: TypeAlias = tuple[int, int]  # size in bytes, time of the last change in nanoseconds

_log = logging.getLogger(__name__)


class Embedder(Protocol):
    """What is asked of a model; `Blip2` has it all."""

    @property
    def identity(self) -> str: ...
    @property
    def transform(self) -> image.Transform: ...
    @property
    def device(self) -> torch.device: ...
    def embed_images(self, images: Any) -> Tensor: ...
    def embed_texts(self, texts: Any) -> Tensor: ...
    def match(self, images: Any, texts: Any) -> Matches: ...


@dataclass(frozen=True)
class Hit:
    """An image that was found.

    Attributes:
        score: cosine with the query, on -1..1.
        itm: probability that image and text match, where the hit was re-ranked.
    """

    path: Path
    score: float
    itm: float | None = None


@dataclass(frozen=True)
class ImageIndex:
    """The vectors of some images, ready to be searched; values never change, `update` gives a new index.

    Attributes:
        model: what made the vectors, and embeds the queries.
        stamps: size and time of change of each file when it was encoded, by absolute path, in the order of the paths.
        vectors: float32[N, Q, E], unit length, on the CPU.
        failed: images that could not be read.
    """

    model: Embedder
    stamps: Mapping[Path, Stamp]
    vectors: Tensor
    failed: tuple[Failure, ...] = field(default=())

    def __len__(self) -> int:
        return len(self.stamps)

    @classmethod
    def build(
        cls,
        model: Embedder,
        paths: Iterable[str | os.PathLike[str]],
        *,
        batch_size: int = 16,
        progress: Progress | None = None,
    ) -> ImageIndex:
        """Encode files, folders and patterns, as `image.find_images` takes them.

        Raises:
            ImageError: no image is found, or none of them can be read.
        """
        return cls(model, {}, torch.empty(0, 0, 0)).update(paths, batch_size=batch_size, progress=progress)

    def update(
        self, paths: Iterable[str | os.PathLike[str]], *, batch_size: int = 16, progress: Progress | None = None
    ) -> ImageIndex:
        """The index of these images; those that it knows and that did not change are not encoded again.

        Raises:
            ImageError: no image is found, or none of them can be read.
        """
        size = BatchSize(batch_size, self.model.device)
        files = sorted(Path(os.path.abspath(path)) for path in image.find_images(paths))  # noqa: PTH100  (keeps links)
        stamps = {path: _stamp(path) for path in files}
        rows = {path: row for row, path in enumerate(self.stamps) if stamps.get(path) == self.stamps[path]}
        vectors = {path: self.vectors[row] for path, row in rows.items()}
        failed: list[Failure] = []
        if progress:
            progress(len(vectors), len(files))
        todo = [path for path in files if path not in vectors]

        def embed(squares: Tensor) -> Tensor:
            return self.model.embed_images(squares).float().cpu()  # (B, Q, E)

        with closing(each(embed, todo, self.model.transform, size)) as stream:
            for batch in stream:
                failed += [found for _, found in batch if isinstance(found, Failure)]
                vectors.update((path, found) for path, found in batch if not isinstance(found, Failure))
                if progress:
                    progress(len(vectors) + len(failed), len(files))
        if not vectors:
            raise ImageError(f"none of {len(files)} images can be read; the first: {failed[0].error}")
        found = [path for path in files if path in vectors]
        return ImageIndex(
            self.model,
            {path: stamps[path] for path in found},
            torch.stack([vectors[path] for path in found]),
            tuple(failed),
        )

    def search(self, query: Any, k: int = 10, *, rerank: int = 0) -> list[Hit]:
        """The images nearest to a query, best first; equal ones in the order of their paths.

        Args:
            query: a `str` is text, compared by the cosine of each image's best query (ITC); anything else that
                `image.open` takes is an image, compared by the mean cosine of the same queries of both.
            k: how many, all where the index has fewer.
            rerank: how many of the best to order anew by the matching head (ITM), for a text: they are opened and
                encoded again, and ordered by log-odds of a match plus cosine.
        Raises:
            ConfigError: k is below 1 or rerank below 0, or an image is to be re-ranked.
            ImageError: the query, or an image that is re-ranked, cannot be read.
        Source: BLIP-2, sections 3.1 (similarity) and 4.4 (re-ranking).
        """
        if k < 1 or rerank < 0:
            raise ConfigError(f"k is {k} and rerank {rerank}; they must be at least 1 and 0")
        if isinstance(query, str):
            scores = _rows_dot(self.vectors, self.model.embed_texts([query])[0]).amax(1)  # (N,)
        elif rerank:
            raise ConfigError("re-ranking compares images with a text; search by image with rerank=0")
        else:
            scores = _rows_dot(self.vectors, self.model.embed_images([image.open(query)])[0]).mean(1)  # (N,)
        order = scores.argsort(descending=True, stable=True)[: max(k, rerank)].tolist()
        paths = list(self.stamps)
        hits = [Hit(paths[row], float(scores[row])) for row in order]
        return (_reranked(self.model, query, hits[:rerank]) + hits[rerank:])[:k]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the index, whole or not at all.

        Raises:
            DataError: the file cannot be written.
        """
        entries = [[os.fspath(file), *stamp] for file, stamp in self.stamps.items()]
        about = {"format": FORMAT_VERSION, "model": self.model.identity, "images": entries}
        content = safetensors.torch.save({"vectors": self.vectors}, metadata={"index": json.dumps(about)})
        try:
            with replacing(Path(path)) as partial:
                partial.write_bytes(content)
        except OSError as error:
            raise DataError(f"{path}: the index cannot be written ({error.strerror})") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: Embedder) -> ImageIndex:
        """An index that `save` wrote.

        Raises:
            DataError: the file is missing, damaged, no index, or made by another model.
        """
        if not Path(path).is_file():
            raise DataError(f"{path}: no such index; build it first")
        try:
            with safetensors.safe_open(path, "pt") as file:
                about = json.loads((file.metadata() or {})["index"])
                vectors = file.get_tensor("vectors")
            form, identity = about["format"], about["model"]
            stamps = {Path(name): (int(size), int(time)) for name, size, time in about["images"]}
        except (safetensors.SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
            raise DataError(f"{path}: is no image index, or damaged ({error}); build it again") from error
        if form != FORMAT_VERSION:
            raise DataError(f"{path}: has format {form}, this version reads {FORMAT_VERSION}; build it again")
        if identity != model.identity:
            raise DataError(
                f"{path}: was made by another model, whose vectors mean nothing to this one; build it again"
            )
        if vectors.ndim != 3 or len(stamps) != len(vectors):
            raise DataError(f"{path}: has vectors {tuple(vectors.shape)} for {len(stamps)} images; build it again")
        return cls(model, stamps, vectors)


def folder_index(
    model: Embedder,
    folder: str | os.PathLike[str],
    *,
    cache: bool = True,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> ImageIndex:
    """The index of a folder as it is now, from the cache directory as far as that knows it.

    Args:
        cache: False neither reads nor writes there.
    Raises:
        ImageError: the folder has no readable image.
    """
    root = Path(folder).resolve()
    if not cache:
        return ImageIndex.build(model, [root], batch_size=batch_size, progress=progress)
    name = hashlib.sha256(f"{model.identity}\n{root}".encode()).hexdigest()
    path = cache_directory() / "indexes" / f"{name}.safetensors"
    try:
        known = ImageIndex.load(path, model)
    except DataError:  # none yet, or a damaged one, which is written anew
        known = ImageIndex(model, {}, torch.empty(0, 0, 0))
    index = known.update([root], batch_size=batch_size, progress=progress)
    if index.stamps != known.stamps:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            index.save(path)
        except (OSError, DataError) as error:
            _log.warning("the index of %s is not kept for next time: %s", folder, error)
    return index


def _stamp(path: Path) -> Stamp:
    try:
        status = path.stat()
    except OSError:  # a broken link: opening it will say so
        return -1, -1
    return status.st_size, status.st_mtime_ns


def _rows_dot(vectors: Tensor, other: Tensor) -> Tensor:
    """Cosines float32[N, Q] of float32[N, Q, E] with [E] or [Q, E]: row by row, so that equal images tie exactly."""
    other = other.float().cpu()
    parts = [(part * other).sum(-1) for part in vectors.split(BLOCK)]  # a matrix product would round rows differently
    return torch.cat(parts)


def _reranked(model: Embedder, text: str, hits: Sequence[Hit]) -> list[Hit]:
    """Hits in the order of ITM log-odds plus cosine, which is what retrieval is evaluated by."""
    judged: list[tuple[float, Hit]] = []
    for batch in batches(hits, BatchSize(RERANK_BATCH, model.device)):
        itm = model.match([image.open(hit.path) for hit in batch], [text]).itm[:, 0].double().cpu()  # (B,)
        odds = itm.logit(eps=1e-6)  # finite where a probability rounds to 0 or 1
        judged += [
            (o + hit.score, replace(hit, itm=p)) for o, p, hit in zip(odds.tolist(), itm.tolist(), batch, strict=True)
        ]
    return [hit for _, hit in sorted(judged, key=lambda pair: (-pair[0], pair[1].path))]
