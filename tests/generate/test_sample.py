from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blip2.generate.methods import Limits, Sample
from blip2.generate.sample import apply_limits, draw, draw_without_replacement, narrow, noise, top_p

VOCAB, STOP = 31, (1, 4)
INFINITY = float("inf")


def _scores(seed: int) -> torch.Tensor:
    return torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


@settings(deadline=None)
@given(
    seed=st.integers(0, 1000),
    length=st.integers(0, 9),
    penalty=st.sampled_from([0.7, 1.0, 1.5]),
    ngram=st.integers(0, 3),
    minimum=st.integers(0, 9),
)
def test_limits_are_those_of_transformers(seed: int, length: int, penalty: float, ngram: int, minimum: int) -> None:
    processors = pytest.importorskip("transformers.generation.logits_process")
    history = torch.randint(6, (4, length), generator=torch.Generator().manual_seed(seed))  # few tokens: repetitions
    expected = processors.RepetitionPenaltyLogitsProcessor(penalty)(history, _scores(seed))
    if ngram:
        expected = processors.NoRepeatNGramLogitsProcessor(ngram)(history, expected)
    expected = processors.MinNewTokensLengthLogitsProcessor(0, minimum, list(STOP))(history, expected)
    limits = Limits(30, minimum, penalty, ngram)
    assert torch.equal(apply_limits(_scores(seed), history, limits, STOP), expected)


@settings(deadline=None)
@given(
    seed=st.integers(0, 1000),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.integers(0, 40),
    top_p=st.sampled_from([0.01, 0.4, 0.9, 1.0]),
    keep=st.integers(1, 3),
)
def test_narrowing_is_that_of_transformers(seed: int, temperature: float, top_k: int, top_p: float, keep: int) -> None:
    processors = pytest.importorskip("transformers.generation.logits_process")
    expected = processors.TemperatureLogitsWarper(temperature)(None, _scores(seed))
    if top_k:
        expected = processors.TopKLogitsWarper(top_k, min_tokens_to_keep=keep)(None, expected)
    expected = processors.TopPLogitsWarper(top_p, min_tokens_to_keep=keep)(None, expected)
    assert torch.equal(narrow(_scores(seed), Sample(temperature, top_k, top_p), keep), expected)


def test_a_nucleus_larger_than_the_first_look_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = _scores(3) / 10  # nearly uniform
    expected = top_p(scores, 0.9)
    monkeypatch.setattr("blip2.generate.sample.FIRST_LOOK", 2)
    assert torch.equal(top_p(scores, 0.9), expected)
    assert (expected > -INFINITY).sum(-1).min() > 16


def test_the_scores_given_stay_as_they_are() -> None:
    scores, history = _scores(0), torch.tensor([[5, 6, 5]] * 4)
    apply_limits(scores, history, Limits(30, 9, 2.0, 2), STOP)
    narrow(scores, Sample(0.5, 3, 0.5))
    assert torch.equal(scores, _scores(0))


def test_a_draw_inverts_the_distribution_and_never_gives_an_impossible_token() -> None:
    probabilities = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]])
    found = [int(draw(probabilities, [uniform])) for uniform in (0.0, 0.2, 0.25, 0.7, 0.75, 1 - 2**-53)]
    assert found == [1, 1, 3, 3, 4, 4]


def test_without_replacement_each_candidate_comes_once_and_nothing_comes_from_nothing() -> None:
    scores = torch.full((1, 9), -INFINITY, dtype=torch.float64)
    scores[0, [2, 5, 7]] = torch.tensor([0.0, 1.0, -2.0], dtype=torch.float64)
    values, indices = draw_without_replacement(scores, 5, [random.Random(0)])
    assert sorted(indices[0, :3].tolist()) == [2, 5, 7]
    assert torch.equal(values[:, :3], scores.gather(1, indices[:, :3]))
    assert (values[0, 3:] == -INFINITY).all()


def test_without_replacement_the_order_has_the_right_odds() -> None:
    odds = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    count = 4000
    generators = [noise(seed) for seed in range(count)]
    _, indices = draw_without_replacement(odds.log().expand(count, 3), 2, generators)
    share = ((indices[:, 0] == 1) & (indices[:, 1] == 0)).double().mean().item()
    assert share == pytest.approx(0.3 * 0.5 / 0.7, abs=4 * (0.21 * 0.79 / count) ** 0.5)


def test_the_noise_of_a_seed_is_the_same_for_ever() -> None:
    assert [noise(7, 2).random() for _ in range(2)] == [noise(7, 2).random()] * 2
    assert noise(7).random() == 0.7014016190307873
