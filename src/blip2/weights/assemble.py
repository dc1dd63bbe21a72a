"""Put a whole model together: what a directory holds, and the frozen parts that its configuration names."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

import blip2
from blip2 import adapters
from blip2.adapters.narrowed import Narrowed
from blip2.blip2 import Blip2
from blip2.config import HUB, PRESETS, Blip2Config, LanguageConfig, PartConfig, VisionConfig, read_config
from blip2.errors import CheckpointError, ConfigError
from blip2.model.vision import VisionTransformer
from blip2.protocols import ImageEncoder, LanguageModel
from blip2.quantize import quantize_layers
from blip2.text import Tokenizer
from blip2.weights import adapter, paddle, transformers
from blip2.weights.base import find
from blip2.weights.load import Loaded, load, load_config, load_language, load_tokenizer
from blip2.weights.placement import WHOLE, Memory
from blip2.weights.save import TOKENIZERS, identity_of


def assemble(directory: Path, device: torch.device, dtype: torch.dtype, memory: Memory = WHOLE) -> Blip2:
    """A model from a directory in our own format or in that of transformers.

    Args:
        dtype: of the frozen parts.
        memory: how they are kept; a model in our own format lies on one device.
    Raises:
        CheckpointError, ConfigError, MissingExtraError: see `blip2.load`.
    """
    if paddle.holds(directory):
        return paddle.load(directory, device, dtype, memory)
    if transformers.holds(directory):
        return transformers.load(directory, device, dtype, memory)
    if isinstance(memory.device_map, Mapping):
        raise ConfigError(f"{directory}: a model in our own format lies on one device; use `device`")
    config = load_config(directory)
    text = adapters.text_part(config.text) if config.text else None
    loaded = load(directory, text.words if text else None)
    exact = dataclasses.replace(memory, quantize=None) if config.adapter else memory  # merged first, then made coarse
    base = assemble(find(config.base, directory), device, dtype, exact) if config.base else None
    encoder = _encoder(config, loaded, base)
    language, tokenizer = _language(config, directory, base, device, dtype, exact)
    if config.adapter:
        adapter.merge(language, directory, config.adapter)
    if loaded.vocabulary is not None and language is not None and tokenizer is not None:
        language = _narrowed(language, tokenizer, loaded.vocabulary, directory)
    placed = base is not None and encoder is base.encoder, isinstance(config.language, LanguageConfig)
    for part, is_placed in zip((encoder, language), placed, strict=True):
        if not isinstance(part, nn.Module):
            continue
        if not is_placed:
            part.to(device, dtype)
        if memory.quantize and not (is_placed and exact.quantize):
            quantize_layers(part, memory.quantize, device)
    own_text = load_tokenizer(directory, "text") or (base.text_tokenizer if base else None)
    return Blip2(
        config,
        encoder,
        loaded.bridge.to(device),
        language,
        tokenizer,
        text.tokenizer if text else own_text,
        device,
        dtype,
        identity=identity_of(directory),
    )


def _encoder(config: Blip2Config, loaded: Loaded, base: Blip2 | None) -> ImageEncoder:
    """The image encoder: a named part, the one saved with the model, or its base's, at the size that it has here."""
    if isinstance(config.vision, PartConfig):
        return cast("ImageEncoder", adapters.image_encoder(config.vision))
    if loaded.vision is not None:
        return loaded.vision
    assert base is not None  # or `loaded` would have it
    return sized(base, config.vision.image_size)


def sized(model: Blip2, image_size: int) -> ImageEncoder:
    """The image encoder of a model at a size of picture, see `VisionTransformer.resized`."""
    if model.encoder.image_size == image_size or not isinstance(model.encoder, VisionTransformer):
        return model.encoder
    return model.encoder.resized(image_size)


def _language(
    config: Blip2Config, directory: Path, base: Blip2 | None, device: torch.device, dtype: torch.dtype, memory: Memory
) -> tuple[LanguageModel | None, Tokenizer | None]:
    """The language model and its tokenizer: a named part, the base's, or those saved with the model."""
    if isinstance(config.language, PartConfig):
        return adapters.language_model(config.language)
    if config.language is None:
        return None, load_tokenizer(directory, "language")
    if base is not None:
        return base.language, base.tokenizer
    tokenizer = load_tokenizer(directory, "language")
    language = load_language(directory, config.language, device, dtype, memory)
    if tokenizer is None:
        raise CheckpointError(f"{directory}: {TOKENIZERS} names no tokenizer of the language model")
    return language, tokenizer


def _narrowed(language: LanguageModel, tokenizer: Tokenizer, vocabulary: Tensor, directory: Path) -> Narrowed:
    if int(vocabulary[-1]) >= language.vocab_size or not set(vocabulary.tolist()) & set(tokenizer.stop_ids):
        raise CheckpointError(
            f"{directory / 'vocabulary.safetensors'}: not tokens of this language model, or none of them ends a text"
        )
    return Narrowed(language, vocabulary)


def named_config(name: str) -> Blip2Config:
    """The configuration of `mini`, of the directory of a model, or of a published model; no weights are read.

    Raises:
        ConfigError: the name is none of these, or the directory's configuration is wrong.
    """
    directory = model_directory(name)
    if transformers.holds(directory) or paddle.holds(directory):
        kind = paddle if paddle.holds(directory) else transformers
        return kind.read_config(directory)
    file = directory / "config.json"
    if file.is_file():
        return read_config(file)
    published = name.removeprefix("Salesforce/")
    if published in HUB:
        config = PRESETS[HUB[published]]
        assert isinstance(config.vision, VisionConfig)
        vision = dataclasses.replace(config.vision, key_bias=True)  # as transformers keeps it
        return config.replace(vision=vision, word_head=False)
    if name not in PRESETS:
        known = [*PRESETS, *(f"Salesforce/{each}" for each in HUB)]
        close = difflib.get_close_matches(name, known, n=1)
        meant = f" (did you mean {close[0]!r}?)" if close else f", nor one of {', '.join(known)}"
        raise ConfigError(f"{name}: is no directory of a model{meant}")
    return PRESETS[name]


def model_directory(name: str | Path | None) -> Path:
    """Where a model lies: `mini`, or nothing, is the one that comes with the package."""
    return Path(blip2.__file__).parent / "mini" if name in (None, "mini") else Path(str(name))
