"""Candidates among very many images, by FAISS: inverted lists of 8-bit vectors, a vector of an image an entry.

A text is one vector, so the images that hold its nearest vectors are the nearest images; they are compared exactly
afterwards. An entry's number is `serial * Q + query`, which stays true while segments are merged.

Letters: N images, Q queries an image, E width of the image-text space.
"""

from __future__ import annotations

import logging
import math
import secrets
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from blip2.errors import DataError
from blip2.files import replacing
from blip2.search.nearest import Query
from blip2.search.store import Collection, Segment, Shortlist, Store

SCAN_LIMIT = 160_000  # vectors that are compared one by one within 20 ms: 5,000 images of 32, 10,000 of 16
CELLS_PER_ROOT = 2  # cells: so many times the square root of the number of vectors
TRAINING = 40  # vectors a cell that its place is learned from; FAISS asks for 39
PROBES = 32  # cells that are looked into for a text
GROWTH = 4  # cells are chosen anew when there are so many times the vectors
ADDED = 4096  # images in memory at once

_WITHOUT = 'all vectors are compared one by one; pip install "blip2[search]" makes it faster'

_log = logging.getLogger(__name__)


def faiss() -> Any | None:
    """The library, where it is installed."""
    try:
        import faiss as library
    except ImportError:
        return None
    return library


def renewed(store: Store, collection: Collection) -> Collection:
    """The collection with a shortlist that covers it, where it is large enough to need one; written.

    Raises:
        DataError: the disk is full or cannot be written.
    """
    vectors = _count(_beyond(collection.segments, 0))
    known = collection.shortlist
    if known is not None and not _is_whole(store.directory, known):
        known = None
    if vectors <= SCAN_LIMIT or _count(_beyond(collection.segments, known.upto if known else 0)) <= SCAN_LIMIT // 2:
        return collection
    library = faiss()
    if library is None:
        _log.warning("%s: %s", store.directory, _WITHOUT)
        return collection
    index = None
    if known is not None and vectors <= GROWTH * known.trained:
        index = opened(store.directory, known, mapped=False)
    if known is None or index is None:
        index, known = _trained(library, collection.segments, vectors), Shortlist("", 0, 0, vectors)
    _add(index, _beyond(collection.segments, known.upto))
    path = store.directory / f"{secrets.token_hex(8)}.faiss"
    try:
        with replacing(path) as partial:
            library.write_index(index, str(partial))
        shortlist = Shortlist(path.name, path.stat().st_size, collection.next_serial, known.trained)
    except (OSError, RuntimeError) as error:  # what faiss raises on a full disk
        raise DataError(f"{path}: cannot be written ({error}); make room, and run again") from error
    return store.write(replace(collection, shortlist=shortlist))


def opened(directory: Path, shortlist: Shortlist, *, mapped: bool = True) -> Any | None:
    """The FAISS index, read where it lies on the disk unless it is to grow; None, with a warning, where it cannot."""
    library = faiss()
    if library is None:
        _log.warning("%s: %s", directory, _WITHOUT)
        return None
    path = directory / shortlist.name
    try:
        if not _is_whole(directory, shortlist):
            raise RuntimeError("not as it was written")
        return library.read_index(str(path), library.IO_FLAG_MMAP if mapped else 0)
    except (OSError, RuntimeError) as error:
        _log.warning("%s: is missing or damaged (%s); all vectors are compared one by one", path, error)
        return None


def _is_whole(directory: Path, shortlist: Shortlist) -> bool:
    path = directory / shortlist.name
    return path.is_file() and path.stat().st_size == shortlist.size


def candidates(index: Any, query: Query, queries: int, wanted: NDArray[np.int64] | None, k: int) -> NDArray[np.int64]:
    """Serials of images near to a query, in no order; some k and more.

    Args:
        queries: vectors an image has.
        wanted: serials to choose from, all where None.
    """
    library: Any = faiss()
    selector = None
    if wanted is not None:
        bits = np.zeros((int(wanted[-1]) + 1 if len(wanted) else 0) * queries, bool)
        bits.reshape(-1, queries)[wanted] = True
        selector = library.IDSelectorBitmap(np.packbits(bits, bitorder="little"))
    found: list[NDArray[np.int64]] = []
    for _, part in query.parts:
        # Of a text's entries an image may take several places; an image is searched by Q vectors, none of them deeply.
        depth, probes = (max(256, 4 * k * queries), PROBES) if part.ndim == 1 else (max(128, 8 * k), PROBES // 4)
        parameters = library.SearchParametersIVF(nprobe=probes, sel=selector)
        found.append(index.search(np.atleast_2d(part.numpy()), depth, params=parameters)[1].reshape(-1))
    entries = np.concatenate(found)
    return np.unique(entries[entries >= 0] // queries)


def _trained(library: Any, segments: Sequence[Segment], vectors: int) -> Any:
    width = segments[0].vectors.shape[-1]
    cells = 2 ** round(math.log2(CELLS_PER_ROOT * math.sqrt(vectors)))
    index = library.IndexIVFScalarQuantizer(
        library.IndexFlatIP(width), width, cells,
        library.ScalarQuantizer.QT_8bit, library.METRIC_INNER_PRODUCT,
    )  # fmt: skip
    draw = np.random.default_rng(0)
    share = min(1.0, TRAINING * cells / vectors)
    sample = [
        segment.vectors.view(-1, width)[torch.from_numpy(draw.random(_count([(segment, segment.serials)])) < share)]
        for segment in segments
    ]
    index.train(np.concatenate([part.float().numpy() for part in sample]))
    return index


def _beyond(segments: Sequence[Segment], upto: int) -> list[tuple[Segment, NDArray[np.int64]]]:
    """Segments with the rows whose serials are not below `upto`."""
    found = [(segment, np.flatnonzero(segment.serials >= upto)) for segment in segments]
    return [(segment, rows) for segment, rows in found if len(rows)]


def _count(rest: Sequence[tuple[Segment, NDArray[np.int64]]]) -> int:
    """Vectors of all these rows."""
    return sum(len(rows) * segment.vectors.shape[1] for segment, rows in rest)


def _add(index: Any, rest: Sequence[tuple[Segment, NDArray[np.int64]]]) -> None:
    for segment, rows in rest:
        queries, width = segment.vectors.shape[1:]
        for some in np.array_split(rows, math.ceil(len(rows) / ADDED)):
            ids = segment.serials[some][:, None] * queries + np.arange(queries)
            index.add_with_ids(segment.vectors[some].float().numpy().reshape(-1, width), ids.reshape(-1))
