"""Image encoders of transformers in a directory: tiny random ones of several families."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from blip2 import adapters
from blip2.adapters.transformers_vision import TransformersVision
from blip2.config import PartConfig
from blip2.errors import CheckpointError, ConfigError, ImageError
from blip2.protocols import ImageEncoder, Placed

VIT: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 8,
}
TEXT: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
PIXELS = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4], "size": {"height": 32, "width": 32}}


def _clip() -> Any:
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=TEXT, vision_config=VIT, projection_dim=8))


def _convnext() -> Any:
    return transformers.ConvNextModel(transformers.ConvNextConfig(hidden_sizes=[4, 8, 12, 16], depths=[1, 1, 1, 1]))


ENCODERS: dict[str, tuple[Any, int, int]] = {  # how to make one, patches and those before the grid
    "vit": (lambda: transformers.ViTModel(transformers.ViTConfig(**VIT)), 17, 1),
    "dinov2 with registers": (
        lambda: transformers.Dinov2WithRegistersModel(
            transformers.Dinov2WithRegistersConfig(**VIT, num_register_tokens=4)
        ),
        21,
        5,
    ),
    "siglip": (lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**VIT)), 16, 0),
    "clip": (_clip, 17, 1),
    "convnext": (_convnext, 1, 0),
}


def _write(place: Path, model: Any, name: str = "preprocessor_config.json") -> PartConfig:
    model.save_pretrained(place)
    nested = name.startswith("processor")
    (place / name).write_text(json.dumps({"image_processor": PIXELS} if nested else PIXELS))
    return PartConfig(f"transformers:{place}", width=16)


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("processor", ["preprocessor_config.json", "processor_config.json"])
def test_any_directory_of_transformers_is_an_image_encoder(kind: str, processor: str, tmp_path: Path) -> None:
    make, count, first = ENCODERS[kind]
    model = make().eval()
    encoder = adapters.image_encoder(_write(tmp_path, model, processor))
    assert isinstance(encoder, TransformersVision)
    assert isinstance(encoder, ImageEncoder)
    assert isinstance(encoder, Placed)
    assert (encoder.width, encoder.image_size, encoder.tokens) == (16, 32, count)
    assert (encoder.mean, encoder.std) == ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    assert not encoder.train().training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = encoder(pixels)
        hidden = getattr(model, "vision_model", model)(pixel_values=pixels).last_hidden_state
    torch.testing.assert_close(found, hidden if hidden.ndim == 3 else hidden.flatten(2).mT)
    places = encoder.places(found[0])
    assert (places.count, places.first, len(places.beside)) == (count, first, first)
    with pytest.raises(ImageError, match=r"\(B, 3, 32, 32\), not \(2, 3, 16, 16\)"):
        encoder(pixels[..., :16, :16])


def test_a_language_model_is_no_image_encoder(tmp_path: Path) -> None:
    model = transformers.GPT2Model(transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=9))
    with pytest.raises(ConfigError, match="GPT2Model is no image encoder"):
        adapters.image_encoder(_write(tmp_path, model))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, "cannot be read .*save the image processor beside the model"),
        ({"rescale_factor": 1.0}, "rescale_factor 1.0 is not 1/255"),
        ({"image_std": [1, 1, 0]}, r"image_std\.2"),
        ({"do_flip_channel_order": True}, "BGR"),
        ({"do_rescale": False}, "not scaled"),
        ({"size": {"height": 32, "width": 48}}, "no square"),
        ("[]", "no image processor's"),
    ],
)
def test_a_processor_that_cannot_be_followed_is_an_error(change: Any, message: str, tmp_path: Path) -> None:
    part = _write(tmp_path, ENCODERS["vit"][0]())
    file = tmp_path / "preprocessor_config.json"
    if change is None:
        file.unlink()
    else:
        file.write_text(change if isinstance(change, str) else json.dumps(PIXELS | change))
    with pytest.raises(CheckpointError, match=message):
        adapters.image_encoder(part)


def test_what_is_not_read_may_be_missing_and_nothing_else(tmp_path: Path) -> None:
    part = _write(tmp_path, _clip())
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    seen = {name: tensor for name, tensor in tensors.items() if name.startswith("vision_model.")}
    save_file(seen, file, {"format": "pt"})
    adapters.image_encoder(part)
    gone = next(name for name in seen if "layers.1" in name)
    save_file({name: tensor for name, tensor in seen.items() if name != gone}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"missing or have another shape: {gone}"):
        adapters.image_encoder(part)


def test_its_weights_are_those_that_the_model_was_trained_with(tmp_path: Path) -> None:
    part = _write(tmp_path, ENCODERS["vit"][0]())
    known = PartConfig(part.name, part.width, adapters.sha256(part))
    adapters.image_encoder(known)
    with pytest.raises(CheckpointError, match="but the model was trained with"):
        adapters.image_encoder(PartConfig(part.name, part.width, sha256="0" * 64))
    with pytest.raises(ConfigError, match="width 7, but it has 16"):
        adapters.image_encoder(PartConfig(part.name, 7))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PIXELS | {"image_mean": [0, 0, 0]}))
    with pytest.raises(CheckpointError, match="but the model was trained with"):
        adapters.image_encoder(known)


def test_a_processor_s_cut_counts_where_it_cuts_and_null_says_nothing(tmp_path: Path) -> None:
    part = _write(tmp_path, ENCODERS["vit"][0]())
    file = tmp_path / "preprocessor_config.json"
    cut = {"crop_size": {"height": 32, "width": 32}, "size": {"shortest_edge": 16}, "do_normalize": None}
    file.write_text(json.dumps(PIXELS | cut))
    encoder = adapters.image_encoder(part)
    assert (encoder.image_size, encoder.mean) == (32, (0.5, 0.4, 0.3))
    file.write_text(json.dumps(PIXELS | cut | {"do_center_crop": False}))
    with pytest.raises(ConfigError, match="does not take 16 x 16 pixels"):
        adapters.image_encoder(part)
