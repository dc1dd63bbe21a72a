"""Sampling and beam sampling: transformers' distributions, and texts that come as often as they should.

First exactly: transformers' draws are noted and given to our methods, which must offer the same probabilities at every
step and end with the same texts. Then by counting: seeds are fixed, so that no count ever changes.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from scipy.stats import chi2
from torch import Tensor

from blip2.blip2 import Blip2
from blip2.generate import BeamSample, Limits, Sample, Tokens, beam, generate, schedule
from blip2.generate.sample import FORBIDDEN
from blip2.model import prefix
from published import config, loaded, opt, pictures, pixels, t5

DRAWS = 4000
SURE = 0.001  # a right sampler fails one such count in a thousand; with fixed seeds it is the same one for ever

METHODS: list[dict[str, Any]] = [
    {"temperature": 0.7, "max_new_tokens": 8},
    {"top_k": 5, "top_p": 0.95, "temperature": 1.5, "max_new_tokens": 8},
    {"temperature": 1.6, "top_p": 0.6, "max_new_tokens": 9, "min_new_tokens": 5, "no_repeat_ngram_size": 2},
    {"top_k": 12, "temperature": 1.3, "max_new_tokens": 7, "repetition_penalty": 1.7},
]


@pytest.fixture(scope="module", params=[opt, t5])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Blip2]:
    return loaded(config(request.param()), tmp_path_factory.mktemp("saved"))


def given(theirs: Any, ours: Blip2) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor]]:
    """One picture before an empty prompt, as theirs takes it (embeddings: penalties see what is written) and ours."""
    language, tokenizer = ours.writer()
    words = [tokenizer.end] if tokenizer.bos is None else [tokenizer.bos]
    ids = torch.tensor([[60] * 4 + words])
    embeds = theirs.get_input_embeddings()(ids)
    whole = {"pixel_values": pixels(ours, pictures(1)), "inputs_embeds": embeds, "attention_mask": torch.ones_like(ids)}
    visual = ours.bridge.project(ours.encode(pictures(1)).queries)
    return whole, prefix.build(language, visual, tokenizer.prompts([""]), tokenizer.bos, ours.config.prompts.visual)


def limits(options: dict[str, Any]) -> Limits:
    names = {"no_repeat_ngram_size": "no_repeat_ngram"}
    own = {names.get(key, key): value for key, value in options.items()}
    return Limits(**{key: value for key, value in own.items() if key in Limits.__dataclass_fields__})


def drawing(options: dict[str, Any]) -> dict[str, Any]:
    return {"top_k": 0, **{key: value for key, value in options.items() if key in Sample.__dataclass_fields__}}


def noted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor]]:
    """What transformers draws from, and what it draws, from here on."""
    draws: list[tuple[Tensor, Tensor]] = []
    original = torch.multinomial

    def multinomial(probabilities: Tensor, num_samples: int, **options: Any) -> Tensor:
        drawn = original(probabilities, num_samples, **options)
        draws.append((probabilities.detach().clone(), drawn))
        return drawn

    monkeypatch.setattr(torch, "multinomial", multinomial)
    return draws


def ids_of(row: list[int], skipped: int) -> tuple[int, ...]:
    tokens = row[skipped:]
    return tuple(tokens[: tokens.index(1)] if 1 in tokens else tokens)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("options", METHODS, ids=str)
@torch.no_grad()
def test_a_draw_is_from_the_distribution_of_transformers(
    pair: tuple[Any, Blip2], options: dict[str, Any], seed: int, monkeypatch: pytest.MonkeyPatch
):
    theirs, ours = pair
    whole, start = given(theirs, ours)
    draws = noted(monkeypatch)
    torch.manual_seed(seed)
    written = theirs.generate(**whole, do_sample=True, **{"top_k": 0, **options})
    replay: Iterator[tuple[Tensor, Tensor]] = iter(draws)

    def draw(probabilities: Tensor, _: Any) -> Tensor:
        expected, drawn = next(replay)
        torch.testing.assert_close(probabilities, expected, rtol=1e-4, atol=1e-6)
        return drawn[:, 0]

    monkeypatch.setattr(schedule, "draw", draw)
    language, tokenizer = ours.writer()
    [[text]] = generate(language, *start, Sample(**drawing(options)), limits(options), tokenizer.stop_ids)
    assert text.ids == ids_of(written[0].tolist(), len(written[0]) - len(draws))
    assert next(replay, None) is None


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("penalty", [-1.0, 1.0])
@pytest.mark.parametrize("options", METHODS, ids=str)
@torch.no_grad()
def test_beams_are_drawn_from_the_distribution_of_transformers(
    pair: tuple[Any, Blip2], options: dict[str, Any], penalty: float, seed: int, monkeypatch: pytest.MonkeyPatch
):
    theirs, ours = pair
    whole, start = given(theirs, ours)
    draws = noted(monkeypatch)
    torch.manual_seed(seed)
    found = theirs.generate(
        **whole, do_sample=True, num_beams=3, num_return_sequences=3, length_penalty=penalty, output_scores=True,
        return_dict_in_generate=True, **{"top_k": 0, **options},
    )  # fmt: skip
    replay = iter(draws)

    def draw(scores: Tensor, count: int, _: Any) -> tuple[Tensor, Tensor]:
        expected, drawn = next(replay)
        size = scores.shape[-1]  # the first step has one beam here, and two impossible ones beside it there
        torch.testing.assert_close(scores.softmax(-1), expected[:, :size], rtol=1e-4, atol=1e-6)
        assert not expected[:, size:].any()
        assert drawn.shape[1] == count
        impossible = expected.gather(1, drawn) == 0  # where fewer are possible than are drawn
        index = drawn.masked_fill(impossible, 0)
        return scores.gather(1, index).masked_fill(impossible, FORBIDDEN), index

    monkeypatch.setattr(beam, "draw_without_replacement", draw)
    language, tokenizer = ours.writer()
    method = BeamSample(width=3, length_penalty=penalty, **drawing(options))
    several = Limits(**{**vars(limits(options)), "captions": 3})
    [texts] = generate(language, *start, method, several, tokenizer.stop_ids)
    skipped = 1 if theirs.config.text_config.model_type == "t5" else 0
    assert [text.ids for text in texts] == [ids_of(row, skipped) for row in found.sequences.tolist()]
    assert [text.score for text in texts] == pytest.approx(found.sequences_scores.tolist(), abs=1e-4)
    assert next(replay, None) is None


def counted(texts: list[list[Tokens]]) -> Counter[tuple[int, ...]]:
    """Texts by what was drawn: the token that ends one among it."""
    return Counter((*text.ids, *([1] if text.finish == "stop" else [])) for [text] in texts)


def alike(counts: dict[Any, int], expected: dict[Any, float]) -> None:
    """A chi-square test of counts against expected ones; rare outcomes are taken together."""
    assert counts.keys() <= expected.keys()
    rare = {key for key, number in expected.items() if number < 5}
    groups = [[key] for key in expected if key not in rare] + ([list(rare)] if rare else [])
    pairs = [(sum(counts.get(key, 0) for key in group), sum(expected[key] for key in group)) for group in groups]
    statistic = sum((found - wanted) ** 2 / wanted for found, wanted in pairs)
    assert len(pairs) > 4
    assert statistic < chi2.isf(SURE, len(pairs) - 1)


@torch.no_grad()
def test_sampled_texts_come_as_often_as_their_probability_says(pair: tuple[Any, Blip2]):
    theirs, ours = pair
    whole, (embeds, lengths) = given(theirs, ours)
    options = {"top_k": 4, "temperature": 1.8, "max_new_tokens": 2}
    torch.manual_seed(3)
    seen = theirs.generate(
        **{key: value.expand(DRAWS, *value.shape[1:]) for key, value in whole.items()}, do_sample=True,
        output_scores=True, return_dict_in_generate=True, **options,
    )  # fmt: skip
    written = seen.sequences[:, -2:].tolist()
    first, second = (scores.softmax(-1) for scores in seen.scores)
    after = {row[0]: second[place] for place, row in enumerate(written)}
    expected: dict[tuple[int, ...], float] = {}
    for token, other in itertools.product(first[0].nonzero()[:, 0].tolist(), range(61)):
        if token == 1:
            expected[1,] = DRAWS * float(first[0, 1])
        elif after[token][other] > 0:
            expected[token, other] = DRAWS * float(first[0, token] * after[token][other])
    assert sum(expected.values()) == pytest.approx(DRAWS, rel=1e-5)
    alike(Counter((row[0],) if row[0] == 1 else tuple(row) for row in written), expected)  # the test's own check

    language, tokenizer = ours.writer()
    rows = embeds.expand(DRAWS, -1, -1), lengths.expand(DRAWS)
    method = Sample(temperature=1.8, top_k=4)
    found = generate(language, *rows, method, Limits(2), tokenizer.stop_ids, range(DRAWS))
    alike(counted(found), expected)


@torch.no_grad()
def test_texts_of_beam_sampling_come_as_often_as_those_of_transformers(pair: tuple[Any, Blip2]):
    theirs, ours = pair
    whole, (embeds, lengths) = given(theirs, ours)
    torch.manual_seed(4)
    several = {key: value.expand(DRAWS, *value.shape[1:]) for key, value in whole.items()}
    sequences = theirs.generate(**several, do_sample=True, num_beams=2, top_k=3, temperature=2.0, max_new_tokens=2)
    counts = Counter(ids_of(row, 0) for row in sequences[:, -2:].tolist())
    language, tokenizer = ours.writer()
    rows = embeds.expand(DRAWS, -1, -1), lengths.expand(DRAWS)
    method = BeamSample(width=2, temperature=2.0, top_k=3)
    found = generate(language, *rows, method, Limits(2), tokenizer.stop_ids, range(DRAWS))
    mine = Counter(text.ids for [text] in found)
    expected = {key: (counts[key] + mine[key]) / 2 for key in counts | mine}  # two samples of one distribution
    statistic = sum((mine[key] - number) ** 2 / number * 2 for key, number in expected.items() if number >= 5)
    assert len(expected) > 4
    assert statistic < chi2.isf(SURE, len(expected) - 1)
