"""Images that are nearly the same.

Letters: N images, Q queries an image, E width of the image-text space, S width of the sketches, B images of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

SKETCH = 256  # numbers that stand for the Q * E of an image at first
# Squared distances of sketches spread by sqrt(2 / 256) = 9 % around the true ones: five times that misses one pair
# in three million.
SLACK = 1.45
BLOCK = 512  # images that are compared with all others at once
PAIRS = 2048  # pairs that are compared exactly at once


def linked(
    gathered: Callable[[NDArray[np.int64]], Tensor],
    count: int,
    threshold: float,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """Groups of images each of which is at least so similar to another of its group.

    All pairs are compared by random projections, and those that may be similar enough exactly.

    Args:
        gathered: float16[R, Q, E] of some of the images, unit length but for the rounding.
        count: of images.
        threshold: mean cosine of the vectors of the same queries.
    Returns:
        Rows in growing order, groups by their first.
    """
    parents = list(range(count))
    for first, second in _pairs(gathered, count, threshold, progress):
        for one, other in zip(first.tolist(), second.tolist(), strict=True):
            low, high = sorted((_root(parents, one), _root(parents, other)))
            parents[high] = low
    groups: dict[int, list[int]] = {}
    for row in range(count):
        groups.setdefault(_root(parents, row), []).append(row)
    return [group for group in groups.values() if len(group) > 1]


def similarities(one: Tensor, others: Tensor) -> Tensor:
    """Mean cosines float32[R] of the same queries of float16[R, Q, E] and of as many, or one."""
    return (normalize(one.float(), dim=-1) * normalize(others.float(), dim=-1)).sum(-1).mean(-1)


def _pairs(
    gathered: Callable[[NDArray[np.int64]], Tensor],
    count: int,
    threshold: float,
    progress: Callable[[int, int], None] | None,
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Pairs that are similar enough."""
    sketches = _sketches(gathered, count)  # (N, S)
    lengths = sketches.square().sum(1)  # (N,)
    furthest = SLACK * 2 * (1 - threshold) + 1e-3  # squared; rounding of equal ones
    for start in range(0, count, BLOCK):
        if progress:
            progress(start, count)
        block = slice(start, start + BLOCK)
        apart = (
            lengths[block, None] + lengths[None, start:] - 2 * sketches[block] @ sketches[start:].T
        )  # (B, N - start)
        near = (apart <= furthest).triu(1).nonzero().numpy() + start  # each pair once
        for part in np.array_split(near, max(1, -(-len(near) // PAIRS))):
            first, second = part[:, 0], part[:, 1]
            alike = (similarities(gathered(first), gathered(second)) >= threshold).numpy()
            yield first[alike], second[alike]
    if progress:
        progress(count, count)


def _sketches(gathered: Callable[[NDArray[np.int64]], Tensor], count: int) -> Tensor:
    """Random projections float32[N, S]: distances as of the images' vectors one after another, divided by sqrt(Q)."""
    parts: list[Tensor] = []
    projection = torch.empty(0)
    for start in range(0, count, BLOCK):
        vectors = normalize(gathered(np.arange(start, min(start + BLOCK, count))).float(), dim=-1)  # (B, Q, E)
        flat = vectors.flatten(1) / vectors.shape[1] ** 0.5
        if not len(projection):
            draw = torch.Generator().manual_seed(0)
            projection = torch.randn(flat.shape[1], SKETCH, generator=draw) / SKETCH**0.5
        parts.append(flat @ projection)
    return torch.cat(parts) if parts else torch.empty(0, SKETCH)


def _root(parents: list[int], row: int) -> int:
    while parents[row] != row:
        parents[row] = parents[parents[row]]
        row = parents[row]
    return row
