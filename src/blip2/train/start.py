"""The model that a recipe describes, and the weights that its training starts from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from blip2 import weights
from blip2.config import PRESETS, Blip2Config, describe, read_config
from blip2.errors import ConfigError
from blip2.model.bridge import Bridge
from blip2.protocols import LanguageModel
from blip2.train.log import say
from blip2.train.recipe import Recipe, nearest
from blip2.weights import assemble as assembly
from blip2.weights.bert import start_from_bert
from blip2.weights.load import check_names

if TYPE_CHECKING:
    from blip2.adapters import TextPart

WORDS = 4096  # of a vocabulary, whose mean a projection starts from
_PARTS = ("vision", "language", "text")  # each of one kind or another


def model_config(recipe: Recipe) -> Blip2Config:
    """What the recipe's model is made of.

    Raises:
        ConfigError: no such preset, an unknown key or a value of the wrong kind in `model`; the message names it.
    """
    if recipe.model is None:
        assert recipe.start is not None  # the recipe was checked for it
        return read_config(model_directory(recipe.start) / "config.json")
    model = {"preset": recipe.model} if isinstance(recipe.model, str) else dict(recipe.model)
    name = model.pop("preset", None)
    if name is not None and name not in PRESETS:
        raise ConfigError(f"model: no preset {name!r}{nearest(str(name), PRESETS)}; there are {', '.join(PRESETS)}")
    values = _merge(dataclasses.asdict(PRESETS[name] if name else Blip2Config()), model, "model")
    try:
        return TypeAdapter(Blip2Config).validate_python(values)
    except ValidationError as error:
        raise ConfigError(f"model: {describe(error)}") from None


def model_directory(start: Path) -> Path:
    """The saved model in a run's folder, or the folder itself where it is one; `mini` comes with the package.

    Raises:
        ConfigError: neither.
    """
    place = assembly.model_directory(str(start))
    for directory in (place / "model", place):
        if (directory / "config.json").is_file():
            return directory
    raise ConfigError(f"start: {place} holds no model; a finished run has one in its folder `model`")


def start_bridge(recipe: Recipe, config: Blip2Config, text: Callable[[], TextPart]) -> Bridge:
    """The bridge with the weights that training starts from: an earlier run's, or those of the text part.

    What an earlier run learned to tell another language model, of another width or none, does not come along. A
    language projection that has learned nothing yet is zero, see `begin_projection`.

    Raises:
        CheckpointError: they are of another shape.
    """
    bridge = Bridge(config)
    if bridge.language_projection is not None:
        nn.init.zeros_(bridge.language_projection.weight)
        nn.init.zeros_(bridge.language_projection.bias)
    if recipe.start is None:
        if config.text is not None:
            start_from_bert(bridge.qformer, text().weights)
        return bridge
    directory = model_directory(recipe.start)
    earlier = weights.load(directory, text().words if config.qformer.frozen_words else None)
    state, own = earlier.bridge.state_dict(), bridge.state_dict()
    projection = {name for name in own.keys() | state.keys() if name.startswith("language_projection.")}
    if any(name not in own or name not in state or own[name].shape != state[name].shape for name in projection):
        say(f"start: the language projection begins anew, {directory} has none for this language model")
        state = {name: tensor for name, tensor in state.items() if name not in projection}
        state |= {name: own[name] for name in projection & own.keys()}
    check_names(bridge, state, directory)
    bridge.load_state_dict(state)
    return bridge


@torch.no_grad()
def begin_projection(bridge: Bridge, language: LanguageModel) -> None:
    """A projection that has learned nothing says of every image the mean of the language model's words.

    From there the model reads on as after a text. Sixteen random vectors are like no text it was trained on: its
    gradients were ten times as large and moved the Q-Former away from what stage 1 taught.
    """
    projection = bridge.language_projection
    if projection is None or projection.weight.any() or projection.bias.any():
        return
    some = torch.arange(0, language.vocab_size, max(1, language.vocab_size // WORDS), device=projection.bias.device)
    projection.bias.copy_(language.embed(some).float().mean(0))


def _merge(base: dict[str, Any], changes: Mapping[str, Any], place: str) -> dict[str, Any]:
    """`base` with the changes; a part of another kind (other keys than it has) takes the place of the part.

    Raises:
        ConfigError: a key that the configuration does not have.
    """
    merged = dict(base)
    for key, value in changes.items():
        if key not in base:
            raise ConfigError(f"{place}: unknown key {key!r}{nearest(key, base)}")
        old = base[key]
        sections = isinstance(old, dict) and isinstance(value, Mapping)
        replaces = key in _PARTS and sections and not value.keys() <= old.keys()
        merged[key] = _merge(old, value, f"{place}.{key}") if sections and not replaces else value
    return merged
