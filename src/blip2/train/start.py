"""The model that a recipe describes, and the weights that its training starts from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from blip2 import weights
from blip2.adapters import DIRECTORY, EXTENDS
from blip2.config import PRESETS, BaseConfig, Blip2Config, LanguageConfig, PartConfig, VisionConfig, describe
from blip2.errors import ConfigError
from blip2.model.bridge import Bridge
from blip2.protocols import LanguageModel
from blip2.train.log import say
from blip2.train.recipe import Recipe, nearest
from blip2.weights import assemble as assembly
from blip2.weights import hub, lavis, paddle, transformers
from blip2.weights.assemble import named_config
from blip2.weights.base import digest
from blip2.weights.bert import start_from_bert
from blip2.weights.load import check_names, load_config, load_vocabulary

if TYPE_CHECKING:
    from blip2.adapters import TextPart
    from blip2.blip2 import Blip2

WORDS = 4096  # of a vocabulary, whose mean a projection starts from
_PARTS = ("vision", "language", "text")  # each of one kind or another


@dataclass(frozen=True)
class Start:
    """What a recipe goes on from.

    Attributes:
        directory: of the model.
        name: how it is found again: on the hub by its name there, elsewhere by its directory.
        config: its own, before the recipe's changes.
    """

    directory: Path
    name: str
    config: Blip2Config

    @property
    def whole(self) -> bool:
        """Whether parts come with it that are no named ones, so that it has to be loaded whole."""
        own = isinstance(self.config.vision, VisionConfig) or isinstance(self.config.language, LanguageConfig)
        return own or self.config.adapter > 0

    @property
    def holds_vision(self) -> bool:
        """Whether the directory is a fine-tuned model's that was saved with its image encoder."""
        base = self.config.base
        return isinstance(self.config.vision, VisionConfig) and base is not None and not base.vision


def find_start(recipe: Recipe) -> Start | None:
    """Where the recipe's `start` lies, and what it is made of; nothing is loaded. None where there is none.

    Raises:
        ConfigError: neither a run with a model, nor a model.
        CheckpointError: the hub's model cannot be downloaded, or the directory is damaged.
    """
    if recipe.start is None:
        return None
    directory = model_directory(recipe.start)
    foreign = transformers.holds(directory) or paddle.holds(directory)
    name = str(recipe.start) if hub.is_name(str(recipe.start)) else str(directory.resolve())
    return Start(directory, name, named_config(str(directory)) if foreign else load_config(directory))


def model_config(recipe: Recipe) -> Blip2Config:
    """What the recipe's model is made of.

    Raises:
        ConfigError: no such preset, an unknown key or a value of the wrong kind in `model`; the message names it.
    """
    model = {"preset": recipe.model} if isinstance(recipe.model, str) else dict(recipe.model or {})
    name = model.pop("preset", None)
    if name is not None and name not in PRESETS:
        raise ConfigError(f"model: no preset {name!r}{nearest(str(name), PRESETS)}; there are {', '.join(PRESETS)}")
    start = find_start(recipe) if name is None else None
    base = PRESETS[name] if name else start.config if start else Blip2Config()
    values = _merge(dataclasses.asdict(base), model, "model")
    try:
        return TypeAdapter(Blip2Config).validate_python(values)
    except ValidationError as error:
        raise ConfigError(f"model: {describe(error)}") from None


def model_directory(start: Path) -> Path:
    """The saved model in a run's folder, or the folder itself where it is one; `mini`, or a name on the hub.

    Raises:
        ConfigError: none of these.
        CheckpointError: it cannot be downloaded.
    """
    if start.suffix == lavis.SUFFIX:
        raise ConfigError(
            f"start: {start} is a LAVIS file, whose frozen parts lie elsewhere; make a directory of it with "
            f"`blip2 convert {start} DIR --to transformers` and start from that"
        )
    if hub.is_name(str(start)):
        return hub.download(str(start))
    place = assembly.model_directory(str(start))
    for directory in (place / "model", place):
        if (directory / "config.json").is_file():
            return directory
    raise ConfigError(f"start: {place} holds no model; a finished run has one in its folder `model`")


def open_start(start: Start, config: Blip2Config, dtype: torch.dtype) -> Blip2:
    """A start whose parts come with it, on the CPU.

    Args:
        dtype: of the frozen parts.
    Raises:
        ConfigError: the recipe's model has another image encoder or language model than the start brings.
        CheckpointError: it is damaged.
    """
    model = assembly.assemble(start.directory, torch.device("cpu"), dtype)
    for key in ("vision", "language"):
        theirs, ours = getattr(start.config, key), getattr(config, key)
        if key == "vision" and isinstance(theirs, VisionConfig) and isinstance(ours, VisionConfig):
            theirs = dataclasses.replace(theirs, image_size=ours.image_size)
        if isinstance(ours, VisionConfig | LanguageConfig) and ours != theirs:
            raise ConfigError(
                f"model.{key}: is another than that of {start.directory}, which is where its weights come from; "
                + ("change nothing of it but image_size" if key == "vision" else "leave it out")
            )
    return model


def start_bridge(config: Blip2Config, start: Start | None, model: Blip2 | None, text: Callable[[], TextPart]) -> Bridge:
    """The bridge with the weights that training starts from: those of `start`, or of the text part.

    What an earlier run learned to tell another language model, of another width or none, does not come along. A
    language projection that has learned nothing yet is zero, see `begin_projection`. A word head that `start` lacks
    begins anew too.

    Args:
        model: the start itself where it was loaded whole.
    Raises:
        CheckpointError: they are of another shape.
    """
    bridge = Bridge(config)
    if bridge.language_projection is not None:
        nn.init.zeros_(bridge.language_projection.weight)
        nn.init.zeros_(bridge.language_projection.bias)
    if start is None:
        if config.text is not None:
            start_from_bert(bridge.qformer, text().weights)
        return bridge
    earlier = model.bridge if model else _earlier(start, config, text)
    state, own = earlier.state_dict(), bridge.state_dict()
    for what, place in (("language projection", "language_projection."), ("word head", "heads.words.")):
        names = {name for name in own.keys() | state.keys() if name.startswith(place)}
        if any(name not in own or name not in state or own[name].shape != state[name].shape for name in names):
            say(f"start: the {what} begins anew, {start.directory} has none for this model")
            state = {name: tensor for name, tensor in state.items() if name not in names}
            state |= {name: own[name] for name in names & own.keys()}
    check_names(bridge, state, start.directory)
    bridge.load_state_dict(state)
    return bridge


def check_encoder(start: Start, config: Blip2Config, digest: Callable[[PartConfig], str]) -> None:
    """Refuse an image encoder that the start's bridge has never seen, which no shape would tell.

    One that extends the start's is welcome: attention finds the tokens that it knows wherever they stand.

    Args:
        digest: SHA-256 of a part on this machine.
    Raises:
        ConfigError: it is another, or has other weights.
    """
    theirs, ours = start.config.vision, config.vision
    if not isinstance(ours, PartConfig):
        return  # it comes with the start
    if not isinstance(theirs, PartConfig):
        raise ConfigError(
            f"model.vision: {ours.name}, but {start.directory} was trained on a ViT of its own; leave it out of `model`"
        )
    moved = theirs.name.startswith(DIRECTORY) and ours.name.startswith(DIRECTORY)
    if theirs.name not in (ours.name, EXTENDS.get(ours.name)) and not moved:
        raise ConfigError(
            f"model.vision: {ours.name}, but {start.directory} was trained on {theirs.name}; leave the preset out of "
            f"`model`, or write 'model.vision={{name: {theirs.name}, width: {theirs.width}}}'"
        )
    if theirs.sha256 and (found := digest(ours)) != theirs.sha256:
        raise ConfigError(
            f"model.vision: {ours.name} has the SHA-256 {found}, but {start.directory} was trained on one of "
            f"{theirs.sha256}; name that one, or begin without `start`"
        )


def _earlier(start: Start, config: Blip2Config, text: Callable[[], TextPart]) -> Bridge:
    return weights.load(start.directory, text().words if config.qformer.frozen_words else None).bridge


def earlier_words(start: Start | None) -> Tensor | None:
    """The tokens that a start was trained to write, int64[K], sorted; None for all."""
    if start is None or start.config.vocabulary is None:
        return None
    return load_vocabulary(start.directory, start.config.vocabulary)


def base_of(start: Start | None, *, vision_saved: bool) -> BaseConfig | None:
    """What a model made from `start` names as its base, for the parts that are not saved with it.

    Args:
        vision_saved: whether the image encoder is.
    """
    if start is None or not start.whole:
        return None
    earlier = start.config.base
    if earlier is not None:
        return dataclasses.replace(earlier, vision=earlier.vision and not vision_saved)
    own = isinstance(start.config.vision, VisionConfig)
    return BaseConfig(start.name, digest(start.directory), own and not vision_saved)


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
        another = (
            sections and "name" in value and value["name"] != old.get("name")
        )  # whose weights have another SHA-256
        replaces = key in _PARTS and sections and (another or not value.keys() <= old.keys())
        merged[key] = _merge(old, value, f"{place}.{key}") if sections and not replaces else value
    return merged
