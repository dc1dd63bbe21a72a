"""Images found by words or by another image: an index in memory, or on the disk for good.

Letters: N images, Q queries an image, E width of the image-text space, P patches, D their width.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from blip2 import image
from blip2.batching import BatchSize, batches
from blip2.bulk import Failure
from blip2.errors import ConfigError, DataError, ImageError
from blip2.files import cache_directory
from blip2.protocols import Progress
from blip2.results import ImageFeatures
from blip2.search import nearest, shortlist, table, where
from blip2.search.duplicates import linked, similarities
from blip2.search.nearest import Query
from blip2.search.shortlist import Shortlists
from blip2.search.store import Collection, File, Segment, Store
from blip2.search.update import Embedder, Paths, refreshed

RERANK_BATCH = 8  # whole pictures in memory at once
DUPLICATE = 0.95  # similarity of an image and the same one at another size or quality, measured in docs/search.md

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Hit:
    """An image that was found.

    Attributes:
        score: similarity with the query, on -1..1, see `nearest`.
        itm: probability that image and text match, where the hit was re-ranked.
    """

    path: Path
    score: float
    itm: float | None = None


@dataclass(frozen=True)
class ImageIndex:
    """Images, ready to be searched; a value never changes, `update` gives a new one.

    Attributes:
        model: what made the vectors, and embeds the queries.
        collection: what the index holds.
        store: where it lies; None in memory.
    """

    model: Embedder
    collection: Collection
    store: Store | None = None

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def paths(self) -> list[Path]:
        """The images, in order."""
        return [Path(path) for path in sorted(self._files[row][0] for row in self._rows)]

    @property
    def failed(self) -> tuple[Failure, ...]:
        """Images that could not be read."""
        return self.collection.failed

    @classmethod
    def build(
        cls,
        model: Embedder,
        paths: Paths = (),
        out: str | os.PathLike[str] | None = None,
        *,
        patches: bool | None = None,
        name: str = "",
        batch_size: int = 16,
        progress: Progress | None = None,
    ) -> ImageIndex:
        """Encode files, folders and patterns, as `image.find_images` takes them.

        Args:
            out: the folder of the index. One that is there is brought up to date, and the paths are added to its own:
                images that are new or changed are encoded, those that are gone leave. Stop it however you like; the
                next call goes on. None keeps the index in memory.
            patches: keep the images' patches too, for re-ranking without the images (float16, P * D * 2 bytes each);
                None as the index does, no for a new one.
            name: what `blip2.load` takes to give the model, for whoever opens the index.
        Raises:
            ImageError: no image is found, or none of them can be read.
            DataError: the index is damaged, of another model or version, or cannot be written.
            ConfigError: the arguments do not fit together, or with the index.
        """
        fresh = Collection(model.identity, name, bool(patches))
        if out is None:
            return cls(model, fresh).update(paths, batch_size=batch_size, progress=progress)
        store = Store(Path(out))
        with store.alone():
            if not store.exists:
                store.write(fresh)
            collection = store.read(mend=True)
            _check_model(store, collection, model)
            if patches is not None and patches != collection.keeps_patches:
                kept = "keeps" if collection.keeps_patches else "does not keep"
                raise ConfigError(f"{out}: {kept} patches, which cannot be changed; make another index")
            return cls(model, collection, store)._updated(paths, batch_size, progress)

    @classmethod
    def open(cls, path: str | os.PathLike[str], model: Embedder) -> ImageIndex:
        """An index on the disk, as it is; nothing is written.

        Raises:
            DataError: it is missing, damaged, or of another model or version.
        """
        store = Store(Path(path))
        collection = store.read()
        _check_model(store, collection, model)
        return cls(model, collection, store)

    def update(self, paths: Paths = (), *, batch_size: int = 16, progress: Progress | None = None) -> ImageIndex:
        """The index of its paths and these as they are now; only what is new or changed is encoded.

        Of a folder that is not there at all (a disk that is not plugged in) the images stay.

        Raises:
            ImageError: no image is found, or none of them can be read.
            DataError: the index cannot be written.
        """
        if self.store is None:
            return self._updated(paths, batch_size, progress)
        return ImageIndex.build(self.model, paths, self.store.directory, batch_size=batch_size, progress=progress)

    def search(
        self,
        query: Any = None,
        k: int = 10,
        *,
        image: Any = None,
        weight: float = 0.5,
        rerank: int = 0,
        where: Sequence[str] = (),
        table: str | os.PathLike[str] | None = None,
    ) -> list[Hit]:
        """The images nearest to a query, best first; equal ones in the order of their paths.

        Args:
            query: a `str` is text, compared by the cosine of each image's best query (ITC); anything else that
                `image.open` takes is an image, compared by the mean cosine of the same queries of both.
            k: how many, all where the index has fewer.
            image: to look for beside a text: the weighted mean of both similarities counts.
            weight: of the text, against the image, on 0..1.
            rerank: how many of the best to order anew by the matching head (ITM), for a text: by log-odds of a match
                plus similarity, from the kept patches, or else from the images, which are opened again.
            where: conditions that all hold of what is found, see `where`.
            table: CSV, JSON Lines or Parquet with a column `path`, whose columns conditions may name.
        Raises:
            ConfigError: an argument is out of its range, or a condition is none.
            PromptError: the text is empty.
            ImageError: the query, or an image that is re-ranked, cannot be read.
            DataError: the table cannot be read.
        Source: BLIP-2, sections 3.1 (similarity) and 4.4 (re-ranking).
        """
        if k < 1 or rerank < 0 or not 0 <= weight <= 1:
            raise ConfigError(f"k is {k}, rerank {rerank}, weight {weight}; they must be at least 1 and 0, and in 0..1")
        text = query if isinstance(query, str) else None
        if text is None:
            if (query is None) == (image is None):
                raise ConfigError("search for a text, for an image, or for a text with image=")
            if rerank:
                raise ConfigError("re-ranking compares images with a text; search by image with rerank=0")
            image = query if image is None else image
        wanted = self._wanted(where, table)
        compared = self._query(text, image, weight)
        found = self._ranked(compared, self._nearest(compared, wanted, max(k, rerank)))[: max(k, rerank)]
        hits = [hit for hit, _ in found]
        if text is not None and rerank:
            hits = self._reranked(text, found[:rerank]) + hits[rerank:]
        return hits[:k]

    def duplicates(self, threshold: float = DUPLICATE, *, progress: Progress | None = None) -> list[list[Hit]]:
        """Groups of images that are nearly the same: they look alike, see `duplicates`, and mean the same.

        Args:
            threshold: least similarity of two images, see `nearest`; groups that share an image are one.
        Returns:
            Groups in the order of their first paths; a hit's score is its similarity with the first of its group.
        Raises:
            ConfigError: the threshold is not above 0 and at most 1.
        """
        if not 0 < threshold <= 1:
            raise ConfigError(f"the threshold is {threshold}; it must be above 0 and at most 1")
        rows = self._rows[np.argsort(np.array([self._files[row][0] for row in self._rows], object), kind="stable")]
        if not len(rows):
            return []

        def vectors(some: NDArray[np.int64]) -> Tensor:
            return self._vectors(rows[some])

        thumbnails = torch.cat([segment.thumbnails for segment in self.collection.segments])[torch.from_numpy(rows)]
        found: list[list[Hit]] = []
        for group in linked(thumbnails, vectors, threshold, progress):
            members = self._vectors(rows[group])
            scores = similarities(members, members[:1]).tolist()
            paths = (Path(self._files[row][0]) for row in rows[group])
            found.append([Hit(path, score) for path, score in zip(paths, scores, strict=True)])
        return found

    # -- rows: a number for each image of all segments in order, dead ones too -----------------------------------------

    @cached_property
    def _files(self) -> list[File]:
        return [file for segment in self.collection.segments for file in segment.files]

    @cached_property
    def _rows(self) -> NDArray[np.int64]:
        """Those that live."""
        parts = [~segment.dead for segment in self.collection.segments]
        return np.flatnonzero(np.concatenate(parts)) if parts else np.empty(0, np.int64)

    @cached_property
    def _serials(self) -> NDArray[np.int64]:
        return np.concatenate([segment.serials for segment in self.collection.segments])

    @cached_property
    def _ends(self) -> NDArray[np.int64]:
        return np.cumsum([len(segment) for segment in self.collection.segments])

    @cached_property
    def _shortlists(self) -> Shortlists | None:
        return Shortlists(self.store.directory, self.collection) if self.store else None

    def _places(self, rows: NDArray[np.int64]) -> Iterator[tuple[Segment, NDArray[np.bool_], NDArray[np.int64]]]:
        """Each segment that has some of the rows, which of them it has, and where it has them."""
        owners = np.searchsorted(self._ends, rows, side="right")
        for owner in np.unique(owners).tolist():
            segment, here = self.collection.segments[owner], owners == owner
            yield segment, here, rows[here] - int(self._ends[owner]) + len(segment)

    def _vectors(self, rows: NDArray[np.int64]) -> Tensor:
        """float16[R, Q, E]."""
        found = torch.empty(len(rows), *self.collection.segments[0].vectors.shape[1:], dtype=torch.float16)
        for segment, here, local in self._places(rows):
            found[torch.from_numpy(here)] = segment.vectors[torch.from_numpy(local)]
        return found

    def _patches(self, rows: NDArray[np.int64]) -> Tensor:
        """float16[R, P, D]."""
        parts = [
            (np.flatnonzero(here), segment.patches[torch.from_numpy(local)])
            for segment, here, local in self._places(rows)
            if segment.patches is not None
        ]
        order = np.argsort(np.concatenate([places for places, _ in parts]))
        return torch.cat([part for _, part in parts])[torch.from_numpy(order)]

    # -- finding -------------------------------------------------------------------------------------------------------

    def _query(self, text: str | None, picture: Any, weight: float) -> Query:
        words = seen = None
        if text is not None:
            words = self.model.embed_texts([text])[0].float().cpu()
            if cut := self.model.unread(text):
                _log.warning("the text is too long for the model: its last %d tokens are not read", cut)
        if picture is not None:
            seen = nearest.rounded(self.model.embed_images([image.open(picture)])[0].cpu())
        return Query(words, seen, weight)

    def _wanted(self, conditions: Sequence[str], source: str | os.PathLike[str] | None) -> NDArray[np.int64]:
        """Live rows that fulfil the conditions."""
        parsed = [where.parse(condition) for condition in conditions]
        if not parsed and source is None:
            return self._rows
        files = [self._files[row] for row in self._rows]
        known = {} if source is None else table.columns(source, [file[0] for file in files], self.collection.roots)
        return self._rows[where.selected(parsed, files, known)]

    def _nearest(self, query: Query, wanted: NDArray[np.int64], k: int) -> NDArray[np.int64]:
        """Rows among which are the k nearest of the wanted ones."""
        if len(wanted) <= k:
            return wanted
        queries, serials = self.collection.segments[0].vectors.shape[1], self._serials[wanted]
        known = self._shortlists if len(wanted) * queries > shortlist.SCAN_LIMIT else None
        found = known.near(query, queries, serials, k) if known else None
        if found is None:
            return self._scanned(query, wanted, k)
        near, upto = found
        rows = np.union1d(np.searchsorted(self._serials, near), wanted[serials >= upto])
        return self._scanned(query, rows if len(rows) >= k else wanted, k)

    def _scanned(self, query: Query, wanted: NDArray[np.int64], k: int) -> NDArray[np.int64]:
        """The same by comparing all of them."""
        values = np.empty(len(wanted), np.float32)
        for segment, here, local in self._places(wanted):
            values[here] = nearest.scan(segment.vectors, local, query)
        return wanted[nearest.best(values, k)]

    def _ranked(self, query: Query, rows: NDArray[np.int64]) -> list[tuple[Hit, int]]:
        """Hits of some rows and the rows, best first."""
        if not len(rows):
            return []
        scores: list[float] = nearest.scores(self._vectors(rows), query).tolist()
        found = sorted((-score, self._files[row][0], row) for score, row in zip(scores, rows.tolist(), strict=True))
        return [(Hit(Path(path), -score), row) for score, path, row in found]

    def _reranked(self, text: str, found: Sequence[tuple[Hit, int]]) -> list[Hit]:
        """Hits in the order of ITM log-odds plus similarity, which is what retrieval is evaluated by."""
        judged: list[tuple[float, Hit]] = []
        for batch in batches(found, BatchSize(RERANK_BATCH, self.model.device)):
            if self.collection.keeps_patches:
                places = np.array([row for _, row in batch])
                vectors = self._vectors(places).float()
                shown: Any = ImageFeatures(self._patches(places).float(), vectors[..., :0], vectors)
            else:
                shown = [image.open(hit.path) for hit, _ in batch]
            matches = self.model.match(shown, [text])  # (B, 1)
            judged += [
                (odds + hit.score, replace(hit, itm=itm))
                for odds, itm, (hit, _) in zip(
                    matches.odds[:, 0].tolist(), matches.itm[:, 0].tolist(), batch, strict=True
                )
            ]
        return [hit for _, hit in sorted(judged, key=lambda pair: (-pair[0], pair[1].path))]

    # -- keeping up ----------------------------------------------------------------------------------------------------

    def _updated(self, paths: Paths, batch_size: int, progress: Progress | None) -> ImageIndex:
        store = self.store
        collection = refreshed(self.model, self.collection, paths, store, batch_size, progress)
        if store is not None:
            collection = shortlist.renewed(store, collection)
        index = ImageIndex(self.model, collection, store)
        if not len(index):
            first = f"; the first: {index.failed[0].error}" if index.failed else ""
            raise ImageError(f"none of {len(index.failed)} images can be read{first}")
        return index


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
    place = cache_directory() / "indexes" / name
    store = Store(place)
    try:
        if store.exists:
            store.read(mend=True)
    except DataError:  # of another version, or damaged beyond mending: it can be made again
        shutil.rmtree(place, ignore_errors=True)
    try:
        return ImageIndex.build(model, [root], place, batch_size=batch_size, progress=progress)
    except DataError as error:
        _log.warning("the index of %s is not kept for next time: %s", folder, error)
    return ImageIndex.build(model, [root], batch_size=batch_size, progress=progress)


def _check_model(store: Store, collection: Collection, model: Embedder) -> None:
    if collection.identity != model.identity:
        made_by = f" ({collection.model})" if collection.model else ""
        raise DataError(
            f"{store.directory}: was made by another model{made_by}, whose vectors mean nothing to this one; "
            "use that model, or make another index"
        )
