"""Calibrated probabilities: right where they were fitted, and in the order that the head put the pairs in."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from blip2.calibration import Calibration, fit
from blip2.errors import ConfigError, DataError

MANY = 20_000  # pairs: the standard error of a temperature is then about 0.02


def pairs(temperature: float, bias: float, count: int = MANY) -> tuple[Tensor, Tensor]:
    """Logits whose margin over `temperature`, plus `bias`, is the log-odds of a match."""
    random = torch.Generator().manual_seed(0)
    odds = torch.randn(count, generator=random) * 2
    matches = torch.rand(count, generator=random) < odds.sigmoid()
    margins = (odds - bias) * temperature
    return torch.stack([-0.3 * margins, 0.7 * margins], dim=1), matches


def test_a_head_that_is_right_already_keeps_its_temperature_and_needs_no_bias():
    logits, matches = pairs(1.0, 0.0)
    found = fit(logits, matches, base_rate=matches.float().mean().item())
    assert found.temperature == pytest.approx(1, abs=0.06)  # three standard errors
    assert found.bias == 0


@pytest.mark.parametrize(("temperature", "bias"), [(0.4, -1.5), (3.0, 0.7), (250.0, 2.0)])
def test_what_made_the_logits_wrong_is_found(temperature: float, bias: float):
    logits, matches = pairs(temperature, bias)
    found = fit(logits, matches, base_rate=matches.float().mean().item())
    assert found.temperature == pytest.approx(temperature, rel=0.06)
    assert found.bias == pytest.approx(bias, abs=0.1)
    right = logits.diff()[:, 0] / found.temperature + found.bias
    again = fit(torch.stack([torch.zeros(MANY), right], 1), matches, found.base_rate)
    assert (again.temperature, again.bias) == pytest.approx((1, 0), abs=1e-4)  # what was fitted is calibrated


@given(
    st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=20),
    st.floats(0.05, 50),
    st.floats(-5, 5),
)
def test_no_calibration_ever_changes_a_ranking(margins: list[float], temperature: float, bias: float):
    margin = torch.tensor(margins)
    found = Calibration(temperature, bias).probability(torch.stack([-margin, torch.zeros_like(margin)], dim=1))
    assert ((found >= 0) & (found <= 1)).all()
    order = margin.argsort()
    assert (found[order].diff() >= 0).all()


@settings(deadline=None, max_examples=20)
@given(st.floats(0.05, 0.95))
def test_another_base_rate_is_another_bias(base_rate: float):
    logits, matches = pairs(2.0, 1.0, 4000)
    half = fit(logits, matches)
    moved = half.at(base_rate)
    assert moved.base_rate == base_rate
    assert moved.bias - half.bias == pytest.approx(math.log(base_rate / (1 - base_rate)), abs=1e-9)
    assert moved.at(0.5).bias == pytest.approx(half.bias, abs=1e-9)
    weighed = fit(logits, matches, base_rate)
    assert weighed.bias == pytest.approx(moved.bias, abs=0.3)  # sampling: the worst of 0.05 to 0.95 is 0.13


def test_a_perfect_head_stays_finite():
    logits = torch.tensor([[3.0, -3.0], [-4.0, 4.0]]).repeat(50, 1)
    found = fit(logits, torch.tensor([False, True]).repeat(50))
    assert 0 < found.temperature < 100
    assert 0.9 < found.probability(logits)[1].item() < 1


@pytest.mark.parametrize(
    ("margins", "matches", "message"),
    [
        ([1.0, 2.0], [True, True], "2 pairs that match and 0 that do not"),
        ([1.0, float("nan")], [True, False], "no numbers"),
        ([0.0, 0.0], [True, False], "no numbers, or all nothing"),
        ([-3.0, -2.0, 2.0, 3.0] * 20, [True, True, False, False] * 20, "does not tell these pairs apart"),
    ],
)
def test_what_cannot_be_calibrated_is_said(margins: list[float], matches: list[bool], message: str):
    logits = torch.stack([torch.zeros(len(margins)), torch.tensor(margins)], dim=1)
    with pytest.raises(DataError, match=message):
        fit(logits, torch.tensor(matches))


@pytest.mark.parametrize(
    "values", [(0.0,), (-1.0,), (math.inf,), (math.nan,), (1.0, math.nan), (1.0, 0.0, 0.0), (1.0, 0.0, 1.0)]
)
def test_a_calibration_of_nothing_is_refused(values: tuple[float, ...]):
    with pytest.raises(ConfigError, match=r"temperature|base rate"):
        Calibration(*values)
