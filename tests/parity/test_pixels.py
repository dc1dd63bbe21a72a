"""Pixels equal to those of transformers' PIL processor, bit for bit: every mode, odd sizes, extreme shapes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from blip2 import image
from blip2.config import CLIP_MEAN, CLIP_STD

OPAQUE = ("RGB", "L", "P", "CMYK", "1", "YCbCr", "HSV", "LAB")
CLEAR = ("RGBA", "LA", "PA")
SIZES = [(1, 1), (1, 300), (300, 1), (2, 999), (1001, 3), (223, 225), (224, 224), (17, 31), (640, 427), (97, 1024)]
SIDES = (224, 364)  # as published


def drawn(width: int, height: int, mode: str, seed: int = 0) -> Image.Image:
    """Noise of a mode, transparent in places where the mode can be."""
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 4), dtype=np.uint8)
    colours = Image.fromarray(noise)
    if mode == "PA":
        made = colours.convert("RGB").convert("P").convert("PA")
        made.putalpha(colours.getchannel("A"))
        return made
    return (colours if mode in ("RGBA", "LA") else colours.convert("RGB")).convert(mode)


def theirs(picture: Image.Image, side: int) -> torch.Tensor:
    processor = transformers.BlipImageProcessorPil(size={"height": side, "width": side})
    return processor(picture, return_tensors="pt")["pixel_values"]


def ours(picture: Image.Image, side: int) -> torch.Tensor:
    return image.Transform(side, CLIP_MEAN, CLIP_STD)(picture)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_opaque_mode_from_opening_to_pixels(size: tuple[int, int], side: int):
    for mode in OPAQUE:
        picture = drawn(*size, mode)
        assert picture.mode == mode
        assert torch.equal(ours(image.open(picture), side), theirs(picture, side)), mode


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_what_is_transparent_is_laid_on_white_before_and_the_transform_alone_is_theirs(size: tuple[int, int]):
    for mode in CLEAR:
        picture = drawn(*size, mode)
        assert picture.mode == mode
        white = Image.new("RGBA", picture.size, "white")
        on_white = Image.alpha_composite(white, picture.convert("RGBA")).convert("RGB")
        assert torch.equal(ours(image.open(picture), 224), theirs(on_white, 224)), mode


def test_a_picture_on_its_side_is_turned_before_and_the_transform_alone_is_theirs():
    picture = drawn(50, 31, "RGB")
    turned = picture.transpose(Image.Transpose.ROTATE_270)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by a quarter to the right
    picture.info["exif"] = exif.tobytes()
    assert torch.equal(ours(image.open(picture), 224), theirs(turned, 224))
    assert not torch.equal(ours(image.open(picture), 224), theirs(picture, 224))


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    width=st.integers(1, 400),
    height=st.integers(1, 400),
    mode=st.sampled_from(OPAQUE),
    side=st.integers(1, 300),
    seed=st.integers(0, 99),
)
def test_any_size_to_any_size(width: int, height: int, mode: str, side: int, seed: int):
    picture = drawn(width, height, mode, seed)
    assert torch.equal(ours(image.open(picture), side), theirs(picture, side))


def test_a_batch_of_many_shapes_is_the_pictures_one_by_one():
    pictures = [drawn(*size, mode, seed) for seed, (size, mode) in enumerate(zip(SIZES, OPAQUE, strict=False))]
    processor = transformers.BlipImageProcessorPil(size={"height": 224, "width": 224})
    expected = processor(pictures, return_tensors="pt")["pixel_values"]
    transform = image.Transform(224, CLIP_MEAN, CLIP_STD)
    assert torch.equal(transform([image.open(picture) for picture in pictures]), expected)
