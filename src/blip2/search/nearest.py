"""What is compared with what, and the nearest images by comparing all of them.

The similarity of an image and a text is the cosine of the text and the nearest of the image's Q vectors; that of two
images is the mean over the Q-Former's queries of the cosine of the vectors that the same query gives of both, so it
is symmetrical, and 1 for an image and itself. A text with an image is the weighted mean of both.

Letters: N images, Q queries an image, E width of the image-text space.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

BLOCK = 64  # images compared exactly at once: their products stay in the processor's cache
SCANNED = 256  # images turned to float32 at once in a scan; measured, likewise
# Half precision rounds a unit vector and its length by 2**-11 at most: two scores of a scan may be off by twice that.
MARGIN = 2**-9


@dataclass(frozen=True)
class Query:
    """What to look for.

    Attributes:
        text: float32[E], unit length, or None.
        image: float32[Q, E], unit length, or None; one of both at least.
        weight: of the text where there are both.
    """

    text: Tensor | None
    image: Tensor | None
    weight: float = 0.5

    @property
    def parts(self) -> list[tuple[float, Tensor]]:
        """Weights and vectors; a text has one dimension, an image two."""
        if self.text is None or self.image is None:
            return [(1.0, part) for part in (self.text, self.image) if part is not None]
        return [(self.weight, self.text), (1 - self.weight, self.image)]


def rounded(vectors: Tensor) -> Tensor:
    """float32[..., E] of unit length, as they come back from half precision: an image equals its own entry."""
    return normalize(vectors.half().float(), dim=-1)


def scores(vectors: Tensor, query: Query) -> Tensor:
    """Similarities float32[N] of float16[N, Q, E]: row by row, so that equal images tie exactly."""
    found: list[Tensor] = []
    for block in vectors.split(BLOCK):
        rows = normalize(block.float(), dim=-1)  # (B, Q, E)
        cosines = [(weight, (rows * part).sum(-1), part.ndim) for weight, part in query.parts]  # (B, Q) each
        found.append(torch.stack([w * (c.amax(1) if ndim == 1 else c.mean(1)) for w, c, ndim in cosines]).sum(0))
    return torch.cat(found) if found else torch.empty(0)


def scan(vectors: Tensor, rows: NDArray[np.int64], query: Query) -> NDArray[np.float32]:
    """Similarities of some rows of float16[N, Q, E] to within half of `MARGIN`, fast: by matrix products."""
    found: list[Tensor] = []
    everything = len(rows) == len(vectors)
    for start in range(0, len(rows), SCANNED):
        some = slice(start, start + SCANNED)
        block = vectors[some if everything else torch.from_numpy(rows[some])].float()  # (B, Q, E)
        count, queries, width = block.shape
        parts: list[Tensor] = []
        for weight, part in query.parts:
            if part.ndim == 1:
                parts.append(weight * torch.mv(block.view(-1, width), part).view(count, queries).amax(1))
            else:
                parts.append(weight / queries * torch.mv(block.view(count, -1), part.reshape(-1)))
        found.append(torch.stack(parts).sum(0))
    return torch.cat(found).numpy() if found else np.empty(0, np.float32)


def best(approximate: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """Rows of a scan among which the k best are for certain, with all that may tie with them."""
    if len(approximate) <= k:
        return np.arange(len(approximate))
    last = np.partition(approximate, len(approximate) - k)[len(approximate) - k]
    return np.flatnonzero(approximate >= last - MARGIN)
