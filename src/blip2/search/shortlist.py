"""Candidates among very many images: files beside the segments that know about where each image is.

What is near to a picture, `sketch` finds; what is near to a text, `sketch` and `lists`, as one misses what the other
does not; the candidates are compared exactly afterwards.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Protocol, Self, TypeVar

import numpy as np
import safetensors
from numpy.typing import NDArray

from blip2.errors import DataError, MissingExtraError
from blip2.files import replacing
from blip2.search.lists import Lists
from blip2.search.nearest import Query
from blip2.search.sketch import Sketch
from blip2.search.store import Collection, Rest, Segment, Shortlist, Store

SCAN_LIMIT = 80_000  # vectors that are compared one by one within 20 ms: 2,500 images of 32, 5,000 of 16
GROWTH = 4  # what was learned from the vectors is learned anew when there are so many times as many

C = TypeVar("C", bound="Candidates")

_log = logging.getLogger(__name__)


class Candidates(Protocol):
    """Images, roughly: what a shortlist's file holds."""

    suffix: str

    @classmethod
    def learned(cls, segments: Sequence[Segment]) -> Self:
        """Without an image yet, fit for images like these."""
        ...

    @classmethod
    def read(cls, path: Path, *, mapped: bool) -> Self:
        """As it was written; where it lies on the disk, if it is not to grow."""
        ...

    def write(self, path: Path) -> None: ...

    def add(self, rest: Rest) -> None:
        """More images, by their serials, which are above those of all before them."""
        ...

    def near(self, query: Query, queries: int, wanted: NDArray[np.int64] | None, k: int) -> NDArray[np.int64]:
        """Serials of images near to a query, in no order; some k and more.

        Args:
            queries: vectors an image has.
            wanted: serials to choose from, all where None.
        """
        ...


def renewed(store: Store, collection: Collection) -> Collection:
    """The collection with shortlists that cover it, where it is large enough to need them; written.

    Raises:
        DataError: the disk is full or cannot be written.
    """
    made = replace(
        collection,
        shortlist=_renewed(store, collection, collection.shortlist, Lists),
        sketch=_renewed(store, collection, collection.sketch, Sketch),
    )
    return collection if made == collection else store.write(made)


def _renewed(store: Store, collection: Collection, known: Shortlist | None, kind: type[Candidates]) -> Shortlist | None:
    vectors = _count(_beyond(collection.segments, 0))
    if known is not None and not _is_whole(store.directory, known):
        known = None
    if vectors <= SCAN_LIMIT or _count(_beyond(collection.segments, known.upto if known else 0)) <= SCAN_LIMIT // 2:
        return known
    found = None
    if known is not None and vectors <= GROWTH * known.trained:
        found = opened(store.directory, known, kind, mapped=False)
    try:
        if known is None or found is None:
            found, known = kind.learned(collection.segments), Shortlist("", 0, 0, vectors)
    except MissingExtraError as error:
        _log.warning("%s: all vectors are compared one by one: %s", store.directory, error)
        return known
    found.add(_beyond(collection.segments, known.upto))
    path = store.directory / (secrets.token_hex(8) + kind.suffix)
    try:
        with replacing(path) as partial:
            found.write(partial)
        return Shortlist(path.name, path.stat().st_size, collection.next_serial, known.trained)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:  # of a full disk, by either library
        raise DataError(f"{path}: cannot be written ({error}); make room, and run again") from error


class Shortlists:
    """The shortlists of an index on the disk, each read when it is first asked."""

    def __init__(self, directory: Path, collection: Collection) -> None:
        self._directory, self._collection = directory, collection

    @cached_property
    def _lists(self) -> Lists | None:
        known = self._collection.shortlist
        return opened(self._directory, known, Lists) if known else None

    @cached_property
    def _sketch(self) -> Sketch | None:
        known = self._collection.sketch
        return opened(self._directory, known, Sketch) if known else None

    def near(
        self, query: Query, queries: int, wanted: NDArray[np.int64], k: int
    ) -> tuple[NDArray[np.int64], int] | None:
        """Serials of images near to a query, in no order, and from which serial on images are not known.

        Args:
            queries: vectors an image has.
            wanted: serials to choose from, growing.
        Returns:
            None where a shortlist that the query needs is not there.
        """
        asked: list[tuple[Shortlist | None, Candidates | None]] = [(self._collection.sketch, self._sketch)]
        if query.text is not None:
            asked.append((self._collection.shortlist, self._lists))
        there = [(known, each) for known, each in asked if known and each]
        if len(there) < len(asked):
            return None
        upto = min(known.upto for known, _ in there)
        inside = wanted[wanted < upto]
        found = [each.near(query, queries, None if len(inside) == known.upto else inside, k) for known, each in there]
        return np.unique(np.concatenate(found)), upto


def opened(directory: Path, shortlist: Shortlist, kind: type[C], *, mapped: bool = True) -> C | None:
    """What a shortlist holds; None, with a warning, where it cannot be read."""
    path = directory / shortlist.name
    try:
        if not _is_whole(directory, shortlist):
            raise ValueError("not as it was written")
        return kind.read(path, mapped=mapped)
    except MissingExtraError as error:
        _log.warning("%s: all vectors are compared one by one: %s", directory, error)
    except (OSError, RuntimeError, ValueError, LookupError, safetensors.SafetensorError) as error:
        _log.warning("%s: is missing or damaged (%s); all vectors are compared one by one", path, error)
    return None


def _is_whole(directory: Path, shortlist: Shortlist) -> bool:
    path = directory / shortlist.name
    return path.is_file() and path.stat().st_size == shortlist.size


def _beyond(segments: Sequence[Segment], upto: int) -> Rest:
    """Segments with the rows whose serials are not below `upto`."""
    found = [(segment, np.flatnonzero(segment.serials >= upto)) for segment in segments]
    return [(segment, rows) for segment, rows in found if len(rows)]


def _count(rest: Rest) -> int:
    """Vectors of all these rows."""
    return sum(len(rows) * segment.vectors.shape[1] for segment, rows in rest)
