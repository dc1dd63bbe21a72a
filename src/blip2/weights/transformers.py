"""Models in the directories that transformers writes: `Salesforce/blip2-*` and whatever was trained from them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from blip2.blip2 import Blip2
from blip2.config import Blip2Config, OPTConfig, T5Config, VisionConfig
from blip2.errors import CheckpointError
from blip2.model.bridge import Bridge
from blip2.model.heads import TEMPERATURE
from blip2.model.opt import OPT
from blip2.model.t5 import T5
from blip2.model.vision import VisionTransformer
from blip2.text import Tokenizer
from blip2.weights.fill import Part, fill, put
from blip2.weights.maps import transformers as maps
from blip2.weights.maps import transformers_config as keys
from blip2.weights.skeleton import skeleton
from blip2.weights.tensors import Tensors, open_directory

_LACKING = {"bridge.heads.temperature"}  # what the format has no place for


def holds(directory: Path) -> bool:
    """Whether a directory is of this format: its config.json names a `model_type`."""
    try:
        return "model_type" in json.loads((directory / "config.json").read_text())
    except (OSError, ValueError, TypeError):
        return False


def load(directory: Path, device: torch.device, dtype: torch.dtype) -> Blip2:
    """A model, its tensors read one by one and cast on their way.

    Args:
        dtype: of the frozen parts; the bridge computes in float32.
    Raises:
        CheckpointError: a file is missing or damaged, the model is of another kind, or its tensors do not fit; the
            message lists them.
    """
    values = _read_json(directory / "config.json")
    tensors = open_directory(directory)
    config = keys.config(values, directory / "config.json", tensors.names())
    with skeleton():
        parts = {
            "vision": Part(_vision(config), dtype),
            "bridge": Part(Bridge(config), torch.float32),
        }
        if isinstance(config.language, OPTConfig | T5Config):
            parts["language"] = Part(build_language(config.language), dtype)
    rules = maps.blip2(config)
    lacking = _LACKING if config.heads else set[str]()
    needed = {name for rule in rules for name in rule.theirs}
    beside = {name for name in maps.BESIDE if name not in needed}
    fill(parts, rules, tensors, directory, device, ignored=beside, given=lacking)
    bridge, vision, language = (parts[key].module if key in parts else None for key in ("bridge", "vision", "language"))
    assert isinstance(bridge, Bridge)
    assert isinstance(vision, VisionTransformer)
    if bridge.heads is not None:
        put(bridge, "heads.temperature", torch.tensor(TEMPERATURE, device=device))
    tokenizer = _tokenizer(directory, config, values)
    return Blip2(
        config,
        vision.requires_grad_(False).eval(),
        bridge.eval(),
        language if isinstance(language, OPT | T5) else None,
        tokenizer if config.language else None,
        tokenizer if config.heads else None,
        device,
        dtype,
        identity=_identity(tensors, config),
    )


def build_language(config: OPTConfig | T5Config) -> OPT | T5:
    """The language model of a configuration."""
    return OPT(config) if isinstance(config, OPTConfig) else T5(config)


def _vision(config: Blip2Config) -> VisionTransformer:
    assert isinstance(config.vision, VisionConfig)
    return VisionTransformer(config.vision)


def _tokenizer(directory: Path, config: Blip2Config, values: dict[str, Any]) -> Tokenizer:
    """The one beside the weights: the language model's, or in a retrieval model the Q-Former's."""
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; save the processor beside the model with save_pretrained")
    if config.heads:
        frame = config.qformer.cls_id, config.qformer.sep_id
        return Tokenizer.from_file(path, bos=None, pad=config.qformer.pad_id, stop_ids=(frame[1],), frame=frame)
    text: dict[str, Any] = values.get("text_config") or {}
    generation = directory / "generation_config.json"
    chosen = {**text, **{k: v for k, v in (_read_json(generation) if generation.is_file() else {}).items() if v}}
    t5 = isinstance(config.language, T5Config)
    stops = chosen.get("eos_token_id")
    stops = stops if isinstance(stops, list) else [1 if t5 else 2] if stops is None else [stops]
    pad = chosen.get("pad_token_id")
    bos = None if t5 else (2 if text.get("bos_token_id") is None else text["bos_token_id"])
    fill_id = (0 if t5 else 1) if pad is None else int(pad)
    return Tokenizer.from_file(path, bos=bos, pad=fill_id, stop_ids=tuple(stops), end=stops[0] if t5 else None)


def _identity(tensors: Tensors, config: Blip2Config) -> str:
    """SHA-256 over the configuration, the names and sizes of all tensors, and what the queries start from."""
    digest = hashlib.sha256(repr(config).encode())
    for name in sorted(tensors.names()):
        digest.update(f"{name}{tensors.shape(name)}".encode())
    for name in ("query_tokens", "qformer.layernorm.weight", "vision_model.post_layernorm.weight"):
        digest.update(tensors.get(name).float().numpy().tobytes())
    return digest.hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: holds no keys")
    return found
