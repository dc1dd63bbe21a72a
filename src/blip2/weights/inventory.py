"""What a model is made of: each part with its size and licence, counted without loading anything."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from blip2.config import (
    FLAN_T5_XL,
    FLAN_T5_XXL,
    OPT_2_7B,
    OPT_6_7B,
    PRESETS,
    Blip2Config,
    LanguageConfig,
    PartConfig,
    VisionConfig,
    read_config,
)
from blip2.errors import ConfigError
from blip2.model.bridge import Bridge
from blip2.model.vision import VisionTransformer
from blip2.weights import transformers
from blip2.weights.assemble import model_directory
from blip2.weights.maps import transformers_config as keys
from blip2.weights.skeleton import skeleton
from blip2.weights.tensors import open_directory

_APACHE = "Apache-2.0"

# What others made: name, parameters (of frozen parts as they are loaded, norms folded), licence.
_LANGUAGE = {OPT_2_7B: "OPT-2.7B", OPT_6_7B: "OPT-6.7B", FLAN_T5_XL: "Flan-T5-XL", FLAN_T5_XXL: "Flan-T5-XXL"}
_LICENCE = {"opt": "OPT licence: research only", "t5": _APACHE}
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
    directory = model_directory(name)
    if transformers.holds(directory):
        values = transformers.read_json(directory / "config.json")
        return keys.config(values, directory / "config.json", open_directory(directory).names())
    file = directory / "config.json"
    if file.is_file():
        return read_config(file)
    if name not in PRESETS:
        raise ConfigError(f"{name}: neither the directory of a model nor one of {', '.join(PRESETS)}")
    return PRESETS[name]


def parts_of(config: Blip2Config) -> list[Part]:
    """The parts of a configuration; what is our own is counted on the meta device, where it takes no memory."""
    with skeleton():
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
    with skeleton():
        count = _parameters(VisionTransformer(config))
    name = "CLIP ViT-L/14" if config.pre_norm else "EVA-CLIP ViT-g/14"
    return Part("image encoder", f"{name}, {config.image_size} px", count, False, "MIT")


def _frozen(role: str, config: PartConfig) -> Part:
    name, parameters, licence = _PARTS.get(config.name, (config.name, None, "its own"))
    return Part(role, name, parameters, False, licence)


def _published(config: LanguageConfig) -> Part:
    with skeleton():
        count = _parameters(transformers.build_language(config))
    return Part("language model", _LANGUAGE.get(config, config.kind), count, False, _LICENCE[config.kind])


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
