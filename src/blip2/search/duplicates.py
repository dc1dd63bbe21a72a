"""Images that are nearly the same: they look alike, by tiny thumbnails, and mean the same, by their vectors.

Vectors alone do not tell a smaller copy from another picture of the scene, nor thumbnails a foggy field from another.

Letters: N images, Q queries an image, E width of the image-text space, T values of a thumbnail, B images of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from blip2.protocols import Progress

SIDE = 8  # pixels of a thumbnail
LEVELS = 15.0  # of 255, that thumbnails of near-duplicates differ by at most: root mean square, see docs/search.md
BLOCK = 512  # images that are compared with all others at once
PAIRS = 2048  # pairs whose vectors are compared at once

Rows = NDArray[np.int64]


def thumbnail(square: Tensor) -> Tensor:
    """An image, uint8[S, S, 3], as uint8[T]: the mean colours of 8 by 8 fields."""
    small = Image.fromarray(square.numpy()).resize((SIDE, SIDE), Image.Resampling.BOX)
    return torch.from_numpy(np.asarray(small).reshape(-1).copy())


def linked(
    thumbnails: Tensor,
    vectors: Callable[[Rows], Tensor],
    threshold: float,
    progress: Progress | None = None,
) -> list[list[int]]:
    """Groups of images each of which is nearly the same as another of its group; all pairs are compared.

    Args:
        thumbnails: uint8[N, T].
        vectors: gives float16[R, Q, E] of some of the images, unit length but for the rounding.
        threshold: least mean cosine of the vectors of the same queries.
    Returns:
        Rows in growing order, groups by their first.
    """
    parents = list(range(len(thumbnails)))
    for first, second in _pairs(thumbnails, vectors, threshold, progress):
        for one, other in zip(first.tolist(), second.tolist(), strict=True):
            low, high = sorted((_root(parents, one), _root(parents, other)))
            parents[high] = low
    groups: dict[int, list[int]] = {}
    for row in range(len(parents)):
        groups.setdefault(_root(parents, row), []).append(row)
    return [group for group in groups.values() if len(group) > 1]


def similarities(one: Tensor, others: Tensor) -> Tensor:
    """Mean cosines float32[R] of the same queries of float16[R, Q, E] and of as many, or one."""
    return (normalize(one.float(), dim=-1) * normalize(others.float(), dim=-1)).sum(-1).mean(-1)


def _pairs(
    thumbnails: Tensor,
    vectors: Callable[[Rows], Tensor],
    threshold: float,
    progress: Progress | None,
) -> Iterator[tuple[Rows, Rows]]:
    """Pairs that look alike and mean the same."""
    count = len(thumbnails)
    seen = thumbnails.float() - 128  # (N, T); whole numbers, whose sums stay below 2**24, are exact
    lengths = seen.square().sum(1)  # (N,)
    furthest = LEVELS**2 * seen.shape[1]
    for start in range(0, count, BLOCK):
        if progress:
            progress(start, count)
        block = slice(start, start + BLOCK)
        dots = seen[block] @ seen[start:].T  # (B, N - start)
        apart = lengths[block, None] + lengths[None, start:] - 2 * dots
        near = (apart <= furthest).triu(1).nonzero().numpy() + start  # each pair once
        for part in np.array_split(near, max(1, -(-len(near) // PAIRS))):
            first, second = part[:, 0], part[:, 1]
            alike = (similarities(vectors(first), vectors(second)) >= threshold).numpy()
            yield first[alike], second[alike]
    if progress:
        progress(count, count)


def _root(parents: list[int], row: int) -> int:
    while parents[row] != row:
        parents[row] = parents[parents[row]]
        row = parents[row]
    return row
