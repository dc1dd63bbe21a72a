"""Tiny random models of transformers, weights scaled up so that logits are well separated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from blip2.adapters.transformers_lm import Reading, TransformersLM
from blip2.errors import ConfigError, PromptError
from blip2.protocols import LanguageModel

transformers = pytest.importorskip("transformers")

VOCAB = 61
SMALL: dict[str, Any] = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1}
LLAMA_SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def _gpt2() -> Any:
    config = transformers.GPT2Config(n_embd=32, n_layer=3, n_head=4, n_positions=64, **SMALL)
    return transformers.GPT2LMHeadModel(config)


def _opt() -> Any:
    config = transformers.OPTConfig(
        hidden_size=32,
        word_embed_proj_dim=24,
        ffn_dim=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
        **SMALL,
    )
    return transformers.OPTForCausalLM(config)


def _llama() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA_SHAPE, **SMALL))


def _gemma3() -> Any:
    config = transformers.Gemma3TextConfig(
        **LLAMA_SHAPE,
        **SMALL,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        final_logit_softcapping=5.0,
    )
    return transformers.Gemma3ForCausalLM(config)


def _bloom() -> Any:
    return transformers.BloomForCausalLM(transformers.BloomConfig(hidden_size=32, n_layer=3, n_head=4, **SMALL))


def _t5(**changes: Any) -> Any:
    config = transformers.T5Config(
        d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0, **changes, **SMALL
    )
    return transformers.T5ForConditionalGeneration(config)


def _flan_t5() -> Any:
    return _t5(feed_forward_proj="gated-gelu", tie_word_embeddings=False)


MAKERS = {
    "gpt2": _gpt2,
    "opt": _opt,
    "llama": _llama,
    "gemma3": _gemma3,
    "bloom": _bloom,
    "t5": _t5,
    "flan-t5": _flan_t5,
}


def _separate(model: Any) -> Any:
    """Larger weights than at initialisation, so that every part of the model matters to the result."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


@pytest.fixture(scope="module", params=list(MAKERS))
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    return _separate(MAKERS[request.param]())


@pytest.fixture(scope="module")
def language(model: Any) -> TransformersLM:
    return TransformersLM(model)


LENGTHS = torch.tensor([7, 3, 9, 1])


def _prefix(width: int, size: int = 9, fill: float = 50.0) -> Tensor:
    """Ragged rows whose padding holds large numbers, so that a leak is seen."""
    prefix = torch.randn(len(LENGTHS), size, width, generator=torch.Generator().manual_seed(1))
    return prefix.masked_fill(torch.arange(size)[None, :, None] >= LENGTHS[:, None, None], fill)


TARGETS = torch.tensor([[5, 9, 11, 1], [4, 1, -100, -100], [60, 1, -100, -100], [7, 8, 1, -100]])


def _close(ours: Tensor, theirs: Tensor) -> None:
    # float32 sums in another order: the worst seen over all families here is 6e-6 of the largest logit.
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * max(1.0, theirs.abs().max().item()))


def _full_logits(model: Any, prefix: Tensor, ids: list[int]) -> Tensor:
    """What transformers itself gives for one unpadded row after reading these ids: float[V]."""
    if model.config.is_encoder_decoder:
        start = torch.tensor([[model.config.decoder_start_token_id, *ids]])
        return model(inputs_embeds=prefix, decoder_input_ids=start).logits[0, -1]
    words = model.get_input_embeddings()(torch.tensor([ids], dtype=torch.long))
    return model(inputs_embeds=torch.cat([prefix, words], dim=1)).logits[0, -1]


def test_it_satisfies_the_protocol_with_every_parameter_frozen(language: TransformersLM) -> None:
    assert isinstance(language, LanguageModel)
    assert language.vocab_size == VOCAB
    assert language.embed(torch.zeros(2, 3, dtype=torch.long)).shape == (2, 3, language.width)
    assert not any(parameter.requires_grad for parameter in language.parameters())


def test_training_mode_does_not_reach_the_frozen_model(language: TransformersLM) -> None:
    language.train()
    assert not any(module.training for module in language.modules())


def test_context_comes_from_the_configuration() -> None:
    assert TransformersLM(_opt()).context == 64
    assert TransformersLM(_gpt2()).context == 64
    assert TransformersLM(_t5()).context > 512


@torch.no_grad()
def test_a_ragged_batch_gives_each_row_what_transformers_gives_it_alone(model: Any, language: TransformersLM) -> None:
    prefix = _prefix(language.width)
    logits, cache = language.prefill(prefix, LENGTHS)
    rows: list[list[int]] = [[] for _ in LENGTHS]
    for step in range(6):  # beyond Gemma's window of 4
        for row, length in enumerate(LENGTHS.tolist()):
            _close(logits[row], _full_logits(model, prefix[row : row + 1, :length], rows[row]))
        ids = torch.tensor([3 + step, 20 + step, 11, 40 - step])
        for row, token in zip(rows, ids.tolist(), strict=True):
            row.append(token)
        logits = language.step(ids, cache)


@torch.no_grad()
def test_more_padding_changes_nothing(language: TransformersLM) -> None:
    narrow, _ = language.prefill(_prefix(language.width), LENGTHS)
    padded = torch.nn.functional.pad(_prefix(language.width), (0, 0, 0, 5), value=-30.0)
    wide, _ = language.prefill(padded, LENGTHS)
    _close(wide, narrow)
    _close(language.log_probs(padded, LENGTHS, TARGETS), language.log_probs(_prefix(language.width), LENGTHS, TARGETS))


@torch.no_grad()
def test_selected_rows_go_on_as_they_would_have_and_leave_the_original_alone(language: TransformersLM) -> None:
    _, cache = language.prefill(_prefix(language.width), LENGTHS)
    language.step(torch.tensor([5, 6, 7, 8]), cache)
    assert isinstance(cache, Reading)
    rows = torch.tensor([2, 0, 2])
    chosen = cache.select(rows)
    for _ in range(3):
        ids = torch.tensor([9, 10, 11, 12])
        found = language.step(ids[rows], chosen)
        expected = language.step(ids, cache)
        _close(found, expected[rows])


def _reference_log_probs(model: Any, prefix: Tensor, targets: list[int]) -> Tensor:
    """From transformers' own logits for one unpadded row: float[T]."""
    if model.config.is_encoder_decoder:
        logits = model(inputs_embeds=prefix, labels=torch.tensor([targets])).logits[0]
    else:
        words = model.get_input_embeddings()(torch.tensor([targets]))
        logits = model(inputs_embeds=torch.cat([prefix, words], dim=1)).logits[0, prefix.shape[1] - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(targets)[:, None])[:, 0]


def test_log_probs_are_those_of_transformers(model: Any, language: TransformersLM) -> None:
    prefix = _prefix(language.width)
    found = language.log_probs(prefix, LENGTHS, TARGETS)
    assert found.dtype == torch.float32
    for row, length in enumerate(LENGTHS.tolist()):
        targets = [token for token in TARGETS[row].tolist() if token >= 0]
        _close(found[row, : len(targets)], _reference_log_probs(model, prefix[row : row + 1, :length], targets))
        assert (found[row, len(targets) :] == 0).all()


def test_the_mean_is_the_loss_of_transformers(model: Any, language: TransformersLM) -> None:
    prefix = _prefix(language.width)[2:3]
    targets = torch.tensor([[8, 3, 17, 1]])
    if model.config.is_encoder_decoder:
        loss = model(inputs_embeds=prefix, labels=targets).loss
    else:
        embeds = torch.cat([prefix, language.embed(targets)], dim=1)
        labels = torch.cat([torch.full((1, prefix.shape[1]), -100), targets], dim=1)
        loss = model(inputs_embeds=embeds, labels=labels).loss
    _close(-language.log_probs(prefix, torch.tensor([9]), targets).mean(), loss)


def test_the_gradient_reaches_the_prefix_and_never_its_padding(model: Any, language: TransformersLM) -> None:
    prefix = _prefix(language.width).requires_grad_()
    language.log_probs(prefix, LENGTHS, TARGETS).sum().backward()
    assert prefix.grad is not None
    for row, length in enumerate(LENGTHS.tolist()):
        assert (prefix.grad[row, length:] == 0).all()
        alone = _prefix(language.width)[row : row + 1, :length].requires_grad_()
        targets = [token for token in TARGETS[row].tolist() if token >= 0]
        _reference_log_probs(model, alone, targets).sum().backward()
        assert alone.grad is not None
        _close(prefix.grad[row, :length], alone.grad[0])
        assert alone.grad.abs().sum() > 0


@pytest.mark.parametrize("common", [1, 3, 5])
def test_what_rows_have_in_common_is_read_once_with_the_same_numbers_and_gradients(
    language: TransformersLM, common: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("blip2.model.scoring.GROUP", 2)
    images = _prefix(language.width)[:3, :common]
    own = torch.randn(5, 4, language.width, generator=torch.Generator().manual_seed(9))
    owners, lengths = torch.tensor([0, 0, 1, 2, 2]), common + torch.tensor([0, 3, 1, 4, 0])
    targets = torch.tensor([[8, 3, 1, -100], [5, 1, -100, -100], [7, 9, 4, 1], [1, -100, -100, -100], [11, 2, 1, -100]])
    found: list[Tensor] = []
    gradients: list[Tensor] = []
    for alike in (None, (owners, common)):
        start = images.clone().requires_grad_()
        prefix = torch.cat([start[owners], own], dim=1)
        found.append(language.log_probs(prefix, lengths, targets, None, alike))
        found[-1].sum().backward()
        assert start.grad is not None
        gradients.append(start.grad)
    _close(found[1], found[0])
    _close(gradients[1], gradients[0])


def test_a_vocabulary_restricts_the_softmax_to_its_tokens(
    model: Any, language: TransformersLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocabulary = torch.tensor([1, 4, 5, 7, 8, 9, 11, 13, 60])
    prefix = _prefix(language.width)
    found = language.log_probs(prefix, LENGTHS, TARGETS, vocabulary)
    for row, length in enumerate(LENGTHS.tolist()):
        ids: list[int] = []
        for position, target in enumerate(token for token in TARGETS[row].tolist() if token >= 0):
            logits = _full_logits(model, prefix[row : row + 1, :length], ids)
            expected = logits[vocabulary].log_softmax(-1)[vocabulary.tolist().index(target)]
            _close(found[row, position], expected)
            ids.append(target)
    monkeypatch.setattr("blip2.model.scoring.SCORES_AT_ONCE", 20)  # two positions at a time
    _close(language.log_probs(prefix, LENGTHS, TARGETS, vocabulary), found)


def test_a_target_outside_the_vocabulary_is_named(language: TransformersLM) -> None:
    with pytest.raises(ConfigError, match="target 60"):
        language.log_probs(_prefix(language.width), LENGTHS, TARGETS, torch.tensor([1, 4, 5, 7, 8, 9, 11]))


def test_an_empty_prefix_is_refused(language: TransformersLM) -> None:
    with pytest.raises(PromptError, match="empty"):
        language.prefill(_prefix(language.width), torch.tensor([7, 0, 9, 1]))


def test_a_model_without_a_head_is_refused() -> None:
    with pytest.raises(ConfigError, match="LlamaModel has no language-model head"):
        TransformersLM(transformers.LlamaModel(transformers.LlamaConfig(**LLAMA_SHAPE, **SMALL)))


def test_scales_of_other_families_are_honoured_and_an_unknown_one_is_refused() -> None:
    granite = transformers.GraniteConfig(**LLAMA_SHAPE, **SMALL, logits_scaling=4.0)
    TransformersLM(_separate(transformers.GraniteForCausalLM(granite)))
    cohere = transformers.CohereConfig(**LLAMA_SHAPE, **SMALL, logit_scale=0.25)
    TransformersLM(_separate(transformers.CohereForCausalLM(cohere)))

    class Doubled(transformers.LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 2
            return output

    with pytest.raises(ConfigError, match="Doubled"):
        TransformersLM(_separate(Doubled(transformers.LlamaConfig(**LLAMA_SHAPE, **SMALL))))


def test_half_precision_weights_take_a_float32_prefix_and_give_float32() -> None:
    torch.manual_seed(0)
    language = TransformersLM(_separate(_gemma3()).bfloat16())
    prefix = _prefix(language.width).requires_grad_()
    found = language.log_probs(prefix, LENGTHS, TARGETS)
    found.sum().backward()
    assert found.dtype == torch.float32
    assert prefix.grad is not None
    assert prefix.grad.dtype == torch.float32
    assert language.prefill(prefix, LENGTHS)[0].dtype == torch.float32
