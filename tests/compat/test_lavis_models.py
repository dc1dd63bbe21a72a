"""LAVIS's calls against transformers on the same weights where it has them, and against blip2's own verbs.

Tolerances are for float32 sums in another order; the worst difference seen was 3e-6 of the largest value.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from published import picture
from tiny_lavis import CALLS, CLOSE, PROMPT, TEXTS, images, load, theirs_of, transformers
from torch import Tensor

from blip2.blip2 import Blip2
from blip2.compat.lavis import models
from blip2.decoding import Decoding
from blip2.errors import ConfigError, ImageError, PromptError


@pytest.fixture(scope="module", params=CALLS)
def writer(request: pytest.FixtureRequest, folders: dict[str, Path]) -> tuple[Any, Tensor]:
    """A model whose texts end, as random weights' never do: with a token that it likes to write."""
    model, pixels = load(folders, *CALLS[request.param])
    liked = model.core.caption(images(3), details=True, num_beams=1, max_new_tokens=9)[2].ids[4]
    model.core = dataclasses.replace(model.core, tokenizer=dataclasses.replace(model.core.tokenizer, stop_ids=(liked,)))
    return model, pixels


@pytest.fixture(scope="module")
def extractor(folders: dict[str, Path]) -> tuple[Any, Tensor]:
    return load(folders, "blip2_feature_extractor", "pretrain")


@pytest.fixture(scope="module")
def matcher(folders: dict[str, Path]) -> tuple[Any, Tensor]:
    return load(folders, "blip2_image_text_matching", "pretrain")


# -- texts -------------------------------------------------------------------------------------------------------------

WAYS: list[tuple[dict[str, Any], dict[str, Any]]] = [  # LAVIS's keywords, transformers' for the same
    ({}, {"num_beams": 5, "max_new_tokens": 30, "min_length": 1}),
    ({"num_beams": 1, "max_length": 8}, {"num_beams": 1, "max_new_tokens": 8}),
    (
        {"max_length": 12, "min_length": 6, "length_penalty": -1.0, "repetition_penalty": 1.5},
        {
            "num_beams": 5, "max_new_tokens": 12, "min_new_tokens": 6, "length_penalty": -1.0,
            "repetition_penalty": 1.5,
        },
    ),
    (
        {"num_beams": 3, "num_captions": 3, "max_length": 9},
        {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 9},
    ),
]  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize(("ours", "theirs"), WAYS, ids=str)
@pytest.mark.parametrize("prompt", [None, PROMPT])
def test_texts_are_those_of_transformers_from_lavis_s_inputs(
    writer: tuple[Any, Tensor],
    folders: dict[str, Path],
    ours: dict[str, Any],
    theirs: dict[str, Any],
    prompt: str | None,
):
    """Queries, then the prompt, given to the language model as embeddings: what LAVIS does."""
    model, pixels = writer
    kind, stop = model.core.config.language.kind, model.core.tokenizer.stop_ids[0]
    reference = theirs_of(folders, kind)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders[kind])
    seen = reference.get_image_features(pixels).pooler_output
    read = tokenizer([prompt or ""] * 3, return_tensors="pt")
    words = reference.language_model.get_input_embeddings()(read.input_ids)
    lengths = dict(theirs)
    if kind == "t5" and "min_new_tokens" in lengths:
        lengths["min_length"] = lengths.pop("min_new_tokens")  # of the decoder's ids, its start among them
    written = reference.language_model.generate(
        inputs_embeds=torch.cat([seen, words], 1),
        attention_mask=torch.ones(3, seen.shape[1] + words.shape[1], dtype=torch.int64),
        eos_token_id=stop,
        do_sample=False,
        **lengths,
    )
    rows = [row[: row.index(stop)] if stop in row else row for row in written.tolist()]
    expected = [text.strip() for text in tokenizer.batch_decode(rows, skip_special_tokens=True)]
    samples = {"image": pixels} if prompt is None else {"image": pixels, "prompt": prompt}
    assert model.generate(samples, **ours) == expected


def test_defaults_are_five_beams_and_thirty_tokens(writer: tuple[Any, Tensor]):
    model, pixels = writer
    least = 0 if model.core.config.language.kind == "t5" else 1
    expected = model.core.caption(images(3), prompt="", num_beams=5, max_new_tokens=30, min_new_tokens=least)
    assert model.generate({"image": pixels}) == expected
    assert len(set(expected)) > 1, "different texts for different pictures, or nothing is seen"


def test_each_image_may_have_its_own_prompt(writer: tuple[Any, Tensor]):
    model, pixels = writer
    prompts = ["a photo of", "", "two words and more"]
    together = model.generate({"image": pixels, "prompt": prompts}, max_length=8)
    apart = [model.generate({"image": pixels[[n]], "prompt": prompts[n]}, max_length=8)[0] for n in range(3)]
    assert together == apart


def test_models_fine_tuned_on_coco_start_from_their_prompt(folders: dict[str, Path]):
    model = models.load_model("blip2_opt", "caption_coco_opt2.7b", True, checkpoint=folders["opt"])
    pixels = load(folders, *CALLS["opt"])[1]
    expected = model.core.caption(images(3), prompt="a photo of", num_beams=5, min_new_tokens=1)
    assert model.prompt == "a photo of"
    assert model.generate({"image": pixels}) == expected
    assert model.generate({"image": pixels, "prompt": ""}) == model.core.caption(images(3), min_new_tokens=1)


def test_nucleus_sampling_is_beams_drawn_among_the_likeliest(writer: tuple[Any, Tensor]):
    model, pixels = writer
    drawn: dict[str, Any] = {"do_sample": True, "top_k": 50, "top_p": 0.9, "temperature": 1.3}
    for beams in (1, 5):
        torch.manual_seed(4)
        ours = model.generate(
            {"image": pixels}, use_nucleus_sampling=True, num_beams=beams, temperature=1.3, min_length=0, max_length=9
        )
        torch.manual_seed(4)
        assert ours == model.core.caption(images(3), prompt="", num_beams=beams, max_new_tokens=9, **drawn)
    torch.manual_seed(4)
    options = {"use_nucleus_sampling": True, "num_beams": 1, "num_captions": 4, "temperature": 2.0}
    assert len(set(model.generate({"image": pixels[:1]}, **options))) > 1
    greedy = model.generate({"image": pixels}, num_beams=1)
    assert model.generate({"image": pixels}, num_beams=1, top_p=0.1, temperature=9.0) == greedy


def test_answers_are_those_of_ask(writer: tuple[Any, Tensor]):
    model, pixels = writer
    questions = ["how many?", "is it day?", "what?"]
    template = model.core.config.prompts.question
    samples = {"image": pixels, "text_input": questions}
    t5 = model.core.config.language.kind == "t5"
    options = {"num_beams": 5, "max_new_tokens": 10, "min_new_tokens": 0 if t5 else 1}
    expected = model.core.ask(images(3), questions, length_penalty=-1.0 if t5 else 0.0, **options)
    assert model.predict_answers(samples, prompt=template) == expected
    assert model.predict_answers(samples, prompt=template, length_penalty=2.0) == model.core.ask(
        images(3), questions, length_penalty=2.0, **options
    )
    bare = model.generate({"image": pixels, "prompt": questions}, max_length=10, length_penalty=-1.0 if t5 else 0.0)
    assert model.predict_answers(samples) == bare
    assert model.predict_answers({"image": pixels[:1], "text_input": questions[0]}) == bare[:1]


def test_answers_are_as_short_as_in_lavis_by_default(writer: tuple[Any, Tensor], monkeypatch: pytest.MonkeyPatch):
    model, pixels = writer
    seen: list[Decoding] = []
    write = Blip2.write
    monkeypatch.setattr(Blip2, "write", lambda *given: seen.append(given[3]) or write(*given))
    for penalty in (None, 0.5):
        model.predict_answers({"image": pixels[:1], "text_input": "what?"}, length_penalty=penalty)
    usual = -1.0 if model.core.config.language.kind == "t5" else 0.0
    assert [decoding.length_penalty for decoding in seen] == [usual, 0.5]


def test_given_answers_are_ranked(writer: tuple[Any, Tensor]):
    model, pixels = writer
    samples = {"image": pixels, "text_input": ["day?"] * 3}
    ranked = model.predict_answers(
        samples, inference_method="rank", answer_list=["yes", "no", "three"], prompt=model.core.config.prompts.question
    )
    assert ranked == model.core.ask(images(3), ["day?"] * 3, choices=["yes", "no", "three"])
    assert model.predict_answers(samples, answer_list=["yes", "no"]) == model.predict_answers(samples)


# -- features and matches ----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_features_are_those_of_transformers_in_lavis_s_shapes(extractor: tuple[Any, Tensor], folders: dict[str, Path]):
    model, pixels = extractor
    reference = theirs_of(folders, "itm")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders["itm"])
    seen = reference.vision_model(pixels).last_hidden_state
    looked = reference.qformer(query_embeds=reference.query_tokens.expand(3, -1, -1), encoder_hidden_states=seen)
    found = model.extract_features({"image": pixels}, mode="image")
    assert found.image_embeds.shape == (3, 4, 16)
    torch.testing.assert_close(found.image_embeds, looked.last_hidden_state, **CLOSE)
    vectors = F.normalize(reference.vision_projection(looked.last_hidden_state), dim=-1)
    torch.testing.assert_close(found.image_embeds_proj, vectors, **CLOSE)
    assert [*found] == ["image_embeds", "image_embeds_proj"]

    text = tokenizer(TEXTS, return_tensors="pt", padding=True)
    other = transformers.Blip2TextModelWithProjection.from_pretrained(folders["itm"]).eval()
    expected = other(input_ids=text.input_ids, attention_mask=text.attention_mask)
    found = model.extract_features({"text_input": TEXTS}, mode="text")
    assert found.text_embeds_proj.shape == (2, text.input_ids.shape[1], 8), "every token's, not [B, 256]"
    torch.testing.assert_close(found.text_embeds, expected.last_hidden_state, **CLOSE)
    torch.testing.assert_close(found.text_embeds_proj, expected.text_embeds, **CLOSE)
    torch.testing.assert_close(found.text_embeds_proj[:, 0], model.core.embed_texts(TEXTS), **CLOSE)


@torch.no_grad()
def test_multimodal_features_are_what_the_matching_head_reads(extractor: tuple[Any, Tensor], matcher: Any):
    model, pixels = extractor
    samples = {"image": pixels, "text_input": [*TEXTS, "a red cat, far away"]}
    found = model.extract_features(samples)
    assert found.multimodal_embeds.shape == (3, 4, 16)
    assert [*found] == ["multimodal_embeds"]
    logits = model.bridge.heads.itm_head(found.multimodal_embeds).mean(1)
    torch.testing.assert_close(logits, matcher[0](samples), **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("text", ["a dog on grass", "two"])
def test_matches_are_those_of_transformers(matcher: tuple[Any, Tensor], folders: dict[str, Path], text: str):
    model, pixels = matcher
    reference = theirs_of(folders, "itm")
    ids = transformers.AutoTokenizer.from_pretrained(folders["itm"])([text] * 3, return_tensors="pt")
    slots = F.pad(ids.input_ids, (4, 0), value=reference.config.image_token_index)  # which transformers cuts off again
    both = {"pixel_values": pixels, "input_ids": slots, "attention_mask": torch.ones_like(slots)}
    logits = reference(**both, use_image_text_matching_head=True).logits_per_image
    torch.testing.assert_close(model({"image": pixels, "text_input": [text] * 3}), logits, **CLOSE)
    cosines = reference(**both).logits_per_image.diagonal()[:, None]
    found = model({"image": pixels, "text_input": [text] * 3}, match_head="itc")
    assert found.shape == (3, 1)
    torch.testing.assert_close(found, cosines, **CLOSE)


@torch.no_grad()
def test_texts_of_different_lengths_match_as_alone(matcher: tuple[Any, Tensor]):
    model, pixels = matcher
    for head in ("itm", "itc"):
        together = model({"image": pixels[:2], "text_input": TEXTS}, match_head=head)
        apart = [model({"image": pixels[[n]], "text_input": TEXTS[n]}, match_head=head) for n in range(2)]
        torch.testing.assert_close(together, torch.cat(apart), **CLOSE)


def test_features_are_taken_by_name_and_by_position(extractor: tuple[Any, Tensor]):
    model, pixels = extractor
    found = model.extract_features({"image": pixels}, mode="image")
    assert found[0] is found["image_embeds"] is found.image_embeds
    assert found[1] is found.image_embeds_proj
    assert [*found] == ["image_embeds", "image_embeds_proj"]
    assert len(found) == len(found[:]) == 2
    with pytest.raises(KeyError, match="text_embeds"):
        found["text_embeds"]
    with pytest.raises(IndexError):
        found[2]


# -- errors ----------------------------------------------------------------------------------------------------------


def test_what_is_wrong_with_a_sample_is_named(writer: tuple[Any, Tensor], extractor: tuple[Any, Tensor]):
    model, pixels = writer
    with pytest.raises(ConfigError, match="samples has no 'image', which this needs; it has prompt"):
        model.generate({"prompt": "a"})
    with pytest.raises(ImageError, match=r"\['image'\] is float32\[3, 28, 28\], not float\[B, 3, S, S\].*unsqueeze"):
        model.generate({"image": pixels[0]})
    with pytest.raises(ImageError, match="is uint8"):
        model.generate({"image": pixels.to(torch.uint8)})
    with pytest.raises(ImageError, match="is a Image"):
        model.generate({"image": picture(0)})
    with pytest.raises(ImageError, match="28 x 28 pixels, not"):
        model.generate({"image": torch.zeros(1, 3, 35, 35)})
    with pytest.raises(PromptError, match=r"samples\['prompt'\] holds 2 texts for 3 images"):
        model.generate({"image": pixels, "prompt": ["a", "b"]})
    with pytest.raises(PromptError, match=r"samples\['prompt'\] is a int"):
        model.generate({"image": pixels, "prompt": 3})
    with pytest.raises(PromptError, match=r"samples\['text_input'\] holds 1 texts for 3 images"):
        model.predict_answers({"image": pixels, "text_input": "a"})
    with pytest.raises(ConfigError, match="samples has no 'text_input'"):
        model({"image": pixels})
    with pytest.raises(PromptError, match="holds 2 texts for 3"):
        extractor[0].extract_features({"image": pixels, "text_input": TEXTS})
    with pytest.raises(ConfigError, match="samples has no 'image'"):
        extractor[0].extract_features({"text_input": TEXTS}, mode="image")
    with pytest.raises(PromptError, match="the Q-Former has 64 positions"):
        extractor[0].extract_features({"text_input": "a" * 70}, mode="text")


def test_what_is_wrong_with_a_choice_is_named(writer: Any, extractor: Any, matcher: Any):
    model, pixels = writer
    with pytest.raises(ConfigError, match="greedy decoding gives one caption, not 2"):
        model.generate({"image": pixels}, num_beams=1, num_captions=2)
    with pytest.raises(ConfigError, match="6 captions need as many beams, and there are 5"):
        model.generate({"image": pixels}, num_captions=6)
    with pytest.raises(ConfigError, match="inference_method 'score': there are 'generate' and 'rank'"):
        model.predict_answers({"image": pixels, "text_input": [*TEXTS, "a"]}, inference_method="score")
    with pytest.raises(ConfigError, match="'rank' chooses from answer_list"):
        model.predict_answers({"image": pixels, "text_input": [*TEXTS, "a"]}, inference_method="rank")
    with pytest.raises(ConfigError, match="blip2 has no lemmatizer"):
        model.predict_answers({"image": pixels, "text_input": [*TEXTS, "a"], "apply_lemmatizer": True})
    with pytest.raises(ConfigError, match="mode 'images': there are 'image', 'text' and 'multimodal'"):
        extractor[0].extract_features({"image": pixels}, mode="images")
    with pytest.raises(ConfigError, match="match_head 'both': there are 'itm' and 'itc'"):
        matcher[0]({"image": pixels, "text_input": TEXTS}, match_head="both")
    with pytest.raises(ConfigError, match="blip2_opt and blip2_t5 write"):
        extractor[0].generate({"image": pixels})
    with pytest.raises(ConfigError, match="no word head: its format keeps none"):
        extractor[0]({"image": pixels, "text_input": [*TEXTS, "a"]})
