"""OPT, T5 and Gemma against transformers, weights through the real maps: the protocol, padding, beams, gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from blip2.adapters.transformers_lm import TransformersLM
from blip2.config import GemmaConfig, OPTConfig, T5Config
from blip2.errors import ConfigError, PromptError
from blip2.model.cache import Cache
from blip2.model.decoder import Decoder
from blip2.model.gemma import Gemma
from blip2.model.opt import OPT
from blip2.model.t5 import T5
from blip2.protocols import LanguageModel
from blip2.weights.maps import transformers as maps
from blip2.weights.rules import for_layers, to_ours, to_theirs

transformers = pytest.importorskip("transformers")

Model = Decoder | T5

VOCAB = 61
CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # float32 sums in another order; logits reach 20, the worst seen was 1e-5
LENGTHS = torch.tensor([5, 1, 9, 3])


def _opt() -> tuple[Any, Model, Any]:
    theirs = transformers.OPTForCausalLM(
        transformers.OPTConfig(
            vocab_size=VOCAB, hidden_size=32, word_embed_proj_dim=32, ffn_dim=48, num_hidden_layers=3,
            num_attention_heads=4, max_position_embeddings=64, pad_token_id=0, bos_token_id=2, eos_token_id=1,
        )
    )  # fmt: skip
    config = OPTConfig(width=32, layers=3, heads=4, mlp_width=48, vocab_size=VOCAB, context=64)
    return theirs, OPT(config), for_layers(maps.OPT, range(3))


def _gemma() -> tuple[Any, Model, Any]:
    theirs = transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(
            vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=10, sliding_window=4, max_position_embeddings=64,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"], pad_token_id=0, bos_token_id=2,
            eos_token_id=1,
        )
    )  # fmt: skip
    config = GemmaConfig(
        width=32, layers=3, heads=4, key_heads=2, head_width=8, mlp_width=48, vocab_size=VOCAB, context=64,
        query_scale=10, window=4, global_every=2,
    )  # fmt: skip
    return theirs, Gemma(config), for_layers(maps.gemma(config), range(3))


def _t5(*, tied: bool = False) -> tuple[Any, Model, Any]:
    theirs = transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=4, pad_token_id=0, eos_token_id=1,
            feed_forward_proj="gated-gelu", dense_act_fn="gelu_new" if tied else "gelu", decoder_start_token_id=0,
            relative_attention_num_buckets=8, relative_attention_max_distance=7, tie_word_embeddings=tied,
        )
    )  # fmt: skip
    theirs.config.scale_decoder_outputs = tied
    config = T5Config(
        width=32, layers=3, heads=4, head_width=8, mlp_width=48, vocab_size=VOCAB, buckets=8, max_distance=7,
        activation="gelu_tanh" if tied else "gelu", tied=tied, scaled=tied,
    )  # fmt: skip
    return theirs, T5(config), for_layers(maps.t5(config), range(3))


def _tied_t5() -> tuple[Any, Model, Any]:
    return _t5(tied=True)


COPIES = {"lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}  # of the embeddings, if tied


@pytest.fixture(scope="module", params=[_opt, _gemma, _t5, _tied_t5], ids=["opt", "gemma", "t5", "tied t5"])
def pair(request: pytest.FixtureRequest) -> tuple[TransformersLM, Model]:
    """transformers' model behind its adapter, which is tested on its own, and ours with the same weights."""
    torch.manual_seed(3)
    theirs, ours, rules = request.param()
    with torch.no_grad():
        for parameter in theirs.parameters():  # well separated logits, and norms and biases that do something
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.ndim > 1 else 0.2))
    copies = COPIES - {name for rule in rules for name in rule.theirs}
    state = {name: tensor for name, tensor in theirs.state_dict().items() if name not in copies}
    converted = to_ours(rules, state, "test")
    ours.load_state_dict(converted)
    back = to_theirs(rules, ours.state_dict(), "test")
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())
    return TransformersLM(theirs), ours


def prefixes(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, length, 32, generator=torch.Generator().manual_seed(seed))


def test_it_is_a_language_model_of_the_same_sizes(pair: tuple[TransformersLM, Model]):
    theirs, ours = pair
    assert isinstance(ours, LanguageModel)
    assert (ours.width, ours.vocab_size, ours.context) == (theirs.width, theirs.vocab_size, theirs.context)
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    torch.testing.assert_close(ours.embed(torch.arange(9)), theirs.embed(torch.arange(9)))


@settings(deadline=None, max_examples=20)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4), seed=st.integers(0, 99), data=st.data())
@torch.no_grad()
def test_reading_and_writing_equal_transformers_whatever_rows_are_chosen_on_the_way(
    pair: tuple[TransformersLM, Model], lengths: list[int], seed: int, data: st.DataObject
):
    theirs, ours = pair
    prefix, real = prefixes(len(lengths), 9, seed), torch.tensor(lengths)
    expected, their_cache = theirs.prefill(prefix, real)
    found, cache = ours.prefill(prefix, real)
    torch.testing.assert_close(found, expected, **CLOSE)
    for _ in range(data.draw(st.integers(1, 20))):  # past the room that a cache begins with
        choose = data.draw(st.sampled_from([None, Cache.select, Cache.moved]))
        if choose is not None:
            rows = torch.tensor(data.draw(st.lists(st.integers(0, len(found) - 1), min_size=1, max_size=5)))
            cache, their_cache, found = choose(cache, rows), their_cache.select(rows), found[rows]
        ids = torch.tensor([data.draw(st.integers(0, VOCAB - 1)) for _ in found])
        expected, found = theirs.step(ids, their_cache), ours.step(ids, cache)
        torch.testing.assert_close(found, expected, **CLOSE)


@torch.no_grad()
def test_choosing_rows_leaves_the_cache_they_came_from_alone(pair: tuple[TransformersLM, Model]):
    _, ours = pair
    _, cache = ours.prefill(prefixes(3, 5), torch.tensor([5, 2, 4]))
    ours.step(torch.tensor([1, 2, 3]), cache)
    chosen = cache.select(torch.tensor([2, 0, 2]))
    for _ in range(20):  # past the room that a cache begins with
        found = ours.step(torch.tensor([7, 8, 7]), chosen)
        expected = ours.step(torch.tensor([8, 9, 7]), cache)
        torch.testing.assert_close(found, expected[torch.tensor([2, 0, 2])], **CLOSE)


@torch.no_grad()
def test_rows_that_move_go_to_and_fro_between_two_buffers(pair: tuple[TransformersLM, Model]):
    _, ours = pair
    _, cache = ours.prefill(prefixes(3, 5), torch.tensor([5, 2, 4]))
    places: list[int] = []
    for _ in range(4):
        ours.step(torch.tensor([1, 2, 3]), cache)
        places.append(next(cache.own.layers())[0].data_ptr())
        cache = cache.moved(torch.tensor([1, 0, 0]))
    assert places[:2] == places[2:]
    assert places[0] != places[1]


@pytest.mark.parametrize("common", [None, 1, 3])
def test_log_probs_and_gradients_equal_transformers(
    pair: tuple[TransformersLM, Model], common: int | None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("blip2.model.scoring.GROUP", 2)
    theirs, ours = pair
    start, own = prefixes(3, common or 2, 5), prefixes(5, 6, 6)
    owners = torch.tensor([0, 0, 1, 2, 2])
    lengths = start.shape[1] + torch.tensor([0, 3, 1, 6, 0])
    targets = torch.tensor([[8, 3, 1, -100], [5, 1, -100, -100], [7, 9, 4, 1], [1, -100, -100, -100], [11, 2, 1, -100]])
    vocabulary = torch.tensor([1, 2, 3, 4, 5, 7, 8, 9, 11, 40])
    results: list[tuple[Tensor, Tensor]] = []
    for model, alike in ((theirs, None), (ours, None if common is None else (owners, common))):
        image = start.clone().requires_grad_()
        found = model.log_probs(torch.cat([image[owners], own], dim=1), lengths, targets, vocabulary, alike)
        found.sum().backward()
        assert image.grad is not None
        results.append((found.detach(), image.grad))
    torch.testing.assert_close(results[1], results[0], **CLOSE)


@pytest.mark.parametrize("pair", [_opt, _gemma], ids=["opt", "gemma"], indirect=True)
@torch.no_grad()
def test_going_on_from_what_was_read_equals_reading_it_all(pair: tuple[TransformersLM, Decoder]):
    _, ours = pair
    images, tails = prefixes(2, 4, 1), prefixes(4, 5, 2)
    owners, lengths = torch.tensor([0, 0, 1, 0]), torch.tensor([3, 5, 1, 2])
    whole = torch.cat([images[owners], tails], dim=1)
    _, read = ours.prefill(images, torch.tensor([4, 4]))
    past = read.part(0, 4).join(read.part(1, 4)).select(owners)
    expected, cache = ours.prefill(whole, lengths + 4)
    for _ in range(2):  # what was gone on from stays as it is
        found, other = ours.prefill(tails, lengths, None, past)
        torch.testing.assert_close(found, expected, **CLOSE)
    rows = torch.tensor([3, 0, 0, 1])
    cache, other = cache.select(rows), other.select(rows)
    for token in range(3):
        ids = torch.arange(4) + token
        torch.testing.assert_close(ours.step(ids, other), ours.step(ids, cache), **CLOSE)

    targets = torch.tensor([[8, 3, 1], [5, 1, -100], [7, 9, 4], [1, -100, -100]])
    alike = torch.arange(4), 1
    expected = ours.log_probs(whole, lengths + 4, targets, None, (alike[0], 5))
    torch.testing.assert_close(ours.log_probs(tails, lengths, targets, None, alike, past), expected, **CLOSE)
    one = other.part(1, 6).head(5)  # tiers become one, and are cut
    again, _ = ours.prefill(tails[:1, 1:3], torch.tensor([2]), None, one)
    torch.testing.assert_close(again, ours.prefill(whole[:1], torch.tensor([7]))[0], **CLOSE)


@settings(deadline=None, max_examples=15)
@given(began=st.lists(st.tuples(st.integers(0, 4), st.integers(1, 6)), min_size=2, max_size=4), seed=st.integers(0, 9))
@torch.no_grad()
def test_rows_that_began_at_different_times_go_on_as_if_alone(
    pair: tuple[TransformersLM, Model], began: list[tuple[int, int]], seed: int
):
    """Each pair: steps until the next rows join, positions of their prompts."""
    _, ours = pair
    together: Any = None
    alone: list[Any] = []
    token = 0

    def step() -> None:
        ids = torch.arange(2 * len(alone)) + token
        found = ours.step(ids, together)
        for expected, logits, some in zip(alone, found.split(2), ids.split(2), strict=True):
            torch.testing.assert_close(logits, ours.step(some, expected), **CLOSE)

    for number, (steps, length) in enumerate(began):
        prompt = prefixes(2, length, seed + number), torch.tensor([length, max(1, length - 2)])
        mine, other = ours.prefill(*prompt)[1], ours.prefill(*prompt)[1]
        together = mine if together is None else together.join(mine)
        alone.append(other)
        for _ in range(steps):
            token += 1
            step()
    step()


@torch.no_grad()
def test_a_part_of_the_vocabulary_has_the_same_logits(pair: tuple[TransformersLM, Model]):
    _, ours = pair
    some = torch.tensor([3, 8, 50])
    prefix, lengths = prefixes(2, 4), torch.tensor([4, 2])
    whole, cache = ours.prefill(prefix, lengths)
    part, same = ours.prefill(prefix, lengths, some)
    torch.testing.assert_close(part, whole[:, some])
    ids = torch.tensor([5, 6])
    torch.testing.assert_close(ours.step(ids, same, some), ours.step(ids, cache)[:, some])


def test_what_cannot_be_is_an_error(pair: tuple[TransformersLM, Model]):
    _, ours = pair
    with pytest.raises(PromptError, match="a prefix is empty"):
        ours.prefill(prefixes(2, 4), torch.tensor([4, 0]))
    with pytest.raises(ConfigError, match="target 60 is not in the vocabulary of 2"):
        ours.log_probs(prefixes(1, 4), torch.tensor([4]), torch.tensor([[60]]), torch.tensor([1, 2]))


def test_rows_of_a_head_that_inference_asked_for_serve_a_gradient_too(pair: tuple[TransformersLM, Model]):
    _, ours = pair
    some = torch.tensor([1, 3, 8, 50])
    with torch.inference_mode():
        ours.prefill(prefixes(1, 4), torch.tensor([4]), some)
    prefix = prefixes(1, 4).requires_grad_()
    ours.log_probs(prefix, torch.tensor([4]), torch.tensor([[3, 1]]), some).sum().backward()
    assert prefix.grad is not None


@torch.no_grad()
def test_t5_stays_finite_in_float16_where_its_activations_do_not_fit():
    torch.manual_seed(0)
    model = T5(T5Config(width=32, layers=2, heads=4, head_width=8, mlp_width=48, vocab_size=VOCAB))
    for layer in [*model.encoder, *model.decoder]:
        layer.mlp.gate_up.weight *= 60
        layer.mlp.down.weight *= 3000
    expected, _ = model.prefill(prefixes(2, 5), torch.tensor([5, 3]))
    inner = model.encoder[0](prefixes(2, 5), model.encoder_positions(torch.arange(5) - torch.arange(5)[:, None])[None])
    assert inner.abs().max() > torch.finfo(torch.float16).max
    found, _ = model.half().half_safe().prefill(prefixes(2, 5), torch.tensor([5, 3]))
    assert expected.isfinite().all()
    assert found.isfinite().all()
