"""Tokens identical to those of transformers' `generate`, on tiny random models.

Weights are in float64 and larger than at initialisation, so that candidates are well separated: transformers rounds
scores to float32, which turns only ties closer than about 1e-7.
"""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from blip2.adapters.transformers_lm import TransformersLM
from blip2.generate import Beam, Greedy, Limits, Tokens, generate

transformers = pytest.importorskip("transformers")
# transformers says that penalties do not see a prefix without ids: that is what is compared here.
pytestmark = pytest.mark.filterwarnings("ignore:Passing `:UserWarning")

VOCAB, ROWS = 37, 3
STOPS = [(1,), (1, 7, 9)]
IDS: dict[str, Any] = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1}
BOOST = {"gpt2": 1.5, "opt": 1.0, "gemma3_text": 2.0, "t5": 0.0}  # of their logits: some texts stop early, some not
PENALTIES = [-1.0, 0.0, 1.0, 2.0]


def _gpt2() -> Any:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, **IDS))


def _opt() -> Any:
    shape = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 24, "num_hidden_layers": 2}
    return transformers.OPTForCausalLM(transformers.OPTConfig(num_attention_heads=2, **shape, **IDS))


def _gemma3() -> Any:
    config = transformers.Gemma3TextConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
        **IDS,
    )
    return transformers.Gemma3ForCausalLM(config)


def _t5() -> Any:
    shape = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    config = transformers.T5Config(decoder_start_token_id=0, tie_word_embeddings=False, **shape, **IDS)
    return transformers.T5ForConditionalGeneration(config)


@pytest.fixture(scope="module", params=[_gpt2, _opt, _gemma3, _t5], ids=["gpt2", "opt", "gemma3", "t5"])
def language(request: pytest.FixtureRequest) -> TransformersLM:
    torch.manual_seed(1)
    model = request.param().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 else 0.0))
    bias = torch.zeros(VOCAB, dtype=torch.float64)
    bias[list(STOPS[1])] = BOOST[model.config.model_type]
    bias[0] = -1e4  # transformers counts T5's start token, 0, among the generated: penalties must not matter to it
    model.get_output_embeddings().bias = nn.Parameter(bias)
    return TransformersLM(model)


@pytest.fixture(scope="module")
def prefix(language: TransformersLM) -> Tensor:
    return torch.randn(ROWS, 6, language.width, generator=torch.Generator().manual_seed(2)).double() * 2


LENGTHS = torch.tensor([6, 2, 4])


def _theirs(language: TransformersLM, prefix: Tensor, lengths: Tensor, stop: tuple[int, ...], **options: Any) -> Any:
    """transformers' generate on the rows, padded on the side that its models want."""
    model = language.model
    rows = [row[:length] for row, length in zip(prefix, lengths.tolist(), strict=True)]
    side: Literal["left", "right"] = "right" if model.config.is_encoder_decoder else "left"
    padded = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side=side)
    mask = nn.utils.rnn.pad_sequence([torch.ones(len(row)) for row in rows], batch_first=True, padding_side=side)
    return model.generate(
        inputs_embeds=padded,
        attention_mask=mask.long(),
        do_sample=False,
        eos_token_id=list(stop),
        output_scores=True,
        return_dict_in_generate=True,
        **options,
    )


def _ids(language: TransformersLM, sequences: Tensor, stop: tuple[int, ...], count: int) -> list[tuple[int, ...]]:
    """Their sequences without start, stop and padding."""
    found: list[tuple[int, ...]] = []
    for row in sequences.tolist():
        ids = row[1:] if language.model.config.is_encoder_decoder else row
        end = next((place for place, token in enumerate(ids) if token in stop), count)
        found.append(tuple(ids[:end]))
    return found


def _flat(texts: list[list[Tokens]]) -> list[Tokens]:
    return [text for row in texts for text in row]


@pytest.mark.parametrize("several", [False, True])
def test_greedy_tokens_and_their_log_probs(language: TransformersLM, prefix: Tensor, several: bool) -> None:
    stop = STOPS[several]
    ours = _flat(generate(language, prefix, LENGTHS, Greedy(), Limits(10), stop))
    theirs = _theirs(language, prefix, LENGTHS, stop, max_new_tokens=10)
    assert [text.ids for text in ours] == _ids(language, theirs.sequences, stop, 10)
    scores = language.model.compute_transition_scores(theirs.sequences, theirs.scores, normalize_logits=True)
    for text, expected in zip(ours, scores, strict=True):
        assert text.log_probs == pytest.approx(expected[: len(text.log_probs)].tolist(), abs=1e-4)


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("width", [2, 3, 4, 5])
def test_beam_tokens_and_scores(language: TransformersLM, prefix: Tensor, width: int, penalty: float) -> None:
    mixed = width + PENALTIES.index(penalty)
    early, stop = ([False, True, "never"])[mixed % 3], STOPS[mixed % 2]
    method, captions = Beam(width, penalty, early), 1 + width // 2
    ours = _flat(generate(language, prefix, LENGTHS, method, Limits(9, captions=captions), stop))
    theirs = _theirs(
        language,
        prefix,
        LENGTHS,
        stop,
        max_new_tokens=9,
        num_beams=width,
        length_penalty=penalty,
        early_stopping=early,
        num_return_sequences=captions,
    )
    assert [text.ids for text in ours] == _ids(language, theirs.sequences, stop, 9)
    assert [text.score for text in ours] == pytest.approx(theirs.sequences_scores.tolist(), abs=1e-4)


@pytest.mark.parametrize("limits", [Limits(9, 4), Limits(9, 0, 1.8), Limits(9, 0, 1.0, 2), Limits(9, 3, 0.7, 1)])
@pytest.mark.parametrize("width", [1, 4])
def test_limits_with_greedy_and_beams(language: TransformersLM, prefix: Tensor, width: int, limits: Limits) -> None:
    stop = STOPS[1]
    method = Greedy() if width == 1 else Beam(width)
    ours = _flat(generate(language, prefix, LENGTHS, method, limits, stop))
    for row, text in enumerate(ours):  # alone: their penalty skips generated tokens where a row is padded
        theirs = _theirs(
            language,
            prefix[row : row + 1],
            LENGTHS[row : row + 1],
            stop,
            num_beams=width,
            max_new_tokens=limits.max_new_tokens,
            min_new_tokens=limits.min_new_tokens,
            repetition_penalty=limits.repetition_penalty,
            no_repeat_ngram_size=limits.no_repeat_ngram,
        )
        assert text.ids == _ids(language, theirs.sequences, stop, 9)[0]


def test_beam_log_probs_are_their_transition_scores(language: TransformersLM, prefix: Tensor) -> None:
    stop = STOPS[1]
    ours = _flat(generate(language, prefix, LENGTHS, Beam(4), Limits(9, 2), stop))
    theirs = _theirs(language, prefix, LENGTHS, stop, max_new_tokens=9, min_new_tokens=2, num_beams=4)
    scores = language.model.compute_transition_scores(theirs.sequences, theirs.scores, theirs.beam_indices)
    for text, expected in zip(ours, scores, strict=True):
        assert text.log_probs == pytest.approx(expected[: len(text.log_probs)].tolist(), abs=1e-4)


def test_some_beams_of_these_models_end_early_and_some_do_not(language: TransformersLM, prefix: Tensor) -> None:
    texts = _flat(generate(language, prefix, LENGTHS, Beam(5), Limits(9, captions=5), STOPS[1]))
    stopped = [len(text.ids) for text in texts if text.finish == "stop"]
    assert 3 <= len(stopped) < len(texts)
    assert len(set(stopped)) > 2
    assert len({text.ids for text in texts}) > 8
