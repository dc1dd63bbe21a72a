"""Zero-shot classification, measured: how often the right label stands first, or among the first five.

Letters: N images, L labels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from blip2.errors import DataError
from blip2.evaluate.estimate import Estimate, mean
from blip2.evaluate.ranking import Indices, ranks

DEPTHS = (1, 5)


def places(scores: NDArray[np.floating], labels: Sequence[str], truth: Sequence[str]) -> Indices:
    """int64[N]: where each image's own label stands, from 0; a tie counts against it.

    Args:
        scores: float[N, L].
        truth: of each image one of the labels.
    Raises:
        DataError: it is none of them.
    """
    column = {label: number for number, label in enumerate(labels)}
    unknown = next((label for label in truth if label not in column), None)
    if unknown is not None:
        raise DataError(f"{unknown!r} is none of the {len(labels)} labels to choose from")
    own = np.array([column[label] for label in truth])
    return ranks(scores, np.arange(len(labels))[None] == own[:, None])


def accuracy(places: Indices) -> dict[str, Estimate]:
    """`top-1` and `top-5`, with 95% intervals over images."""
    return {f"top-{depth}": mean(places < depth) for depth in DEPTHS}
