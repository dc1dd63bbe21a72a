"""LAVIS's processors: pictures to pixels, texts to what the models were trained on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from published import picture

from blip2.compat.lavis.processors import BlipCaptionProcessor, BlipQuestionProcessor, load_processor
from blip2.config import CLIP_MEAN, CLIP_STD
from blip2.errors import ConfigError, ImageError


def test_a_picture_is_squeezed_scaled_and_normalised():
    found = load_processor("blip_image_eval", {"name": "blip_image_eval", "image_size": 28})(picture(1))
    square = np.asarray(picture(1).resize((28, 28), Image.Resampling.BICUBIC), np.float32) / 255
    expected = (square - np.float32(CLIP_MEAN)) / np.float32(CLIP_STD)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.from_numpy(expected).permute(2, 0, 1))


def test_exif_is_left_alone_as_lavis_does():
    turned = picture(1)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.info["exif"] = exif.tobytes()
    eval_ = load_processor("blip_image_eval").build(image_size=28)
    assert torch.equal(eval_(turned), eval_(picture(1)))


@pytest.mark.parametrize("name", ["blip_image_train", "blip2_image_train"])
def test_views_for_training_follow_the_seed_of_torch(name: str):
    train = load_processor(name).build(image_size=28)
    torch.manual_seed(3)
    first, second = train(picture(1)), train(picture(1))
    torch.manual_seed(3)
    assert torch.equal(train(picture(1)), first)
    assert first.shape == (3, 28, 28)
    assert not torch.equal(first, second)


def test_sizes_are_lavis_s_where_none_is_given():
    sizes = {name: load_processor(name).image_size for name in ("blip_image_eval", "blip_image_train")}
    assert sizes == {"blip_image_eval": 384, "blip_image_train": 384}
    assert load_processor("blip2_image_train").image_size == 364
    assert load_processor("blip2_image_train", {"image_size": 224}).image_size == 224


# What LAVIS's two functions give, worked out by hand from their rules.
CAPTIONS = [
    ("A Dog, running!", "a dog, running"),
    ('He said: "no" (twice)...', "he said no twice"),
    ("  two  spaces\n", "two spaces"),
    ("one\ntwo", "one\ntwo"),
    ("semi;colon #tag ~3* a.b", "semi colon tag 3 a b"),
    ("What is this?", "what is this?"),
    ("", ""),
]
QUESTIONS = [
    ("What's (roughly) this?", "what's roughly this?"),
    ("Is it a #1. or not?  ", "is it a 1 or not?"),
    (" Leading space", " leading space"),
]


@pytest.mark.parametrize(("given", "expected"), CAPTIONS)
def test_captions_lose_case_and_punctuation(given: str, expected: str):
    assert BlipCaptionProcessor()(given) == expected
    assert load_processor("blip_caption", {"prompt": "a photo of "})(given) == f"a photo of {expected}"


@pytest.mark.parametrize(("given", "expected"), QUESTIONS)
def test_questions_too(given: str, expected: str):
    assert BlipQuestionProcessor()(given) == expected


def test_texts_are_cut_after_so_many_words():
    assert BlipCaptionProcessor(max_words=2)("one two three") == "one two"
    assert load_processor("blip_question", {"max_words": 3})("a b c d") == "a b c"
    assert len(BlipCaptionProcessor()("word " * 60).split()) == 50


def test_errors_name_what_is_wrong():
    with pytest.raises(ConfigError, match="processor 'clip_image_eval': there are blip_image_eval"):
        load_processor("clip_image_eval")
    with pytest.raises(ConfigError, match=r"BlipCaptionProcessor: unknown setting 'promt'; known are prompt, "):
        load_processor("blip_caption", {"promt": "x"})
    with pytest.raises(ImageError, match="a ndarray, not a PIL image"):
        load_processor("blip_image_eval")(np.zeros((4, 4, 3), np.uint8))
    with pytest.raises(ImageError, match="is in mode L, not RGB"):
        load_processor("blip_image_eval")(picture(1).convert("L"))
    with pytest.raises(ConfigError, match="a list, not a text"):
        BlipCaptionProcessor()(["a"])  # type: ignore[arg-type]
