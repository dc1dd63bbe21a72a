"""Bootstrap intervals."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blip2.errors import DataError
from blip2.evaluate.estimate import Estimate, bootstrap, mean, ratio


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
@settings(max_examples=25, deadline=None)
def test_an_interval_lies_within_the_values_and_the_same_call_gives_it_again(values: list[float]) -> None:
    first = mean(values)
    assert first == mean(values)
    assert first.value == pytest.approx(np.mean(values))
    slack = 1e-9
    assert min(values) - slack <= first.low <= first.high <= max(values) + slack


def test_the_interval_of_a_share_is_the_binomial_one() -> None:
    hits = np.arange(1000) < 300
    estimate = mean(hits)
    deviation = np.sqrt(0.3 * 0.7 / 1000)
    # A percentile of 1,000 resamples is itself off by about 0.1 deviations.
    assert estimate.low == pytest.approx(0.3 - 1.96 * deviation, abs=0.3 * deviation)
    assert estimate.high == pytest.approx(0.3 + 1.96 * deviation, abs=0.3 * deviation)


def test_units_of_one_picture_are_drawn_together() -> None:
    apart = mean(np.repeat([0.0, 1.0], 500))
    together = ratio([0.0, 500.0], [500.0, 500.0])
    assert together.value == apart.value == 0.5
    assert (together.low, together.high) == (0.0, 1.0)
    assert apart.high - apart.low < 0.1


def test_nothing_to_resample_is_an_error() -> None:
    with pytest.raises(DataError, match="no samples"):
        bootstrap(lambda counts: counts.sum(axis=1), 0)


def test_an_estimate_reads_as_value_and_interval() -> None:
    assert str(Estimate(0.5, 0.25, 0.75)) == "0.500 (0.250 to 0.750)"
