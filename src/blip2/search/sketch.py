"""Candidates for a picture or a text, by torch alone: what is left of images' vectors in their main directions.

The similarity of two images is the product of their vectors laid end to end, which a few directions keep almost whole;
that of a text, alone or beside a picture, is the largest of Q such products. So all images are compared at a
thirtieth of the cost.

Letters: N images, Q queries an image, E width of the image-text space, W directions, J products.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor

from blip2.search.nearest import Query
from blip2.search.store import Rest, Segment

DIRECTIONS = 128  # numbers an image; docs/search.md has what they find
SAMPLE = 2048  # images that the directions are learned from
DEPTH = 512  # candidates
BLOCK = 8192  # images that are multiplied at once; measured


class Sketch:
    """Images by their components; satisfies `shortlist.Candidates`.

    Args:
        directions: float32[Q * E, W], orthonormal.
        components: float16[N, W].
        serials: int64[N], growing.
    """

    suffix = ".safetensors"

    def __init__(self, directions: Tensor, components: Tensor, serials: Tensor) -> None:
        self._directions, self._components, self._serials = directions, components, serials

    @classmethod
    def learned(cls, segments: Sequence[Segment]) -> Sketch:
        draw = np.random.default_rng(0)
        share = min(1.0, SAMPLE / sum(map(len, segments)))
        parts = [part.vectors[torch.from_numpy(draw.random(len(part)) < share)] for part in segments]
        sample = torch.cat(parts).float().flatten(1)  # (N', Q * E)
        values, places = torch.linalg.eigh(sample @ sample.T)  # growing
        kept = (values > 1e-6 * values[-1]).nonzero()[-DIRECTIONS:, 0]  # fewer where images are of few kinds
        directions = sample.T @ places[:, kept] / values[kept].sqrt()  # (Q * E, W)
        return cls(directions, torch.empty(0, len(kept), dtype=torch.float16), torch.empty(0, dtype=torch.int64))

    @classmethod
    def read(cls, path: Path, *, mapped: bool) -> Sketch:
        del mapped  # it is either way, as it grows into another file
        tensors = safetensors.torch.load_file(path)
        directions, components, serials = (tensors[name] for name in ("directions", "components", "serials"))
        if (len(components), components.shape[1]) != (len(serials), directions.shape[1]):
            raise ValueError(f"{len(serials)} images, components {tuple(components.shape)}")
        return cls(directions, components, serials)

    def write(self, path: Path) -> None:
        tensors = {"directions": self._directions, "components": self._components, "serials": self._serials}
        safetensors.torch.save_file(tensors, path)

    def add(self, rest: Rest) -> None:
        components, serials = [self._components], [self._serials]
        for segment, rows in rest:
            for some in np.split(rows, range(BLOCK, len(rows), BLOCK)):
                vectors = segment.vectors[torch.from_numpy(some)].float().flatten(1)  # (B, Q * E)
                components.append((vectors @ self._directions).half())
            serials.append(torch.from_numpy(segment.serials[rows]))
        self._components, self._serials = torch.cat(components), torch.cat(serials)
        self.__dict__.pop("_plain", None)

    @cached_property
    def _plain(self) -> Tensor:
        """The components in float32, which every search would make of them anew."""
        return self._components.float()

    def near(self, query: Query, queries: int, wanted: NDArray[np.int64] | None, k: int) -> NDArray[np.int64]:
        asked = (_laid_out(query, queries) @ self._directions).T  # (W, J)
        found = torch.cat([(block @ asked).amax(1) for block in self._plain.split(BLOCK)])  # (N,)
        serials = self._serials
        if wanted is not None:
            rows = torch.searchsorted(serials, torch.from_numpy(wanted))
            found, serials = found[rows], serials[rows]
        return serials[found.topk(min(len(found), max(DEPTH, 8 * k)), sorted=False).indices].numpy()


def _laid_out(query: Query, queries: int) -> Tensor:
    """float32[J, Q * E]: an image's similarity is the largest of its products with these."""
    rows = torch.zeros(1, 1, 1)
    for weight, part in query.parts:
        each = torch.eye(queries)[..., None] if part.ndim == 1 else 1 / queries  # a text stands for any one vector
        rows = rows + weight * each * part  # (J, Q, E)
    return rows.flatten(1)
