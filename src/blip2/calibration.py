"""Probabilities of matching that mean what they say: the matching head's logits, scaled and shifted (ITM).

A probability has a meaning only beside how many of the pairs match at all. The head learns on one partner and two hard
strangers, and knows no other share; a calibration is fitted for a share that it names, its base rate.
Letters: K pairs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from blip2.config import Strict
from blip2.errors import ConfigError, DataError

BASE_RATE = 0.5  # a text is as likely of this picture as of another one


@dataclass(frozen=True)
class Calibration(Strict):
    """From the head's logits to a probability, which never changes which of two pairs fits better.

    Attributes:
        temperature: the logit of matching over not matching is divided by it; above 1 the head was too sure.
        bias: added to that.
        base_rate: share of the pairs that match, among which the probabilities are right.
    """

    temperature: float
    bias: float = 0.0
    base_rate: float = BASE_RATE

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature > 0 and math.isfinite(self.bias)):
            raise ConfigError(f"a temperature is above 0 and a bias finite, not {self.temperature} and {self.bias}")
        check_base_rate(self.base_rate)

    def probability(self, logits: Tensor) -> Tensor:
        """float[..., 2], (no match, match), to float32[...]."""
        margin = (logits[..., 1] - logits[..., 0]).float()
        return torch.sigmoid(margin / self.temperature + self.bias)

    def at(self, base_rate: float) -> Calibration:
        """The same evidence where another share of the pairs matches.

        Raises:
            ConfigError: the share is not between 0 and 1.
        Source: Bayes' rule; Saerens et al. 2002.
        """
        shift = _odds(check_base_rate(base_rate)) - _odds(self.base_rate)
        return Calibration(self.temperature, self.bias + shift, base_rate)


def check_base_rate(base_rate: float) -> float:
    """The share itself.

    Raises:
        ConfigError: nothing, everything or an impossible share would match.
    """
    if not 0 < base_rate < 1:
        raise ConfigError(f"a base rate is a share of pairs, between 0 and 1, not {base_rate}")
    return base_rate


def weights_of(matches: Tensor, base_rate: float) -> Tensor:
    """float64[K], adding up to 1, with which the base rate of the pairs weighs matches.

    Raises:
        DataError: pairs of one kind only.
    """
    kinds = int(matches.sum()), int((~matches).sum())
    if not all(kinds):
        raise DataError(f"{kinds[0]} pairs that match and {kinds[1]} that do not: both kinds are needed")
    each = torch.tensor([(1 - base_rate) / kinds[1], base_rate / kinds[0]], dtype=torch.float64)
    return each[matches.long()]


def fit(logits: Tensor, matches: Tensor, base_rate: float = BASE_RATE) -> Calibration:
    """The likeliest temperature, and bias where it earns its place, of pairs that no training has seen.

    The bias stays where it gains more likelihood than a parameter is worth by Schwarz's criterion (BIC).

    Args:
        logits: float[K, 2], of (no match, match).
        matches: bool[K].
        base_rate: share of matches that the pairs are weighed to.
    Raises:
        ConfigError: the base rate is no share.
        DataError: pairs of one kind only, a logit that is no number, or a head that does not tell pairs apart.
    Source: Platt 1999 (his targets keep a perfect head finite); Guo et al. 2017.
    """
    weights = weights_of(matches, check_base_rate(base_rate))
    margins = (logits[:, 1] - logits[:, 0]).double()
    size = margins.square().mean().sqrt()
    if not (torch.isfinite(size) and size > 0):
        raise DataError("the matching head's logits are no numbers, or all nothing: the model is broken")
    yes, no = int(matches.sum()), int((~matches).sum())
    targets = torch.where(matches, (yes + 1) / (yes + 2), 1 / (no + 2)).double()
    found = [_likeliest(margins / size, targets, weights, bias=bias) for bias in (False, True)]
    gain = 2 * len(margins) * (found[0][2] - found[1][2])
    scale, bias, _ = found[gain > math.log(len(margins))]
    if scale <= 0:
        raise DataError("the matching head does not tell these pairs apart: train it, there is nothing to calibrate")
    return Calibration(float(size) / scale, bias, base_rate)


def _likeliest(margins: Tensor, targets: Tensor, weights: Tensor, *, bias: bool) -> tuple[float, float, float]:
    """Scale, bias and mean negative log-likelihood there: a convex problem, so where it starts does not matter."""
    values = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    free = torch.tensor([1.0, float(bias)], dtype=torch.float64)
    optimizer = torch.optim.LBFGS([values], max_iter=200, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        scale, shift = values * free
        each = F.binary_cross_entropy_with_logits(margins * scale + shift, targets, reduction="none")
        found = (weights * each).sum()
        found.backward()
        return found

    with torch.enable_grad():
        optimizer.step(loss)
        lowest = loss().item()
    scale, shift = (values.detach() * free).tolist()
    return scale, shift, lowest


def _odds(share: float) -> float:
    return math.log(share / (1 - share))
