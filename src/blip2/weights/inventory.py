"""What a model is made of and costs: parts, sizes, memory at each precision, counted without loading anything."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from blip2.config import (
    EVA_G,
    FLAN_T5_XL,
    FLAN_T5_XXL,
    OPT_2_7B,
    OPT_6_7B,
    Blip2Config,
    GemmaConfig,
    LanguageConfig,
    PartConfig,
    VisionConfig,
)
from blip2.device import available_memory
from blip2.model.bridge import Bridge
from blip2.model.gemma import Gemma
from blip2.model.vision import VisionTransformer
from blip2.quantize import coarse_size, in_blocks
from blip2.weights.notices import Notice, notice
from blip2.weights.skeleton import build_language, skeleton

GIB = 2**30
WORKING = 2**30  # bytes beside the weights: activations of a few images, the cache of a few texts
ADAM = 4  # a weight, its gradient and two moments

_LANGUAGE = {OPT_2_7B: "OPT-2.7B", OPT_6_7B: "OPT-6.7B", FLAN_T5_XL: "Flan-T5-XL", FLAN_T5_XXL: "Flan-T5-XXL"}
_FAMILY = {"opt": "OPT", "t5": "Flan-T5"}
# Parts of others that are counted by hand: name, parameters as they are loaded, with norms folded.
_PARTS = {
    "efficientnet-lite2": ("EfficientNet-Lite2", 6_063_024),
    "efficientnet-lite2-levels": ("EfficientNet-Lite2, earlier levels too", 6_063_024),
    "gemma-3-270m": ("Gemma 3 270M", 268_098_176),
    "minilm-l6": ("MiniLM-L6, word embeddings", 30_522 * 384),
}
_MODULES: Mapping[str, Callable[[], nn.Module]] = {"gemma-3-270m": lambda: Gemma(GemmaConfig())}
# Gigabytes that a published card tells, which count OPT's tied matrix twice.
_CARD = {"float32": 14.43, "16 bit": 7.21, "int8": 3.61, "int4": 1.8}


@dataclass(frozen=True)
class Layer:
    """A layer by its name, with the number of its parameters."""

    name: str
    parameters: int


@dataclass(frozen=True)
class Part:
    """One part of a model.

    Attributes:
        parameters: None where only its own library knows.
        linear: rows and columns of the linear layers in blocks, which int8, fp8 and int4 make smaller.
        largest: its largest layer; None where the part was not counted layer by layer.
    """

    role: str
    name: str
    parameters: int | None
    trained: bool
    notice: Notice
    linear: tuple[tuple[int, int], ...] = ()
    largest: Layer | None = None

    def bytes(self, precision: str) -> int | None:
        """Memory of its parameters; what is trained stays in float32, what is no linear layer in 16 bits at least."""
        if self.parameters is None:
            return None
        if self.trained or precision == "float32":
            return 4 * self.parameters
        rest = self.parameters - sum(rows * columns for rows, columns in self.linear)
        return 2 * rest + sum(_PRECISIONS[precision](rows, columns) for rows, columns in self.linear)


# Bytes of a linear layer's weights.
_PRECISIONS: Mapping[str, Callable[[int, int], int]] = {
    "float32": lambda rows, columns: 4 * rows * columns,
    "16 bit": lambda rows, columns: 2 * rows * columns,
    "int8": lambda rows, columns: coarse_size(torch.Size((rows, columns)), "int8"),
    "fp8": lambda rows, columns: coarse_size(torch.Size((rows, columns)), "fp8"),
    "int4": lambda rows, columns: coarse_size(torch.Size((rows, columns)), "int4"),
}
PRECISIONS = tuple(_PRECISIONS)


@dataclass(frozen=True)
class Memory:
    """What a model takes at a precision of its frozen parts, in bytes.

    Attributes:
        inference: all weights.
        bridge: to train the bridge with Adam: frozen weights, and four numbers for each that is trained.
        everything: to train all weights with Adam; None where they are whole numbers, which are not trained.
        card: what the published card tells, in its own gigabytes; None where it tells nothing.
    """

    precision: str
    inference: int
    bridge: int
    everything: int | None
    card: float | None


@dataclass(frozen=True)
class Place:
    """Memory of this machine: of the processor or of a device, all of it and what is free, in bytes."""

    name: str
    total: int
    free: int

    def fits(self, memory: Memory) -> str:
        """`yes`, `not now` where other programs have too much of it, or `no`."""
        need = memory.inference + WORKING
        return "yes" if need <= self.free else "not now" if need <= self.total else "no"


def parts_of(config: Blip2Config) -> list[Part]:
    """The parts of a configuration; what is our own is counted on the meta device, where it takes no memory."""
    with skeleton():
        bridge = Bridge(config)
    trained = sum(p.numel() for p in bridge.parameters() if p.requires_grad)
    notes = notice("Q-Former")
    parts = [_vision(config.vision)]
    parts.append(Part("bridge", "Q-Former", trained, True, notes, largest=_largest(bridge, trained=True)))
    if config.text:
        parts.append(_frozen("words", config.text))
    if isinstance(config.language, PartConfig):
        parts.append(_frozen("language model", config.language))
    elif config.language:
        parts.append(_published(config.language))
    return parts


def memory_of(config: Blip2Config, parts: Sequence[Part]) -> list[Memory]:
    """What the parts take together at each precision; nothing where the size of one is not known."""
    known = [(part, part.parameters) for part in parts if part.parameters is not None]
    if len(known) < len(parts):
        return []
    count, trained = sum(size for _, size in known), sum(size for part, size in known if part.trained)
    published = config.language == OPT_2_7B and isinstance(config.vision, VisionConfig) and not config.vision.pre_norm
    found: list[Memory] = []
    for precision in PRECISIONS:
        inference = sum(part.bytes(precision) or 0 for part, _ in known)
        size = {"float32": 4, "16 bit": 2}.get(precision)
        found.append(
            Memory(
                precision,
                inference,
                inference + (ADAM - 1) * 4 * trained,
                None if size is None else ADAM * size * count,
                _CARD.get(precision) if published else None,
            )
        )
    return found


def largest_of(parts: Sequence[Part]) -> Layer | None:
    """The largest layer of all parts that were counted."""
    layers = [Layer(f"{part.name}: {part.largest.name}", part.largest.parameters) for part in parts if part.largest]
    return max(layers, key=lambda layer: layer.parameters, default=None)


def places() -> list[Place]:
    """The memory of this machine; nothing where the system does not tell."""
    found: list[Place] = []
    try:
        page, total = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_PHYS_PAGES")
        found.append(Place("RAM", page * total, available_memory() or page * os.sysconf("SC_AVPHYS_PAGES")))
    except (AttributeError, ValueError, OSError):
        pass
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, total = torch.cuda.mem_get_info(index)
        found.append(Place(f"cuda:{index}", total, free))
    return found


def _vision(config: VisionConfig | PartConfig) -> Part:
    if isinstance(config, PartConfig):
        return _frozen("image encoder", config)
    name = "CLIP ViT-L/14" if config.pre_norm else "EVA-CLIP ViT-g/14"
    with skeleton():
        module = VisionTransformer(config)
    known = (config.width, config.layers) in ((EVA_G.width, EVA_G.layers), (1024, 23))
    shown = f"{name}, {config.image_size} px" if known else f"ViT, width {config.width}, {config.image_size} px"
    return _counted("image encoder", shown, module)


def _frozen(role: str, config: PartConfig) -> Part:
    name, parameters = _PARTS.get(config.name, (config.name, None))
    if config.name in _MODULES:
        with skeleton():
            return _counted(role, name, _MODULES[config.name]())
    return Part(role, name, parameters, False, notice(name))


def _published(config: LanguageConfig) -> Part:
    with skeleton():
        module = build_language(config)
    return _counted("language model", _LANGUAGE.get(config, f"{_FAMILY[config.kind]}, width {config.width}"), module)


def _counted(role: str, name: str, module: nn.Module) -> Part:
    count = sum(parameter.numel() for parameter in module.parameters())
    linear = [each.weight for name, each in module.named_modules() if isinstance(each, nn.Linear) and in_blocks(name)]
    shapes = tuple((int(weight.shape[0]), int(weight.shape[1])) for weight in linear)
    return Part(role, name, count, False, notice(name), shapes, _largest(module))


def _largest(module: nn.Module, *, trained: bool = False) -> Layer:
    """The module with the most parameters of its own, or of those that are trained."""
    sizes = {
        name: sum(p.numel() for p in layer.parameters(recurse=False) if p.requires_grad or not trained)
        for name, layer in module.named_modules()
    }
    most, name = max((size, name) for name, size in sizes.items())
    return Layer(name or "itself", most)
