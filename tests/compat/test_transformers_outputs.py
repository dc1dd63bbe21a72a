"""What the faces of transformers' classes compute is what its classes compute, on what transformers itself saved.

Every tolerance is for float32 sums in another order; the worst difference seen was 1.3e-6 of the largest value.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_hub import picture

from blip2.compat import transformers as compat
from blip2.errors import ConfigError, ImageError, PromptError

transformers = pytest.importorskip("transformers")

CLOSE = {"rtol": 1e-4, "atol": 3e-5}
PROMPTS = ["what is it?", "", "a photo of two"]
Pair = tuple[Any, Any, Any]


def close(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(ours, theirs, **CLOSE)


def inputs(processor: Any, side: str = "right") -> Any:
    processor.tokenizer.padding_side = side
    pictures = [picture(seed) for seed in range(len(PROMPTS))]
    return processor(images=pictures, text=PROMPTS, return_tensors="pt", padding=True)


def inputs_of(given: Any, row: int) -> dict[str, Any]:
    """One row's, without its padding."""
    real = given["attention_mask"][row].bool()
    one = {name: given[name][row : row + 1, real] for name in ("input_ids", "attention_mask")}
    return {**one, "pixel_values": given["pixel_values"][row : row + 1]}


def words(theirs: Any, given: Any, row: int | None = None) -> dict[str, Any]:
    """Besides the inputs: what an encoder-decoder's logits come after."""
    if not theirs.config.is_encoder_decoder:
        return {}
    rows = slice(len(given["input_ids"])) if row is None else slice(row, row + 1)
    return {"decoder_input_ids": torch.tensor([[0, 5, 9], [0, 7, 7], [0, 80, 3]])[rows]}


@pytest.mark.parametrize("side", ["right", "left"])
@torch.no_grad()
def test_logits_at_every_position_and_all_that_leads_to_them(pair: Pair, side: str):
    theirs, ours, processor = pair
    given = inputs(processor, side)
    expected = theirs(**given, **words(theirs, given))
    found = ours(**given, **words(theirs, given))
    real = given["attention_mask"].bool()
    if theirs.config.is_encoder_decoder and side == "left":  # between image and words, where theirs counts it as far
        assert not torch.allclose(
            expected.logits, theirs(**inputs(processor), **words(theirs, given)).logits, atol=1e-3
        )
        alone = [ours(**inputs_of(given, row), **words(theirs, given, row)).logits for row in range(len(PROMPTS))]
        close(found.logits, torch.cat(alone))
    elif theirs.config.is_encoder_decoder:
        close(found.logits, expected.logits)
        encoder = found.language_model_outputs.encoder_last_hidden_state
        close(encoder[real], expected.language_model_outputs.encoder_last_hidden_state[real])
    else:
        close(found.logits[real], expected.logits[real])
        assert bool((found.logits[~real] == 0).all())
    for name in ("vision_outputs", "qformer_outputs"):
        for value in ("last_hidden_state", "pooler_output"):
            close(found[name][value], expected[name][value])


def test_losses_and_their_gradients(pair: Pair):
    theirs, ours, processor = pair
    given = inputs(processor)
    labels = given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)
    labels[labels == processor.tokenizer.image_token_id] = -100
    losses = [model(**given, labels=labels).loss for model in (theirs, ours)]
    close(losses[1], losses[0])
    for model, loss in zip((theirs, ours), losses, strict=True):
        model.zero_grad()
        loss.backward()
    close(ours.language_projection.weight.grad, theirs.language_projection.weight.grad)
    close(ours.query_tokens.grad, theirs.query_tokens.grad)


@torch.no_grad()
def test_hidden_states_of_every_layer(pair: Pair):
    theirs, ours, processor = pair
    given = processor(picture(1), "two dogs", return_tensors="pt")
    expected = theirs(**given, **words(theirs, given), output_hidden_states=True).language_model_outputs
    found = ours(**given, **words(theirs, given), output_hidden_states=True)
    kinds = (
        ["encoder_hidden_states", "decoder_hidden_states"] if theirs.config.is_encoder_decoder else ["hidden_states"]
    )
    for kind in kinds:
        close(found.language_model_outputs[kind], expected[kind])
    close(
        found.vision_outputs.hidden_states,
        theirs.vision_model(given["pixel_values"], output_hidden_states=True).hidden_states,
    )
    assert len(found.qformer_outputs.hidden_states) == 4
    with pytest.raises(ConfigError, match="output_attentions"):
        ours(**given, **words(theirs, given), output_attentions=True)


@torch.no_grad()
def test_outputs_are_indexed_by_name_and_by_position(pair: Pair):
    theirs, ours, processor = pair
    given = processor(picture(1), "two dogs", return_tensors="pt")
    given.update(words(theirs, given))
    expected, found = theirs(**given), ours(**given)
    assert list(found)[:4] == list(expected)[:4] == [*found.keys()][:4]
    close(found[0], expected[0])
    close(found["logits"], expected["logits"])
    close(found.to_tuple()[1][0], expected.to_tuple()[1][0])
    assert "loss" not in found
    assert found.get("loss") is None
    assert isinstance(ours(**given, return_dict=False), tuple)


@torch.no_grad()
def test_features_of_images_queries_and_texts(pair: Pair, folders: dict[str, Path]):
    place = folders["t5" if pair[0].config.is_encoder_decoder else "opt"]
    theirs, ours = (of.Blip2Model.from_pretrained(place).eval() for of in (transformers, compat))
    pixels = inputs(pair[2])["pixel_values"]
    close(ours.get_image_features(pixels).last_hidden_state, theirs.get_image_features(pixels).last_hidden_state)
    close(ours.get_image_features(pixels).pooler_output, theirs.get_image_features(pixels).pooler_output)
    close(ours.get_qformer_features(pixels), theirs.get_qformer_features(pixels))
    prefix = pair[1].get_image_features(pixels), pair[0].get_image_features(pixels)
    close(prefix[0].pooler_output, prefix[1].pooler_output)
    texts = pair[2](text=PROMPTS, return_tensors="pt", padding=True)
    real = texts["attention_mask"].bool() & (texts["attention_mask"].sum(1) > 0)[:, None]
    some = real.any(1)
    arguments = {name: value[some] for name, value in texts.items()}
    expected, found = theirs.get_text_features(**arguments), ours.get_text_features(**arguments)
    close(found.last_hidden_state[real[some]], expected.last_hidden_state[real[some]])


@torch.no_grad()
def test_other_picture_sizes_interpolate_positions_where_asked_for(pair: Pair):
    theirs, ours, _ = pair
    for height, width in ((42, 42), (35, 49), (28, 28), (14, 14)):
        pixels = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(height))
        expected = theirs.vision_model(pixels, interpolate_pos_encoding=True).last_hidden_state
        close(ours.vision_model(pixels, interpolate_pos_encoding=True).last_hidden_state, expected)
    theirs.vision_model(torch.randn(1, 3, 14, 14))  # takes the positions of other places, and says nothing
    with pytest.raises(ImageError, match="28 x 28 pixels, not"):
        ours.vision_model(torch.randn(1, 3, 14, 14))


@torch.no_grad()
def test_the_q_former_on_any_embeddings(pair: Pair):
    theirs, ours, _ = pair
    generator = torch.Generator().manual_seed(5)
    embeds, patches = torch.randn(2, 6, 16, generator=generator), torch.randn(2, 9, 12, generator=generator)
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    arguments = {"query_embeds": embeds, "attention_mask": mask, "encoder_hidden_states": patches}
    expected = theirs.qformer(**arguments, output_hidden_states=True)
    found = ours.qformer(**arguments, output_hidden_states=True)
    close(found.last_hidden_state[0], expected.last_hidden_state[0])
    close(found.last_hidden_state[1, :4], expected.last_hidden_state[1, :4])
    close([state[0] for state in found.hidden_states], [state[0] for state in expected.hidden_states])


@torch.no_grad()
def test_parts_stand_alone(folders: dict[str, Path]):
    whole = transformers.Blip2ForConditionalGeneration.from_pretrained(folders["opt"]).eval()
    pixels = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    vision = compat.Blip2VisionModel.from_pretrained(folders["opt"])
    expected = whole.vision_model(pixels)
    close(vision(pixels)[0], expected[0])
    close(vision(pixels).pooler_output, expected.pooler_output)
    qformer = compat.Blip2QFormerModel.from_pretrained(folders["opt"])
    queries = whole.query_tokens.expand(2, -1, -1)
    close(
        qformer(queries, encoder_hidden_states=expected[0])[0],
        whole.qformer(queries, encoder_hidden_states=expected[0])[0],
    )
    given = {"query_embeds": queries, "encoder_hidden_states": expected[0]}
    for name, arguments, known in (  # theirs draws new weights for these names
        ("Blip2VisionModel", {"pixel_values": pixels}, expected),
        ("Blip2QFormerModel", given, whole.qformer(**given)),
    ):
        alone = getattr(transformers, name).from_pretrained(folders["opt"]).eval()
        assert not torch.allclose(alone(**arguments)[0], known[0])


@torch.no_grad()
def test_matching_and_comparing(folders: dict[str, Path]):
    theirs, ours = (
        of.Blip2ForImageTextRetrieval.from_pretrained(folders["itm"]).eval() for of in (transformers, compat)
    )
    processor = compat.AutoProcessor.from_pretrained(folders["itm"])
    given = inputs(processor)
    for head in (True, False):
        expected = theirs(**given, use_image_text_matching_head=head)
        found = ours(**given, use_image_text_matching_head=head)
        for name in ("logits_per_image", "logits_per_text", "image_embeds"):
            close(found[name], expected[name])
        count = 4 if head else 0
        real = given["attention_mask"].bool()[:, 4 - count :]
        close(
            found.text_embeds[real] if head else found.text_embeds,
            expected.text_embeds[real] if head else expected.text_embeds,
        )
        close(found.vision_model_output[0], expected.vision_model_output[0])
    with pytest.raises(PromptError, match="each needs 4 first"):
        ours(given["pixel_values"], given["input_ids"][:, 4:], given["attention_mask"][:, 4:])
    with pytest.raises(PromptError, match="the Q-Former has 64 positions"):
        ours(given["pixel_values"], torch.cat([given["input_ids"], given["input_ids"][:, 4:].repeat(1, 6)], 1))
    with pytest.raises(PromptError, match="takes pairs"):
        ours(given["pixel_values"][:2], given["input_ids"], given["attention_mask"], True)


@torch.no_grad()
def test_images_and_texts_in_one_space(folders: dict[str, Path]):
    processor = compat.AutoProcessor.from_pretrained(folders["itm"])
    given, texts = inputs(processor), processor(text=PROMPTS, return_tensors="pt", padding=True)
    names = "Blip2VisionModelWithProjection", "Blip2TextModelWithProjection"
    images, writings = (
        [getattr(of, name).from_pretrained(folders["itm"]).eval() for of in (transformers, compat)] for name in names
    )
    expected, found = (model(given["pixel_values"]) for model in images)
    close(found.image_embeds, expected.image_embeds)
    close(found.last_hidden_state, expected.last_hidden_state)
    expected, found = (model(**texts) for model in writings)
    real = texts["attention_mask"].bool()
    close(found.text_embeds[real], expected.text_embeds[real])
    close(found.last_hidden_state[real], expected.last_hidden_state[real])
