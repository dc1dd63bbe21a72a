"""Attention and evidence of each patch, on the tiny model: sums, slopes, planted patches, words, what is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny_model
from blip2 import explain
from blip2.blip2 import Blip2
from blip2.compiling import compile_sight
from blip2.errors import ConfigError, PromptError
from blip2.model import qformer
from blip2.model.bridge import Bridge
from blip2.results import ImageFeatures

TEXT = "a dog runs on the beach"
CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # float32 sums in another order
PATCHES = 17  # of the tiny model: the class token and 4 x 4


@pytest.fixture(scope="module")
def model() -> Blip2:
    return tiny_model.build()


@pytest.fixture(scope="module")
def features(model: Blip2) -> ImageFeatures:
    return model.encode(tiny_model.picture(1))


def deeper(layers: int, every: int) -> Blip2:
    """The tiny model with another Q-Former."""
    tiny = tiny_model.build()
    form = dataclasses.replace(tiny_model.QFORMER, layers=layers, cross_attention_every=every)
    config = dataclasses.replace(tiny.config, qformer=form)
    torch.manual_seed(0)
    bridge = Bridge(config).eval()
    for parameter in bridge.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.4)
    return dataclasses.replace(tiny, config=config, bridge=bridge)


def planted(model: Blip2, patch: int) -> tuple[Blip2, ImageFeatures]:
    """A model whose cross-attention reads nothing but one patch, and features of such an image.

    Every other patch has no values after the norm, since all of its numbers are equal.
    """
    bridge = Bridge(model.config).eval()
    bridge.load_state_dict(model.bridge.state_dict())
    for layer in bridge.qformer.layers:
        if layer.cross_attention is not None:
            torch.nn.init.zeros_(layer.cross_attention.value.bias)
    patches = torch.ones(1, PATCHES, 12)
    patches[0, patch] = torch.randn(12, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        hidden = bridge.look(bridge.see(patches)).hidden
        vectors = bridge.image_vectors(hidden)
    return dataclasses.replace(model, bridge=bridge), ImageFeatures(patches, hidden, vectors)


# -- attention ---------------------------------------------------------------------------------------------------------


def test_what_every_query_and_every_word_looks_at_sums_to_one(model: Blip2, features: ImageFeatures):
    for found in (explain.match(model, features, TEXT), explain.queries(model, features)):
        assert found.attention.shape == (4, PATCHES)
        torch.testing.assert_close(found.attention.sum(1), torch.ones(4))
        assert found.places.grid(found.attention).shape == (4, 4, 4)
        assert found.places.rest(found.attention).shape == (4, 1)
    words = explain.match(model, features, TEXT).words
    assert [word.text for word in words] == TEXT.split()
    looked = torch.stack([word.attention for word in words if word.attention is not None])
    torch.testing.assert_close(looked.sum(1), torch.ones(6))
    assert looked.std(0).max() > 1e-3  # each word its own


def test_the_mean_over_layers_is_that_of_each_layer_alone():
    model = deeper(layers=4, every=2)
    features = model.encode(tiny_model.picture(1))
    both, *single = (explain.match(model, features, TEXT, layer) for layer in (None, 0, 2))
    assert (both.layers, single[0].layers) == ((0, 2), (0,))
    assert both.evidence is not None
    torch.testing.assert_close(both.evidence, sum(part.evidence for part in single) / 2)  # pyright: ignore
    torch.testing.assert_close(both.attention, (single[0].attention + single[1].attention) / 2)


def test_words_after_the_last_layer_look_at_nothing_any_more():
    model = deeper(layers=2, every=1)
    features = model.encode(tiny_model.picture(1))
    assert all(word.attention is None for word in explain.match(model, features, TEXT, 1).words)
    assert all(word.attention is not None for word in explain.match(model, features, TEXT, 0).words)
    with pytest.raises(ConfigError, match="another layer"):
        explain.draw(pillow(), explain.match(model, features, TEXT, 1), "attention")


# -- evidence ----------------------------------------------------------------------------------------------------------


def test_the_probability_is_that_of_match_and_a_word_s_score_what_hiding_it_costs(
    model: Blip2, features: ImageFeatures
):
    found = explain.match(model, features, TEXT)
    assert found.probability == pytest.approx(model.match(features, TEXT).itm.item(), abs=1e-5)
    ids = model.text_ids([TEXT]).repeat(2, 1)
    ids[1, 2] = model.config.qformer.pad_id
    logits = model.match_logits(features, ids, torch.tensor([[0, 0], [0, 1]]))
    odds = logits[:, 1] - logits[:, 0]
    assert found.words[1].text == "dog"
    assert found.words[1].score == pytest.approx((odds[0] - odds[1]).item(), abs=1e-4)


def test_the_evidence_is_weight_times_slope_by_finite_differences(
    model: Blip2, features: ImageFeatures, monkeypatch: pytest.MonkeyPatch
):
    exact = dataclasses.replace(model, bridge=Bridge(model.config).eval().double())
    exact.bridge.load_state_dict(model.bridge.state_dict())
    watch = qformer.Watch()
    ids = model.text_ids([TEXT])
    heads, queries = 2, 4

    def odds() -> float:
        with torch.no_grad():
            hidden = exact.bridge.qformer.join(exact.bridge.see(features.patches.double()), ids, wanted=queries)
            logits = exact.bridge.heads.itm_head(hidden).mean(1)[0]
        return (logits[1] - logits[0]).item()

    with torch.no_grad():
        exact.bridge.qformer.join(exact.bridge.see(features.patches.double()), ids, watch=watch)
    whole, step = qformer.attend, 1e-6
    slopes = torch.zeros(heads, queries, PATCHES, dtype=torch.float64)
    for head, query, patch in [(h, q, p) for h in range(heads) for q in range(queries) for p in range(PATCHES)]:

        def nudged(q: Tensor, k: Tensor, v: Tensor, *rest: Any, at=(head, query, patch), **more: Any) -> Tensor:
            out = whole(q, k, v, *rest, **more)
            if k.shape[2] == PATCHES:  # the cross-attention
                width = v.shape[-1]
                out[0, at[1], at[0] * width : (at[0] + 1) * width] += nudged.by * v[0, at[0], at[2]]
            return out

        monkeypatch.setattr(qformer, "attend", nudged)
        values: list[float] = []
        for by in (step, -step):
            nudged.by = by  # pyright: ignore[reportFunctionMemberAccess]
            values.append(odds())
        slopes[head, query, patch] = (values[0] - values[1]) / (2 * step)
    monkeypatch.undo()
    expected = (watch.across[0][0] * slopes.clamp(min=0)).mean(0).sum(0)
    found = explain.match(model, features, TEXT).evidence
    assert found is not None
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)  # the model is float32


@pytest.mark.parametrize("patch", [0, 1, 6, 16])
def test_a_planted_patch_is_all_the_evidence(model: Blip2, patch: int):
    blind, features = planted(model, patch)
    matched, written = explain.match(blind, features, TEXT), explain.caption(blind, features)
    for found in (matched, written):
        assert found.evidence is not None
        assert found.evidence[patch] > 1e-4
        assert found.evidence.sum() == found.evidence[patch]
        assert all(word.evidence.sum() == word.evidence[patch] for word in found.words)
        assert sum(word.evidence[patch] > 0 for word in found.words) > 0


def test_maps_are_the_same_under_inference_mode_and_leave_no_gradient(model: Blip2, features: ImageFeatures):
    expected = explain.match(model, features, TEXT)
    with torch.inference_mode():
        found = explain.match(model, features, TEXT)
    assert found.evidence is not None
    torch.testing.assert_close(found.evidence, expected.evidence, rtol=0, atol=0)
    assert not found.evidence.requires_grad
    assert all(parameter.grad is None for parameter in model.bridge.parameters())


def test_a_compiled_model_is_explained_as_a_plain_one(features: ImageFeatures, model: Blip2):
    compiled = tiny_model.build()
    compile_sight(compiled, backend="aot_eager")  # as inductor, it cuts gradients to what is within
    expected, found = explain.match(model, features, TEXT), explain.match(compiled, features, TEXT)
    torch.testing.assert_close(found.evidence, expected.evidence, **CLOSE)


# -- what is written ---------------------------------------------------------------------------------------------------


def test_words_of_a_caption_have_the_log_probabilities_that_wrote_them(model: Blip2, features: ImageFeatures):
    written = model.caption(features, "a red", details=True)[0]
    found = explain.caption(model, features, "a red")
    assert (found.kind, found.text) == ("written", written.text)
    assert " ".join(word.text for word in found.words) == written.text
    total = sum(written.log_probs[: len(written.ids)])
    assert sum(word.score for word in found.words) == pytest.approx(total, abs=1e-3)
    assert found.attention.shape == (4, PATCHES)


@pytest.mark.parametrize("aware", [False, True])
def test_answers_are_those_of_ask_whether_the_queries_read_the_question_or_not(
    model: Blip2, features: ImageFeatures, aware: bool
):
    asked = dataclasses.replace(model, config=model.config.replace(question_aware=aware))
    found = explain.answer(asked, features, "what is this?")
    written = asked.ask(features, ["what is this?"], details=True)[0]
    assert found.text == written.text
    assert found.words
    total = sum(written.log_probs[: len(written.ids)])
    assert sum(word.score for word in found.words) == pytest.approx(total, abs=1e-3)
    assert found.evidence is not None
    assert found.evidence.max() > 0


def test_a_text_of_nothing_is_no_text_to_explain(model: Blip2, monkeypatch: pytest.MonkeyPatch):
    nothing = dataclasses.replace(model.caption(tiny_model.picture(1), details=True), ids=(), text="")
    monkeypatch.setattr(Blip2, "caption", lambda *_, **__: [nothing])
    with pytest.raises(PromptError, match="wrote nothing"):
        explain.caption(model, tiny_model.picture(1))


# -- what is refused ---------------------------------------------------------------------------------------------------


def pillow() -> Any:
    from blip2.image import open as open_image

    return open_image(tiny_model.picture(1))


def test_ten_thousand_words_are_cut_and_said_to_be(model: Blip2, features: ImageFeatures):
    found = explain.match(model, features, "dog " * 10_000)
    assert len(found.words) == 33  # the 35 positions less the frame
    assert found.unread == model.unread("dog " * 10_000) > 9_000


def test_models_without_heads_show_their_queries_and_say_so_about_texts():
    writer = tiny_model.build(heads=False)
    assert explain.queries(writer, tiny_model.picture(1)).attention.shape == (4, PATCHES)
    assert explain.caption(writer, tiny_model.picture(1)).words
    with pytest.raises(ConfigError, match="leave the text out"):
        explain.match(writer, tiny_model.picture(1), TEXT)


def test_models_without_a_language_model_write_nothing_to_explain():
    with pytest.raises(ConfigError, match="no language model"):
        explain.caption(tiny_model.build(language=False), tiny_model.picture(1))


@pytest.mark.parametrize("text", ["", "  \n"])
def test_an_empty_text_is_refused(model: Blip2, features: ImageFeatures, text: str):
    with pytest.raises(PromptError, match="empty"):
        explain.match(model, features, text)


def test_layers_images_and_encoders_that_cannot_be_explained_are_named(model: Blip2, features: ImageFeatures):
    with pytest.raises(ConfigError, match=r"layer 1 .* are 0"):
        explain.queries(model, features, layer=1)
    with pytest.raises(ConfigError, match=r"one image .* not 2"):
        explain.queries(model, ImageFeatures.concatenate([features, features]))
    with pytest.raises(ConfigError, match="5 wide, this model's 12"):
        explain.queries(model, dataclasses.replace(features, patches=features.patches[..., :5]))
    with pytest.raises(ConfigError, match="9 patches, this model's 17"):
        explain.queries(model, dataclasses.replace(features, patches=features.patches[:, :9]))

    class Silent:
        width = 12

    with pytest.raises(ConfigError, match="Silent does not say where"):
        explain.queries(dataclasses.replace(model, encoder=Silent()), features)  # pyright: ignore[reportArgumentType]


def test_words_are_what_stands_between_spaces(model: Blip2, features: ImageFeatures):
    found = explain.match(model, features, "a dog, what?  yes.")
    assert [word.text for word in found.words] == ["a", "dog,", "what?", "yes."]


def test_tokens_within_a_word_are_hidden_together(model: Blip2, features: ImageFeatures):
    found = explain.match(model, features, "dog?")
    ids = model.text_ids(["dog?"]).repeat(2, 1)
    ids[1, 1:3] = model.config.qformer.pad_id
    logits = model.match_logits(features, ids, torch.tensor([[0, 0], [0, 1]]))
    odds = logits[:, 1] - logits[:, 0]
    assert found.words[0].score == pytest.approx((odds[0] - odds[1]).item(), abs=1e-4)
