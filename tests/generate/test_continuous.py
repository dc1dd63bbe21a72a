"""Finished texts leave, waiting prompts join: the tokens are those of the plain path whatever the neighbours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from blip2.adapters.transformers_lm import TransformersLM
from blip2.config import GemmaConfig, OPTConfig, T5Config
from blip2.generate import Beam, BeamSample, Greedy, Limits, Method, Sample, Tokens, generate, plain
from blip2.model.gemma import Gemma
from blip2.model.opt import OPT
from blip2.model.t5 import T5
from blip2.protocols import LanguageModel

VOCAB, WIDTH = 23, 16
SIZES: dict[str, Any] = {"width": WIDTH, "layers": 2, "heads": 2, "mlp_width": 24, "vocab_size": VOCAB}
METHODS: list[Method] = [
    Greedy(),
    Sample(temperature=0.8, top_k=9, top_p=0.9, seed=5),
    Beam(3),
    Beam(2, length_penalty=0.0, early_stopping=True),
    BeamSample(2, temperature=1.3, top_p=0.95, seed=5),
]


def _opt() -> nn.Module:
    return OPT(OPTConfig(context=64, **SIZES))


def _gemma() -> nn.Module:
    return Gemma(GemmaConfig(context=64, key_heads=1, head_width=8, query_scale=8, window=4, global_every=2, **SIZES))


def _t5() -> nn.Module:
    return T5(T5Config(head_width=8, buckets=8, max_distance=7, **SIZES))


def _theirs() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=WIDTH, n_layer=2, n_head=2, pad_token_id=0, bos_token_id=2, eos_token_id=1
    )
    return TransformersLM(transformers.GPT2LMHeadModel(config).eval())


@pytest.fixture(scope="module", params=[_opt, _gemma, _t5, _theirs], ids=["opt", "gemma", "t5", "transformers"])
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(4)
    made = request.param().double()
    with torch.no_grad():
        for parameter in made.parameters():  # texts that differ, and none that two rows write at a near-tie
            parameter.copy_(torch.randn_like(parameter) * (0.5 if parameter.ndim > 1 else 0.2))
    return made


def _prompts(lengths: list[int], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(lengths), max(lengths), WIDTH, generator=generator).double(), torch.tensor(lengths)


def _assert_same(ours: list[list[Tokens]], theirs: list[list[Tokens]]) -> None:
    for row, other in zip(ours, theirs, strict=True):
        for text, expected in zip(row, other, strict=True):
            assert (text.ids, text.finish) == (expected.ids, expected.finish)
            # T5's and Gemma's norms and angles are in float32 whatever the model: 1e-6 seen
            assert text.log_probs == pytest.approx(expected.log_probs, abs=1e-4)


@settings(max_examples=15, deadline=None)
@given(
    method=st.sampled_from(METHODS),
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=7),
    capacity=st.integers(1, 4),
    longest=st.integers(1, 7),
    stop=st.sampled_from([(), (1,), (1, 4, 9, 12)]),
    seed=st.integers(0, 99),
)
def test_tokens_are_those_of_the_plain_path_whatever_joined_or_left(
    model: LanguageModel,
    method: Method,
    lengths: list[int],
    capacity: int,
    longest: int,
    stop: tuple[int, ...],
    seed: int,
) -> None:
    prefix, real = _prompts(lengths, seed)
    captions = 1 if isinstance(method, Greedy) else 2
    arguments = (model, prefix, real, method, Limits(longest, captions=captions), stop)
    _assert_same(generate(*arguments, capacity=capacity), plain.generate(*arguments))


@settings(max_examples=40, deadline=None)
@given(
    method=st.sampled_from(METHODS),
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=12),
    capacity=st.integers(1, 12),
    seed=st.integers(0, 99),
)
def test_a_model_of_any_kind_joins_rows(
    recurrent: Callable[[int], LanguageModel], method: Method, lengths: list[int], capacity: int, seed: int
) -> None:
    language = recurrent(seed)
    prefix = torch.randn(len(lengths), 6, language.width, generator=torch.Generator().manual_seed(seed))
    arguments = (language, prefix, torch.tensor(lengths), method, Limits(8), (1, 4))
    _assert_same(generate(*arguments, capacity=capacity), plain.generate(*arguments))


def test_waiting_prompts_take_the_places_of_finished_ones(recurrent: Any) -> None:
    language = recurrent()
    prefix = torch.randn(24, 6, language.width, generator=torch.Generator().manual_seed(1))
    rows = generate(language, prefix, torch.full((24,), 6), Greedy(), Limits(12), (1, 4), capacity=8)
    steps = len(language.rows_read)
    alone = sum(max(len(text.log_probs) for row in rows[start : start + 8] for text in row) for start in (0, 8, 16))
    assert max(language.rows_read) <= 8
    assert sum(language.rows_read) == sum(len(row[0].log_probs) - 1 for row in rows)
    assert steps < alone - 3  # as many steps as three batches one after the other would take
    assert 3 < language.prefills < 24


@pytest.mark.parametrize("kind", ["gemma3", "t5"])
def test_a_cache_that_takes_no_rows_in_is_stepped_to_its_end(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    ids: dict[str, Any] = {"vocab_size": VOCAB, "pad_token_id": 0, "eos_token_id": 1}
    torch.manual_seed(4)
    if kind == "gemma3":
        shape: dict[str, Any] = {"hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 8}
        config = transformers.Gemma3TextConfig(
            num_attention_heads=2, num_key_value_heads=1, sliding_window=4,
            layer_types=["sliding_attention", "full_attention"], bos_token_id=2, **shape, **ids,
        )  # fmt: skip
        made = transformers.Gemma3ForCausalLM(config)
    else:
        shape = {"d_model": WIDTH, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
        made = transformers.T5ForConditionalGeneration(
            transformers.T5Config(decoder_start_token_id=0, tie_word_embeddings=False, **shape, **ids)
        )
    model = TransformersLM(made.double().eval())
    prefix, lengths = _prompts([3, 1, 4, 2, 5], 8)
    assert not model.prefill(prefix, lengths)[1].joins
    arguments = (model, prefix, lengths, Beam(2), Limits(5), (1,))
    _assert_same(generate(*arguments, capacity=2), plain.generate(*arguments))


def test_long_prompts_are_read_together(recurrent: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    language = recurrent()
    sizes: list[list[int]] = []
    whole = language.prefill
    monkeypatch.setattr(language, "prefill", lambda prefix, real: sizes.append(real.tolist()) or whole(prefix, real))
    prefix = torch.randn(6, 6, language.width)
    generate(language, prefix, torch.tensor([1, 6, 2, 5, 1, 6]), Greedy(), Limits(3), (), capacity=2)
    assert sizes == [[6, 6], [5, 2], [1, 1]]
