"""Frozen parts that others made, behind the two protocols: a name in a configuration to the part itself.

A part whose configuration has a SHA-256 is the very one that the model was trained with, or an error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TypeVar

from blip2.adapters import directory, efficientnet, gemma, minilm
from blip2.adapters.efficientnet import EfficientNetLite
from blip2.adapters.parts import TextPart, fingerprint
from blip2.adapters.transformers_lm import TransformersLM
from blip2.adapters.transformers_vision import TransformersVision
from blip2.config import PartConfig
from blip2.errors import CheckpointError, ConfigError
from blip2.model.gemma import Gemma
from blip2.text import Tokenizer

__all__ = ["TextPart", "image_encoder", "language_model", "sha256", "text_part", "verify"]

_T = TypeVar("_T")

DIRECTORY = "transformers:"  # before the path of a directory

IMAGE_ENCODERS: Mapping[str, Callable[[], EfficientNetLite]] = {
    efficientnet.NAME: efficientnet.load,
    efficientnet.LEVELS: partial(efficientnet.load, levels=True),
}
EXTENDS: Mapping[str, str] = {efficientnet.LEVELS: efficientnet.NAME}  # gives that one's tokens, and more beside them
LANGUAGE_MODELS: Mapping[str, Callable[[], tuple[Gemma, Tokenizer]]] = {gemma.NAME: gemma.load}
TEXT_PARTS: Mapping[str, Callable[[], TextPart]] = {minilm.NAME: minilm.load}
FINGERPRINTS: Mapping[str, Callable[[], str]] = {
    efficientnet.NAME: lambda: fingerprint(efficientnet.weights()),
    efficientnet.LEVELS: lambda: fingerprint(efficientnet.weights()),
    gemma.NAME: gemma.sha256,
    minilm.NAME: lambda: fingerprint(minilm.weights()),
}


def image_encoder(part: PartConfig) -> EfficientNetLite | TransformersVision:
    """A frozen image encoder, on the CPU and in float32. `transformers:DIRECTORY` is any that transformers loads.

    Raises:
        ConfigError: no such part is known, or it has another width.
        MissingExtraError: its packages are not installed.
        CheckpointError: its files are damaged, or are not those that the configuration names.
    """
    local = _directory(part.name)
    load = (lambda: directory.load_encoder(local)) if local else _find(part.name, IMAGE_ENCODERS, "image encoder")
    _check_hash(part)
    encoder = load()
    _check_width(part, encoder.width)
    return encoder


def language_model(part: PartConfig) -> tuple[Gemma | TransformersLM, Tokenizer]:
    """A frozen language model and its tokenizer, on the CPU. `transformers:DIRECTORY` is any that transformers loads.

    Raises:
        ConfigError, MissingExtraError, CheckpointError: as `image_encoder`.
    """
    local = _directory(part.name)
    load = (lambda: directory.load(local)) if local else _find(part.name, LANGUAGE_MODELS, "language model")
    _check_hash(part)
    language, tokenizer = load()
    _check_width(part, language.width)
    return language, tokenizer


def text_part(part: PartConfig) -> TextPart:
    """Vocabulary, word embeddings and starting weights of a Q-Former.

    Raises:
        ConfigError, MissingExtraError, CheckpointError: as `image_encoder`.
    """
    load = _find(part.name, TEXT_PARTS, "text part")
    _check_hash(part)
    text = load()
    _check_width(part, text.words.shape[1])
    return text


def sha256(part: PartConfig) -> str:
    """Of the files that this part has on this machine.

    Raises:
        ConfigError, MissingExtraError, CheckpointError: as `image_encoder`.
    """
    if local := _directory(part.name):
        return fingerprint(directory.weights(local))
    return _find(part.name, FINGERPRINTS, "part")()


def verify(part: PartConfig) -> None:
    """Compare the part's weights with the configuration, and every byte of what was converted with its manifest.

    Raises:
        ConfigError, MissingExtraError, CheckpointError: as `image_encoder`.
    """
    _check_hash(part)
    if part.name == gemma.NAME:
        gemma.verify()


def _directory(name: str) -> Path | None:
    return Path(name.removeprefix(DIRECTORY)).expanduser() if name.startswith(DIRECTORY) else None


def _find(name: str, table: Mapping[str, _T], kind: str) -> _T:
    if name in table:
        return table[name]
    also = "" if kind == "text part" else f", {DIRECTORY}DIRECTORY"
    raise ConfigError(f"no {kind} is called {name!r}; known: {', '.join(table)}{also}")


def _check_hash(part: PartConfig) -> None:
    if part.sha256 and (found := sha256(part)) != part.sha256:
        raise CheckpointError(
            f"{part.name}: its files have the SHA-256 {found}, but the model was trained with {part.sha256}; "
            f"install the version that the model's card names"
        )


def _check_width(part: PartConfig, found: int) -> None:
    if part.width != found:
        raise ConfigError(f"{part.name}: the configuration gives it the width {part.width}, but it has {found}")
