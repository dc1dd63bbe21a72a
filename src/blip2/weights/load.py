"""Read our own format back; nothing missing, nothing left over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from blip2.config import Blip2Config, LanguageConfig, VisionConfig, describe, read_config
from blip2.errors import CheckpointError
from blip2.model.bridge import Bridge
from blip2.model.opt import OPT
from blip2.model.t5 import T5
from blip2.model.vision import VisionTransformer
from blip2.text import Tokenizer
from blip2.weights.fill import Part, fill
from blip2.weights.placement import WHOLE, Memory, plan
from blip2.weights.rules import same
from blip2.weights.save import FROZEN_WORDS, LANGUAGE, TOKENIZERS, VOCABULARY, TokenizerIds
from blip2.weights.sizes import check_sizes
from blip2.weights.skeleton import build_language, skeleton
from blip2.weights.tensors import Safetensors


@dataclass(frozen=True)
class Loaded:
    """What a directory holds.

    Attributes:
        bridge: what was trained.
        vision: the image encoder where it is ours and saved with the model.
        vocabulary: int64[K], sorted: the tokens that the language model writes, all where None.
    """

    config: Blip2Config
    bridge: Bridge
    vision: VisionTransformer | None
    vocabulary: Tensor | None


def load(directory: Path, words: Tensor | None = None) -> Loaded:
    """A model from the directory that `save` wrote, in float32 on the CPU.

    Args:
        words: float[V, D], the frozen text part's embeddings, where the configuration says that they belong to it.
    Raises:
        CheckpointError: no such directory, a newer format, a damaged file, a missing, unexpected or misshaped tensor.
        ConfigError: the configuration has an unknown key or a wrong value.
    """
    config = load_config(directory)
    extra = {FROZEN_WORDS: words} if config.qformer.frozen_words and words is not None else {}
    state = read_tensors(directory / "bridge.safetensors") | extra
    parts = {"config": config, "vision": config.vision, "language": config.language, "text": config.text}
    check_sizes(parts, directory)
    check_sizes({"qformer": config.qformer}, directory, len(state))
    with skeleton():
        bridge = Bridge(config)
    _fill(bridge, directory / "bridge.safetensors", state)
    if config.qformer.frozen_words and config.qformer.text:
        bridge.qformer.words.weight.requires_grad_(False)
    vision = None
    if isinstance(config.vision, VisionConfig) and not (config.base and config.base.vision):
        state = read_tensors(directory / "vision.safetensors")
        check_sizes({"vision": config.vision}, directory, len(state))
        with skeleton():
            vision = VisionTransformer(config.vision)
        _fill(vision, directory / "vision.safetensors", state)
        vision.requires_grad_(False).eval()
    vocabulary = None if config.vocabulary is None else load_vocabulary(directory, config.vocabulary)
    return Loaded(config, bridge.eval(), vision, vocabulary)


def load_config(directory: Path) -> Blip2Config:
    """The configuration of a saved model.

    Raises:
        CheckpointError: no model lies there.
        ConfigError: as `read_config`.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{directory}: no model here; give a directory that blip2 saved, or nothing for `mini`")
    return read_config(path)


def load_language(
    directory: Path, config: LanguageConfig, device: torch.device, dtype: torch.dtype | None, memory: Memory = WHOLE
) -> OPT | T5:
    """The language model that `save_model` wrote, its tensors read one by one.

    Args:
        memory: how it is kept.

    Raises:
        CheckpointError: its file is missing, damaged, or does not fit.
    """
    path = directory / LANGUAGE
    tensors = Safetensors.open([path])
    check_sizes({"language": config}, directory, len(tensors.names()))
    with skeleton():
        language = build_language(config)
    rules = same({f"language.{name}": name for name in language.state_dict()})
    part = Part.of(language, dtype)
    home = plan({"language": language}, device, memory)
    fill({"language": part}, rules, tensors, path, home)
    home.connect({"language": language})
    return language


def load_tokenizer(directory: Path, name: str) -> Tokenizer | None:
    """A tokenizer that `save_model` wrote, `language` or `text`; None where a frozen part brings it.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    path = directory / TOKENIZERS
    if not path.is_file():
        return None
    try:
        ids = TypeAdapter(dict[str, TokenizerIds]).validate_json(path.read_bytes()).get(name)
    except ValidationError as error:
        raise CheckpointError(f"{path}: {describe(error)}") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    return None if ids is None else Tokenizer.from_file(directory / f"{name}-tokenizer.json", **vars(ids))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    try:
        return load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing; the model's directory is not whole") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged or no safetensors file: {error}") from None


def check_names(module: nn.Module, state: Mapping[str, Tensor], source: object) -> None:
    """Refuse weights that do not fit, by name.

    Raises:
        CheckpointError: a tensor is missing, left over or of another shape.
    """
    own = module.state_dict()
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [
        f"{name} is {list(state[name].shape)}, the configuration wants {list(own[name].shape)}"
        for name in sorted(own.keys() & state.keys())
        if own[name].shape != state[name].shape
    ]
    wrong = [f"missing {name}" for name in missing] + [f"unexpected {name}" for name in unexpected] + shapes
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise CheckpointError(f"{source}: does not fit its configuration: {'; '.join(wrong[:5])}{more}")


def load_vocabulary(directory: Path, size: int) -> Tensor:
    """The tokens that a saved model writes, int64[size], sorted.

    Raises:
        CheckpointError: the file is missing or damaged, or holds something else.
    """
    path = directory / VOCABULARY
    state = read_tensors(path)
    ids = state.get("ids")
    whole = ids is not None and len(state) == 1 and ids.dtype == torch.int64 and ids.shape == (size,)
    if ids is None or not whole or bool((ids.diff() <= 0).any()) or bool((ids < 0).any()):
        raise CheckpointError(f"{path}: does not fit its configuration: it must hold `ids`, {size} tokens in order")
    return ids


def _fill(module: nn.Module, path: Path, state: Mapping[str, Tensor]) -> None:
    """Give a module on the meta device its weights, in float32."""
    check_names(module, state, path)
    module.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True)
