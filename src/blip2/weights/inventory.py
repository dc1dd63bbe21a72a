"""What a model is made of: each part with its size and licence, counted without loading anything."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from blip2.config import PRESETS, Blip2Config, LanguageConfig, PartConfig, VisionConfig, read_config
from blip2.errors import ConfigError
from blip2.model.bridge import Bridge
from blip2.model.vision import VisionTransformer
from blip2.weights.assemble import model_directory

_OPT = "OPT licence: research only"
_APACHE = "Apache-2.0"

# What others made: name, parameters (of frozen parts as they are loaded, norms folded), licence.
_LANGUAGE = {
    ("opt", 2560): ("OPT-2.7B", 2_651_596_800, _OPT),
    ("opt", 4096): ("OPT-6.7B", 6_658_473_984, _OPT),
    ("t5", 2048): ("Flan-T5-XL", 2_849_757_184, _APACHE),
    ("t5", 4096): ("Flan-T5-XXL", 11_135_332_352, _APACHE),
}
_PARTS = {
    "efficientnet-lite2": ("EfficientNet-Lite2", 6_063_024, _APACHE),
    "gemma-3-270m": ("Gemma 3 270M", 268_098_176, "Gemma terms of use"),
    "minilm-l6": ("MiniLM-L6, word embeddings", 30_522 * 384, _APACHE),
}


@dataclass(frozen=True)
class Part:
    """One part of a model.

    Attributes:
        parameters: None where only its own library knows.
    """

    role: str
    name: str
    parameters: int | None
    trained: bool
    licence: str

    def bytes(self, frozen_width: int) -> int | None:
        """Memory of its parameters; what is trained stays in float32, `frozen_width` bytes hold any other."""
        return None if self.parameters is None else self.parameters * (4 if self.trained else frozen_width)


def named_config(name: str) -> Blip2Config:
    """The configuration of `mini`, of the directory of a model, or of a published model.

    Raises:
        ConfigError: the name is none of these, or the directory's configuration is wrong.
    """
    file = model_directory(name) / "config.json"
    if file.is_file():
        return read_config(file)
    if name not in PRESETS:
        raise ConfigError(f"{name}: neither the directory of a model nor one of {', '.join(PRESETS)}")
    return PRESETS[name]


def parts_of(config: Blip2Config) -> list[Part]:
    """The parts of a configuration; what is our own is counted on the meta device, where it takes no memory."""
    with torch.device("meta"):
        bridge = Bridge(config)
    trained = sum(p.numel() for p in bridge.parameters() if p.requires_grad)
    parts = [_vision(config.vision), Part("bridge", "Q-Former", trained, True, "BSD-3-Clause")]
    if config.text:
        parts.append(_frozen("words", config.text))
    if isinstance(config.language, PartConfig):
        parts.append(_frozen("language model", config.language))
    elif config.language:
        parts.append(_published(config.language))
    return parts


def _vision(config: VisionConfig | PartConfig) -> Part:
    if isinstance(config, PartConfig):
        return _frozen("image encoder", config)
    with torch.device("meta"):
        count = _parameters(VisionTransformer(config))
    name = "CLIP ViT-L/14" if config.pre_norm else "EVA-CLIP ViT-g/14"
    return Part("image encoder", f"{name}, {config.image_size} px", count, False, "MIT")


def _frozen(role: str, config: PartConfig) -> Part:
    name, parameters, licence = _PARTS.get(config.name, (config.name, None, "its own"))
    return Part(role, name, parameters, False, licence)


def _published(config: LanguageConfig) -> Part:
    name, parameters, licence = _LANGUAGE.get((config.kind, config.width), (config.kind, None, "its own"))
    return Part("language model", name, parameters, False, licence)


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
