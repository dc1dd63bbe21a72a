"""`blip2 info`: what a model is made of, and what it costs in memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from blip2.cli.console import note, result_json, table
from blip2.cli.options import Json
from blip2.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from blip2.config import Blip2Config, LanguageConfig, PartConfig, VisionConfig

_GB = 1e9
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


def info(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="`mini`, a published configuration, or the directory of a model.")
    ],
    *,
    json: Json = False,
) -> None:
    """Show parts, size and licences of a model.

    Nothing is loaded. Memory is that of the parameters alone, in GB (10^9 bytes), by the precision of the frozen
    parts; the trained part stays in float32. Published configurations need no weights for this.

    ```
    blip2 info mini
    blip2 info pretrain_opt2.7b --json
    ```
    """
    parts = parts_of(_config(model))
    if json:
        for part in parts:
            sizes = {"float32_bytes": part.bytes(4), "bfloat16_bytes": part.bytes(2)}
            result_json({**vars(part), **sizes})
        return
    rows = [(p.role, p.name, _count(p), _size(p.bytes(4)), _size(p.bytes(2)), p.licence) for p in parts]
    if all(part.parameters is not None for part in parts):
        total = sum(part.parameters or 0 for part in parts)
        sizes = [sum(part.bytes(width) or 0 for part in parts) for width in (4, 2)]
        rows.append(("total", "", f"{total:,}", _size(sizes[0]), _size(sizes[1]), ""))
    else:
        note("The parameters of some parts are known to their own library only; there is no total.")
    columns = ("part", "name", "parameters", "float32 GB", "bfloat16 GB", "licence")
    table(columns, rows, right=columns[2:5])


def parts_of(config: Blip2Config) -> list[Part]:
    """The parts of a configuration; what is our own is counted on the meta device, where it takes no memory."""
    import torch

    from blip2.config import PartConfig
    from blip2.model.bridge import Bridge

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
    import torch

    from blip2.config import PartConfig
    from blip2.model.vision import VisionTransformer

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


def _config(name: str) -> Blip2Config:
    import blip2
    from blip2.config import PRESETS, read_config

    bundled = Path(blip2.__file__).parent / "mini" / "config.json"
    file = bundled if name == "mini" else Path(name) / "config.json"
    if file.is_file():
        return read_config(file)
    if name not in PRESETS:
        raise ConfigError(f"{name}: neither the directory of a model nor one of {', '.join(PRESETS)}")
    return PRESETS[name]


def _count(part: Part) -> str:
    return "?" if part.parameters is None else f"{part.parameters:,}"


def _size(count: int | None) -> str:
    return "?" if count is None else f"{count / _GB:.2f}"
