"""Candidates for a text, by FAISS: inverted lists of 8-bit vectors, a vector of an image an entry.

A text is one vector, so the images that hold its nearest vectors are the nearest images. An entry's number is
`serial * Q + query`, which stays true while segments are merged.

Letters: Q queries an image, E width of the image-text space.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from blip2.errors import MissingExtraError
from blip2.search.nearest import Query
from blip2.search.store import Rest, Segment

CELLS_PER_ROOT = 2  # cells: so many times the square root of the number of vectors
TRAINING = 40  # vectors a cell that its place is learned from; FAISS asks for 39
PROBES = 16  # cells that are looked into; what lies in others, the sketch finds
ADDED = 4096  # images in memory at once


class Lists:
    """A FAISS index; satisfies `shortlist.Candidates`."""

    suffix = ".faiss"

    def __init__(self, index: Any) -> None:
        self._index = index

    @classmethod
    def learned(cls, segments: Sequence[Segment]) -> Lists:
        library = _faiss()
        width = segments[0].vectors.shape[-1]
        vectors = sum(segment.vectors[..., 0].numel() for segment in segments)
        cells = 2 ** round(math.log2(CELLS_PER_ROOT * math.sqrt(vectors)))
        index = library.IndexIVFScalarQuantizer(
            library.IndexFlatIP(width), width, cells,
            library.ScalarQuantizer.QT_8bit, library.METRIC_INNER_PRODUCT,
        )  # fmt: skip
        draw = np.random.default_rng(0)
        share = min(1.0, TRAINING * cells / vectors)
        each = [segment.vectors.view(-1, width) for segment in segments]
        sample = [part[torch.from_numpy(draw.random(len(part)) < share)] for part in each]
        index.train(np.concatenate([part.float().numpy() for part in sample]))
        return cls(index)

    @classmethod
    def read(cls, path: Path, *, mapped: bool) -> Lists:
        library = _faiss()
        return cls(library.read_index(str(path), library.IO_FLAG_MMAP if mapped else 0))

    def write(self, path: Path) -> None:
        _faiss().write_index(self._index, str(path))

    def add(self, rest: Rest) -> None:
        for segment, rows in rest:
            queries, width = segment.vectors.shape[1:]
            for some in np.split(rows, range(ADDED, len(rows), ADDED)):
                ids = segment.serials[some][:, None] * queries + np.arange(queries)
                self._index.add_with_ids(segment.vectors[some].float().numpy().reshape(-1, width), ids.reshape(-1))

    def near(self, query: Query, queries: int, wanted: NDArray[np.int64] | None, k: int) -> NDArray[np.int64]:
        library, selector = _faiss(), None
        if wanted is not None:
            bits = np.zeros((int(wanted[-1]) + 1 if len(wanted) else 0) * queries, bool)
            bits.reshape(-1, queries)[wanted] = True
            selector = library.IDSelectorBitmap(np.packbits(bits, bitorder="little"))
        depth = max(256, 2 * k * queries)  # an image may take several places
        parameters = library.SearchParametersIVF(nprobe=PROBES, sel=selector)
        assert query.text is not None
        entries = self._index.search(query.text[None].numpy(), depth, params=parameters)[1].reshape(-1)
        return np.unique(entries[entries >= 0] // queries)


def _faiss() -> Any:
    try:
        import faiss
    except ImportError:
        raise MissingExtraError("searching so many images fast", "search") from None
    return faiss
