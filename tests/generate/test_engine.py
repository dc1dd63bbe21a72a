from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from blip2.errors import ConfigError, PromptError
from blip2.generate import Beam, BeamSample, Greedy, Limits, Method, Sample, Tokens, generate, plain, stream
from blip2.protocols import LanguageModel

STOP = (1, 4)
METHODS: list[Method] = [
    Greedy(),
    Sample(temperature=0.8, top_k=9, top_p=0.9, seed=5),
    Beam(3),
    BeamSample(3, temperature=1.3, top_p=0.95, seed=5),
]


def _assert_same(ours: list[list[Tokens]], theirs: list[list[Tokens]]) -> None:
    for row, other in zip(ours, theirs, strict=True):
        for text, expected in zip(row, other, strict=True):
            assert (text.ids, text.finish) == (expected.ids, expected.finish)
            assert text.log_probs == pytest.approx(expected.log_probs, abs=1e-9)
            assert text.score == pytest.approx(expected.score, abs=1e-9)


@st.composite
def _requests(draw: Any) -> tuple[Method, Limits]:
    width = draw(st.integers(1, 4))
    beams = {
        "width": width,
        "length_penalty": draw(st.sampled_from([-1.0, 0.0, 0.7, 2.0])),
        "early_stopping": draw(st.sampled_from([False, True, "never"])),
    }
    chance = {
        "temperature": draw(st.sampled_from([0.5, 1.0, 2.0])),
        "top_k": draw(st.sampled_from([0, 1, 2, 7])),
        "top_p": draw(st.sampled_from([0.3, 0.8, 1.0])),
        "seed": draw(st.integers(0, 9)),
    }
    method = draw(st.sampled_from([Greedy(), Sample(**chance), Beam(**beams), BeamSample(**beams, **chance)]))
    captions = 1 if isinstance(method, Greedy) else width
    longest = draw(st.integers(1, 6))
    limits = Limits(
        max_new_tokens=longest,
        min_new_tokens=draw(st.integers(0, longest)),
        repetition_penalty=draw(st.sampled_from([0.8, 1.0, 1.7])),
        no_repeat_ngram=draw(st.integers(0, 3)),
        captions=draw(st.integers(1, captions)),
    )
    return method, limits


@settings(max_examples=80, deadline=None)
@given(
    request=_requests(),
    stop=st.sampled_from([(), (1,), STOP]),
    seed=st.integers(0, 99),
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=4),
)
def test_the_engine_gives_what_the_plain_path_gives(
    recurrent: Callable[[int], LanguageModel],
    request: tuple[Method, Limits],
    stop: tuple[int, ...],
    seed: int,
    lengths: list[int],
) -> None:
    language = recurrent(seed)
    prefix = torch.randn(len(lengths), 5, language.width, generator=torch.Generator().manual_seed(seed))
    arguments = (language, prefix, torch.tensor(lengths), *request, stop)
    _assert_same(generate(*arguments), plain.generate(*arguments))


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_batched_equals_unbatched_whatever_the_padding(
    language: LanguageModel, method: Method, prefix: Tensor, lengths: Tensor
) -> None:
    together = generate(language, prefix, lengths, method, Limits(12), STOP)
    alone = [
        generate(language, prefix[row : row + 1, :length], lengths[row : row + 1], method, Limits(12), STOP)[0]
        for row, length in enumerate(lengths.tolist())
    ]
    _assert_same(together, alone)
    assert len({text.ids for row in together for text in row}) > 1


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_finished_rows_leave_the_batch_and_one_prefill_serves_all(
    recurrent: Any, method: Method, prefix: Tensor, lengths: Tensor
) -> None:
    language = recurrent()
    rows = generate(language, prefix, lengths, method, Limits(12), STOP)
    assert language.prefills == 1
    assert language.rows_read == sorted(language.rows_read, reverse=True)
    assert language.rows_read[-1] < language.rows_read[0]
    assert {text.finish for row in rows for text in row} >= {"stop"}


def test_stop_tokens_end_a_text_and_are_not_in_it(language: LanguageModel, prefix: Tensor, lengths: Tensor) -> None:
    rows = generate(language, prefix, lengths, Sample(seed=1), Limits(12, captions=8), STOP)
    texts = [text for row in rows for text in row]
    assert {text.finish for text in texts} == {"stop", "length"}
    for text in texts:
        assert not set(text.ids) & set(STOP)
        assert len(text.log_probs) == len(text.ids) + (text.finish == "stop")
        assert (len(text.log_probs) == 12) or text.finish == "stop"
        assert text.score == pytest.approx(sum(text.log_probs) / len(text.log_probs))


def test_log_probs_are_those_of_teacher_forcing(language: LanguageModel, prefix: Tensor, lengths: Tensor) -> None:
    rows = generate(language, prefix, lengths, Sample(seed=3), Limits(5), stop_ids=())
    targets = torch.tensor([row[0].ids for row in rows])
    expected = language.log_probs(prefix, lengths, targets)
    assert torch.allclose(torch.tensor([row[0].log_probs for row in rows]), expected, atol=1e-5)


def test_captions_of_a_row_differ_and_the_first_does_not_depend_on_how_many(
    language: LanguageModel, prefix: Tensor, lengths: Tensor
) -> None:
    many = generate(language, prefix, lengths, Sample(seed=2), Limits(8, captions=4), STOP)
    one = generate(language, prefix, lengths, Sample(seed=2), Limits(8), STOP)
    _assert_same([row[:1] for row in many], one)
    assert all(len({text.ids for text in row}) > 1 for row in many)


def test_seeds_decide_the_sample(language: LanguageModel, prefix: Tensor, lengths: Tensor) -> None:
    def ids(method: Sample, seed: Any = None) -> list[list[tuple[int, ...]]]:
        rows = generate(language, prefix, lengths, method, Limits(8), STOP, seed)
        return [[text.ids for text in row] for row in rows]

    assert ids(Sample(seed=1)) == ids(Sample(seed=1)) == ids(Sample(seed=9), seed=1)
    assert ids(Sample(seed=1)) != ids(Sample(seed=2))
    assert ids(Sample(), [7, 1, 7, 7, 1])[1] == ids(Sample(seed=1))[1]
    torch.manual_seed(0)
    first = ids(Sample())
    assert ids(Sample()) != first
    torch.manual_seed(0)
    assert ids(Sample()) == first
    with pytest.raises(ConfigError, match="2 seeds for 5 rows"):
        ids(Sample(), [1, 2])


def test_sampling_follows_the_distribution(language: LanguageModel, prefix: Tensor, lengths: Tensor) -> None:
    count = 4000
    method = Sample(temperature=1.5, seed=0)
    rows = generate(language, prefix[:1], lengths[:1], method, Limits(1, captions=count), stop_ids=())
    drawn = torch.bincount(torch.tensor([text.ids[0] for text in rows[0]]), minlength=23) / count
    logits, _ = language.prefill(prefix[:1], lengths[:1])
    expected = (logits[0] / 1.5).softmax(-1)
    # Four standard deviations of a binomial share, for every one of 23 tokens.
    assert ((drawn - expected).abs() < 4 * (expected * (1 - expected) / count).sqrt() + 1e-3).all()


@pytest.mark.parametrize("method", [Greedy(), Sample(seed=4)], ids=repr)
def test_a_stream_gives_the_same_tokens_one_by_one(
    language: LanguageModel, method: Greedy | Sample, prefix: Tensor, lengths: Tensor
) -> None:
    whole = generate(language, prefix, lengths, method, Limits(9), STOP)
    steps = list(stream(language, prefix, lengths, method, Limits(9), STOP))
    assert len(steps) <= 9
    for row, texts in enumerate(whole):
        column = [step[row] for step in steps]
        assert tuple(token for token in column if token is not None) == texts[0].ids
        assert all(token is None for token in column[len(texts[0].ids) :])


def test_a_stream_speaks_before_the_text_is_finished(recurrent: Any, prefix: Tensor, lengths: Tensor) -> None:
    language = recurrent()
    steps = stream(language, prefix, lengths, Greedy(), Limits(9), stop_ids=())
    next(steps)
    assert language.rows_read == []
    assert torch.is_grad_enabled()


def test_what_does_not_fit_together_is_refused(language: LanguageModel, prefix: Tensor, lengths: Tensor) -> None:
    def run(method: Method, limits: Limits = Limits()) -> None:  # noqa: B008
        generate(language, prefix, lengths, method, limits, STOP)

    with pytest.raises(ConfigError, match="greedy decoding gives one caption, not 2"):
        run(Greedy(), Limits(captions=2))
    with pytest.raises(ConfigError, match="4 captions need as many beams, and there are 3"):
        run(Beam(3), Limits(captions=4))
    with pytest.raises(ConfigError, match="20 beams need a vocabulary of 60 tokens, not 23"):
        run(Beam(20))
    with pytest.raises(PromptError, match="6 positions and max_new_tokens is 195, but the language model holds 200"):
        run(Greedy(), Limits(195))
    with pytest.raises(ConfigError, match="beam search cannot stream"):
        stream(language, prefix, lengths, BeamSample(), Limits(), STOP)
    with pytest.raises(ConfigError, match="one caption"):
        stream(language, prefix, lengths, Sample(), Limits(captions=2), STOP)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sample(temperature=0), "temperature must be above 0, not 0: leave it out for greedy decoding"),
        (lambda: Sample(top_k=-1), "top_k"),
        (lambda: Sample(top_p=0), "top_p"),
        (lambda: BeamSample(top_p=1.5), "top_p"),
        (lambda: BeamSample(width=0), "width"),
        (lambda: Beam(0), "width"),
        (lambda: Limits(0), "max_new_tokens"),
        (lambda: Limits(5, min_new_tokens=6), "min_new_tokens"),
        (lambda: Limits(repetition_penalty=0), "repetition_penalty"),
        (lambda: Limits(no_repeat_ngram=-1), "no_repeat_ngram"),
        (lambda: Limits(captions=0), "captions"),
    ],
)
def test_a_wrong_value_is_named(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_no_rows_give_no_texts(language: LanguageModel, prefix: Tensor, lengths: Tensor) -> None:
    for method in METHODS:
        assert generate(language, prefix[:0], lengths[:0], method, Limits(), STOP) == []
