"""A number and how sure it is: bootstrap intervals over images.

Letters: R resamples, N units that are drawn together (images, mostly).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from blip2.errors import DataError

Floats = NDArray[np.float64]

SEED = 0
RESAMPLES = 1000
_AT_ONCE = 100  # resamples held in memory together: 100 x 40,000 images of VQAv2 are 32 MB


@dataclass(frozen=True)
class Estimate:
    """A measured value and its 95% bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


def bootstrap(statistic: Callable[[Floats], Floats], units: int) -> Estimate:
    """Percentile bootstrap of a statistic that can be computed from how often each unit was drawn.

    The draws depend on the number of units alone, so statistics of one data set are resampled alike.

    Args:
        statistic: counts float[R, N] of each unit in each resample, to its value float[R] there.
        units: N.
    Raises:
        DataError: there are no units.
    Source: Efron 1979; Koehn 2004 for corpus-level metrics.
    """
    if units < 1:
        raise DataError("nothing to evaluate: no samples are left")
    random = np.random.default_rng(SEED)
    even = np.full(units, 1 / units)
    parts = [
        statistic(random.multinomial(units, even, size=_AT_ONCE).astype(np.float64))
        for _ in range(RESAMPLES // _AT_ONCE)
    ]
    low, high = np.quantile(np.concatenate(parts), [0.025, 0.975])
    return Estimate(float(statistic(np.ones((1, units)))[0]), float(low), float(high))


def ratio(numerators: ArrayLike, denominators: ArrayLike) -> Estimate:
    """A quotient of sums over units, such as hits over questions: both float[N], denominators above 0."""
    above, below = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
    return bootstrap(lambda counts: (counts @ above) / (counts @ below), len(above))


def mean(values: ArrayLike) -> Estimate:
    """A mean over units: float[N]."""
    above = np.asarray(values, dtype=np.float64)
    return ratio(above, np.ones_like(above))
