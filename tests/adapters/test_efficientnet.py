"""The real encoder of the extra `mini`, on pixels made here."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from blip2 import adapters
from blip2.adapters.efficientnet import (
    COLOUR_MEAN,
    COLOUR_RMS,
    LEVEL_RMS,
    MAP_RMS,
    POOLED_RMS,
    EfficientNetLite,
    class_names,
    load,
)
from blip2.adapters.parts import require
from blip2.config import PartConfig
from blip2.errors import ConfigError, ImageError
from blip2.protocols import ImageEncoder, Placed

PART = PartConfig("efficientnet-lite2", width=1280)


@pytest.fixture(scope="module")
def encoder() -> EfficientNetLite:
    return adapters.image_encoder(PART)


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    """Three smooth pictures: noise has no likely class."""
    coarse = torch.rand(3, 3, 6, 6, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return F.interpolate(coarse, size=260, mode="bicubic", align_corners=False).clamp(-1, 1)


def test_it_is_an_image_encoder_with_the_tokens_it_promises(encoder: EfficientNetLite, pixels: Tensor) -> None:
    assert isinstance(encoder, ImageEncoder)
    patches = encoder(pixels)
    assert patches.shape == (3, encoder.tokens, encoder.width) == (3, 31, 1280)
    assert patches.dtype == torch.float32
    assert not patches.requires_grad


def test_its_normalisation_is_the_one_it_was_trained_with(encoder: EfficientNetLite) -> None:
    values = torch.arange(256, dtype=torch.float64)
    ours = (values / 255 - encoder.mean[0]) / encoder.std[0]
    torch.testing.assert_close(ours, (values - 127) / 128, rtol=0, atol=1e-15)
    assert len({*encoder.mean}) == len({*encoder.std}) == 1


def test_the_folded_network_computes_what_the_package_does(encoder: EfficientNetLite, pixels: Tensor) -> None:
    original = require("efficientnet_lite_pytorch", "the test").EfficientNet.from_name("efficientnet-lite2").eval()
    (path,) = adapters.efficientnet.weights()
    original.load_state_dict(torch.load(path, weights_only=True))
    with torch.no_grad():
        expected = original(pixels).softmax(-1)
    # float32 rounding through 50 layers: 2.5e-7 at worst on these pictures
    torch.testing.assert_close(encoder.class_probabilities(pixels), expected, rtol=1e-4, atol=1e-6)


def test_batched_equals_unbatched(encoder: EfficientNetLite, pixels: Tensor) -> None:
    # other kernels for other sizes: 1.3e-5 at worst on these pictures
    alone = torch.cat([encoder(picture[None]) for picture in pixels])
    torch.testing.assert_close(encoder(pixels), alone, rtol=1e-4, atol=1e-4)


def test_it_stays_frozen_and_in_evaluation_mode(encoder: EfficientNetLite, pixels: Tensor) -> None:
    before = encoder(pixels)
    encoder.train()
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    torch.testing.assert_close(encoder(pixels), before, rtol=0, atol=0)


def test_a_gradient_reaches_the_pixels(encoder: EfficientNetLite, pixels: Tensor) -> None:
    picture = pixels[:1].clone().requires_grad_()
    encoder(picture).square().sum().backward()
    assert picture.grad is not None
    assert picture.grad.abs().sum() > 0


@torch.no_grad()
def test_what_lies_beside_the_grid_is_the_whole_picture_and_its_likeliest_classes(
    encoder: EfficientNetLite, pixels: Tensor
) -> None:
    assert isinstance(encoder, Placed)
    names, likeliest = class_names(), encoder.class_probabilities(pixels).topk(5).indices.tolist()
    for patches, classes in zip(encoder(pixels), likeliest, strict=True):
        places = encoder.places(patches)
        assert places.beside == ("whole picture", *(f"class: {names[number]}" for number in classes))
        assert (places.rows, places.columns, places.count) == (5, 5, len(patches))
        numbers = torch.arange(31)
        assert places.grid(numbers).flatten().tolist() == list(range(1, 26))
        assert places.rest(numbers).tolist() == [0, 26, 27, 28, 29, 30]


@pytest.fixture(scope="module")
def levels() -> EfficientNetLite:
    return load(levels=True)


@torch.no_grad()
def test_earlier_levels_stand_beside_the_map_and_change_nothing_else(
    encoder: EfficientNetLite, levels: EfficientNetLite, pixels: Tensor
) -> None:
    assert isinstance(levels, ImageEncoder)
    patches = levels(pixels)
    assert patches.shape == (len(pixels), levels.tokens, 1280) == (len(pixels), 56, 1280)
    assert torch.equal(torch.cat([patches[:, :26], patches[:, -5:]], 1), encoder(pixels))
    places = levels.places(patches[0])
    assert (places.grids, places.count, places.beside) == (2, 56, encoder.places(patches[0]).beside)
    numbers = torch.arange(56)
    assert places.grid(numbers).flatten().tolist() == [2 * number + 27 for number in range(25)]
    assert places.rest(numbers).tolist() == [0, *range(51, 56)]


@torch.no_grad()
def test_an_earlier_level_is_the_package_s_own_channels_before_the_scale_of_their_norm(
    levels: EfficientNetLite, pixels: Tensor
) -> None:
    original = require("efficientnet_lite_pytorch", "the test").EfficientNet.from_name("efficientnet-lite2").eval()
    original.load_state_dict(torch.load(adapters.efficientnet.weights()[0], weights_only=True))
    seen: dict[int, Tensor] = {}
    for number in LEVEL_RMS:
        norm = original._blocks[number]._bn0
        norm.register_forward_hook(lambda _, __, out, number=number: seen.update({number: out.clone()}))
    original.extract_features(pixels)
    at = 6  # after the colours
    for number, rms in LEVEL_RMS.items():
        norm = original._blocks[number]._bn0
        spread = norm.weight.abs()
        draws = norm.bias + spread * torch.linspace(-4, 4, 4001)[:, None]  # N(bias, spread^2), cut off at 0
        density = torch.exp(-torch.linspace(-4, 4, 4001).square() / 2)[:, None]
        mean = (draws.relu() * density).sum(0) / density.sum()
        pooled = F.adaptive_avg_pool2d(seen[number].clamp(0, 6), 5).flatten(2).transpose(1, 2)
        expected = (pooled - mean) / (spread * rms)
        found = levels(pixels)[:, 26:51, at : at + len(spread)]
        torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-2)
        at += len(spread)
    assert at == 1158
    assert not levels(pixels)[:, 26:51, at:].any()


@torch.no_grad()
def test_a_cell_says_its_colour(levels: EfficientNetLite) -> None:
    picture = torch.full((1, 3, 260, 260), -0.9)
    picture[:, 0, :52, :52] = 0.9  # red above, to the left
    tokens = levels(picture)[0, 26:51]
    (middle, spread), (rms, _) = COLOUR_MEAN, COLOUR_RMS
    torch.testing.assert_close(tokens[0, :3], (torch.tensor([0.9, -0.9, -0.9]) - middle) / rms)
    torch.testing.assert_close(tokens[24, :3], (torch.tensor([-0.9] * 3) - middle) / rms)
    torch.testing.assert_close(tokens[0, 3:6], torch.full((3,), -spread / COLOUR_RMS[1]), rtol=0, atol=0.05)


@torch.no_grad()
def test_earlier_levels_in_half_precision_are_nearly_those_in_float32(pixels: Tensor) -> None:
    exact, half = load(levels=True), load(levels=True).to(torch.bfloat16)
    flat = torch.full_like(pixels[:1], 0.9)
    flat[..., ::2] = 0.908
    for picture in (pixels, flat):
        found, wanted = half(picture.bfloat16())[:, 26:51], exact(picture.bfloat16().float())[:, 26:51]
        assert found.dtype is torch.bfloat16
        torch.testing.assert_close(found[..., :6].float(), wanted[..., :6], rtol=0.01, atol=0.01)  # colours
        assert (found.float() - wanted).square().mean().sqrt() < 0.2 * wanted.square().mean().sqrt()


def test_a_prototype_s_earlier_levels_are_noise_of_a_picture_s_size(levels: EfficientNetLite) -> None:
    patches = levels.prototypes([3, 3, 700], [0, 1, 0])
    assert patches.shape == (3, 56, 1280)
    noise = patches[:, 26:51, :1158]
    assert noise.square().mean().sqrt() == pytest.approx(1, abs=0.05)
    assert not torch.equal(noise[0], noise[1])
    shared = noise.mean(1).square().mean().sqrt()
    assert shared == pytest.approx(0.53, abs=0.06)  # the cells of one picture agree in part
    assert not patches[:, 26:51, 1158:].any()


@pytest.mark.parametrize("grid", [1, 4, 9])
def test_the_grid_is_the_map_pooled(grid: int, encoder: EfficientNetLite, pixels: Tensor) -> None:
    other = load(grid)
    patches = other(pixels[:1])
    assert patches.shape == (1, 1 + grid**2 + 5, 1280)
    torch.testing.assert_close(patches[:, 0], encoder(pixels[:1])[:, 0])
    torch.testing.assert_close(patches[:, -5:], encoder(pixels[:1])[:, -5:])
    if grid == 9:  # untouched: its mean is the pooled feature
        mean = patches[:, 1:-5].mean(1) * adapters.efficientnet.MAP_RMS
        torch.testing.assert_close(mean, patches[:, 0] * adapters.efficientnet.POOLED_RMS)


@pytest.mark.parametrize("grid", [0, 10])
def test_a_grid_that_the_map_cannot_give_is_an_error(grid: int) -> None:
    with pytest.raises(ConfigError, match=f"grid of {grid}"):
        load(grid)


def test_pixels_of_another_size_are_an_error(encoder: EfficientNetLite) -> None:
    with pytest.raises(ImageError, match=r"\(B, 3, 260, 260\), not \(1, 3, 224, 224\)"):
        encoder(torch.zeros(1, 3, 224, 224))


def test_class_tokens_say_which_class_and_how_sure_through_a_layer_norm(
    encoder: EfficientNetLite, pixels: Tensor
) -> None:
    sureness, classes = encoder.class_probabilities(pixels).topk(5)
    tokens = F.layer_norm(encoder(pixels)[:, -5:], (1280,))
    blank, rows = F.layer_norm(encoder._blank, (1280,)), F.layer_norm(encoder._rows, (1280,))
    doubt = (tokens @ blank / 1280).square()
    torch.testing.assert_close(1 - doubt, sureness, rtol=0, atol=0.05)  # rows are not quite orthogonal to the blank
    without = tokens - (tokens @ blank / 1280)[..., None] * blank
    torch.testing.assert_close((without @ rows.T).argmax(-1), classes)


def test_prototypes_are_what_the_encoder_would_say(encoder: EfficientNetLite) -> None:
    every = list(range(1000))
    assert encoder.classes == len(class_names()) == 1000
    patches = encoder.prototypes(every, [0] * 1000)
    assert patches.shape == (1000, encoder.tokens, 1280)
    likeliest = F.layer_norm(patches[:, -5], (1280,)) @ encoder._rows.T
    torch.testing.assert_close(likeliest.argmax(-1), torch.arange(1000))
    torch.testing.assert_close(patches[:, -5:].square().mean(-1).sqrt(), torch.ones(1000, 5), rtol=0, atol=0.06)


def test_the_classifier_knows_the_class_of_a_prototype_by_its_pooled_feature_and_by_its_map(
    encoder: EfficientNetLite,
) -> None:
    every = list(range(0, 1000, 7))
    patches = encoder.prototypes(every, [3] * len(every))
    for feature in (patches[:, 0] * POOLED_RMS, patches[:, 1:26].mean(1) * MAP_RMS):
        assert (feature >= 0).all()
        right = encoder._probabilities(feature).argmax(-1) == torch.tensor(every)
        assert right.float().mean() > 0.9
    assert patches[:, :26].square().mean().sqrt() == pytest.approx(0.93, abs=0.1)  # a picture's is about 1


def test_a_prototype_is_the_same_for_the_same_draw_whatever_stands_beside_it(encoder: EfficientNetLite) -> None:
    together = encoder.prototypes([5, 9, 5], [0, 1, 1])
    assert torch.equal(together[1:2], encoder.prototypes([9], [1]))
    assert not torch.equal(together[0, :26], together[2, :26])
    assert not torch.equal(together[0, 26:], together[2, 26:]), "as sure of a class in each view"


def test_the_classifier_is_as_sure_of_prototypes_as_their_class_tokens_say(encoder: EfficientNetLite) -> None:
    every = list(range(0, 1000, 3))
    patches = encoder.prototypes(every, [7] * len(every))
    blank = encoder._blank / encoder._blank.norm()
    said = 1 - (patches[:, -5] @ blank).square() / 1280  # what is not the blank of a class token is its probability
    given = encoder._probabilities(patches[:, 0] * POOLED_RMS)[torch.arange(len(every)), torch.tensor(every)]
    assert said.median() == pytest.approx(0.25, abs=0.05)
    assert said.min() > 0.02
    assert said.max() < 0.97
    assert (said - given).abs().mean() < 0.12
    assert (patches[:, -5:] @ blank).square().mean(0).diff().min() > 0, "the likeliest first"


def test_the_names_stand_in_the_order_of_the_classifier(encoder: EfficientNetLite) -> None:
    """An order off by one anywhere would part the classes that are nearest in meaning."""
    names = class_names()
    rows = F.normalize(encoder._rows, dim=1)
    nearest = (rows @ rows.T).fill_diagonal_(-1).argmax(1).tolist()
    pairs = {names[index]: names[other] for index, other in enumerate(nearest)}
    for name in ("missile", "sunglasses"):  # two classes each, which only their rows can tell to be the same
        first, second = (index for index, other in enumerate(names) if other == name)
        assert (nearest[first], nearest[second]) == (second, first)
    for name, other in (("toilet paper", "paper towel"), ("Golden Retriever", "Labrador Retriever")):
        assert pairs[name] == other
    dogs = range(names.index("Chihuahua"), names.index("Mexican hairless dog") + 1)
    assert sum(nearest[index] in dogs for index in dogs) / len(dogs) > 0.97


def test_the_names_read_as_in_a_sentence() -> None:
    assert not [name for name in class_names() if set(name) & set("()/,_") or name != name.strip()]
