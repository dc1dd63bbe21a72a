"""Models in PaddleNLP's directories: `config.json` and `model_state.pdparams`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from blip2.blip2 import Blip2
from blip2.config import Blip2Config
from blip2.errors import CheckpointError
from blip2.files import replacing
from blip2.weights import calibrated, card, pdparams, transformers
from blip2.weights.maps import paddle as maps
from blip2.weights.maps import transformers_config as keys
from blip2.weights.placement import WHOLE, Memory
from blip2.weights.rules import to_theirs
from blip2.weights.tensors import Pickled

FILE = "model_state.pdparams"
_OPT_KEYS = {  # PaddleNLP's to transformers'
    "intermediate_size": "ffn_dim",
    "hidden_act": "activation_function",
    "normalize_before": "do_layer_norm_before",
    "hidden_dropout_prob": "dropout",
    "attention_probs_dropout_prob": "attention_dropout",
}
_VISION_EPS = 1e-5  # where the file leaves it out


def holds(directory: Path) -> bool:
    """Whether a directory is of this format."""
    return (directory / FILE).is_file()


def read_config(directory: Path) -> Blip2Config:
    """What a directory's configuration and the names of its tensors tell.

    Raises:
        CheckpointError: as `load`.
    """
    path = directory / "config.json"
    return keys.config(_translated(transformers.read_json(path)), path, pdparams.read(directory / FILE).keys())


def load(directory: Path, device: torch.device, dtype: torch.dtype | None, memory: Memory = WHOLE) -> Blip2:
    """A model, read without running anything that its pickle names.

    Args:
        dtype: of the frozen parts; the bridge computes in float32. None keeps every tensor's own type, for converting.
        memory: how the frozen parts are kept.
    Raises:
        CheckpointError: a file is missing or damaged, the model is of another kind, or its tensors do not fit.
    """
    values = _translated(transformers.read_json(directory / "config.json"))
    tensors = Pickled(pdparams.read(directory / FILE))
    config = keys.config(values, directory / "config.json", tensors.names())
    rules = maps.blip2(config)
    return transformers.build(config, values, tensors, rules, maps.BESIDE, directory, device, dtype, memory)


def save(model: Blip2, directory: Path) -> None:
    """Write a model as PaddleNLP does, in the types that its weights have; `load` reads it back bit for bit.

    Raises:
        CheckpointError: the format cannot hold the model, or the directory cannot be written.
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise CheckpointError("PaddleNLP's format holds models that write, not those that match")
    values = keys.values(model.config, bos_id=tokenizer.bos, stop_ids=tokenizer.stop_ids, pad_id=tokenizer.pad)
    theirs = to_theirs(maps.blip2(model.config), transformers.tensors_of(model), "this model")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").unlink(missing_ok=True)  # until all is there, there is no model
        pdparams.write(theirs, directory / FILE)
        with replacing(directory / "tokenizer.json") as partial:
            tokenizer.rust.save(str(partial))
        card.write(directory, model.config)
        calibrated.place(directory).unlink(missing_ok=True)  # of a model that was here before
        with replacing(directory / "config.json") as partial:
            partial.write_text(json.dumps(_untranslated(values), indent=2) + "\n")
    except OSError as error:
        raise CheckpointError(f"{directory}: the model cannot be written: {error}; free some space") from error


def _translated(values: Mapping[str, Any]) -> dict[str, Any]:
    """transformers' keys in place of PaddleNLP's."""
    text, vision = dict(values.get("text_config") or {}), dict(values.get("vision_config") or {})
    if text.get("model_type", "opt") == "opt":
        text = {_OPT_KEYS.get(key, key): value for key, value in text.items()}
    return {**values, "text_config": text, "vision_config": {"layer_norm_eps": _VISION_EPS, **vision}}


def _untranslated(values: Mapping[str, Any]) -> dict[str, Any]:
    back = {theirs: ours for ours, theirs in _OPT_KEYS.items()}
    text = values["text_config"]
    if text["model_type"] == "opt":
        text = {back.get(key, key): value for key, value in text.items()}
    return {**values, "text_config": text}
