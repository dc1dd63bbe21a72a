"""LoRA adapters in PEFT's files, merged into a language model's weights: what is computed then costs nothing more.

PEFT itself is not needed. Letters: N outputs and K inputs of a layer, R rank.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import cast

import torch
from torch import nn

from blip2.adapters.transformers_lm import TransformersLM
from blip2.errors import CheckpointError
from blip2.weights.rules import listed
from blip2.weights.tensors import Safetensors
from blip2.weights.transformers import read_json

FOLDER = "adapter"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # before every name in PEFT's files
# Keys of the configuration that change nothing of a finished adapter, or are read here. Any other must be empty: it
# stands for arithmetic that is not here.
_KNOWN = {
    *("r", "lora_alpha", "use_rslora", "peft_type", "bias", "init_lora_weights", "target_modules", "exclude_modules"),
    *("task_type", "peft_version", "base_model_name_or_path", "revision", "auto_mapping", "inference_mode"),
    *("lora_dropout", "layers_pattern", "layers_to_transform", "loftq_config", "megatron_core", "qalora_group_size"),
}
_PLAIN_STARTS = (True, False, "gaussian")  # others take something out of the base's weights at the start
_PARTS = ("lora_A", "lora_B")


def body(language: nn.Module) -> nn.Module:
    """The module that an adapter's names count from: of a model of transformers its own."""
    return cast("nn.Module", language.model) if isinstance(language, TransformersLM) else language


@torch.no_grad()
def merge(language: object, directory: Path, count: int) -> None:
    """Add an adapter to the weights of the layers that it changes.

    Args:
        language: with plain weights, not in int8 or int4.
        directory: the model's, whose folder `adapter` holds PEFT's files.
        count: how many layers it changes.
    Raises:
        CheckpointError: a file is missing or damaged, it is of another kind than LoRA's plain one, or does not fit.
    """
    folder = directory / FOLDER
    if not isinstance(language, nn.Module):
        raise CheckpointError(f"{folder}: this language model is no torch module")
    scale = _scale(folder / CONFIG)
    tensors = Safetensors.open([folder / WEIGHTS])
    pairs = _pairs(tensors, folder / WEIGHTS)
    if len(pairs) != count:
        raise CheckpointError(
            f"{folder / WEIGHTS}: changes {len(pairs)} layers, the model's configuration says {count}"
        )
    root = body(language)
    layers = {name: _layer(root, name, a, b, folder / WEIGHTS) for name, (a, b) in pairs.items()}
    for name, layer in layers.items():
        a, b = (tensors.get(f"{PREFIX}{name}.{part}.weight").to(layer.weight.device).float() for part in _PARTS)
        merged = (layer.weight.float() + scale * (b @ a)).to(layer.weight.dtype)  # (N, K)
        layer.weight = nn.Parameter(merged, requires_grad=False)  # anew: the old one may lie in a file


def _scale(path: Path) -> float:
    """What the product of both matrices is multiplied with."""
    values = read_json(path)
    rank, alpha, root = values.get("r"), values.get("lora_alpha"), bool(values.get("use_rslora"))
    plain = {
        "peft_type": values.get("peft_type") == "LORA",
        "bias": values.get("bias", "none") == "none",
        "init_lora_weights": values.get("init_lora_weights", True) in _PLAIN_STARTS,
        "r": type(rank) is int and rank >= 1,
        "lora_alpha": isinstance(alpha, int | float) and math.isfinite(alpha),
    }
    other = [key for key in sorted(values.keys() - _KNOWN) if values[key]] + [
        key for key, is_so in plain.items() if not is_so
    ]
    if other:
        raise CheckpointError(
            f"{path}: {other[0]} is {values.get(other[0])!r}: only plain LoRA is merged here; let PEFT merge "
            "it into its language model"
        )
    return float(cast("float", alpha)) / (cast("int", rank) ** (0.5 if root else 1))


def _pairs(tensors: Safetensors, path: Path) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Shapes of both matrices of each layer, by its name."""
    names = {name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in tensors.names()}
    wanted = {f"{PREFIX}{name}.{part}.weight": (name, part) for name in names for part in _PARTS}
    wrong = sorted(tensors.names() ^ wanted.keys())
    if wrong:
        raise CheckpointError(f"{path}: no whole adapter: {listed(wrong)}")
    return {
        name: (tensors.shape(f"{PREFIX}{name}.lora_A.weight"), tensors.shape(f"{PREFIX}{name}.lora_B.weight"))
        for name in sorted(names)
    }


def _layer(root: nn.Module, name: str, a: tuple[int, ...], b: tuple[int, ...], path: Path) -> nn.Linear:
    try:
        layer = root.get_submodule(name)
    except AttributeError:
        raise CheckpointError(f"{path}: {name} is no layer of this language model") from None
    if type(layer) is not nn.Linear:
        raise CheckpointError(f"{path}: {name} is no plain linear layer of this language model")
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or (b[0], a[1]) != tuple(layer.weight.shape):
        shapes = f"{list(b)} times {list(a)}"
        raise CheckpointError(f"{path}: {name}: {shapes} is not {list(layer.weight.shape)}")
    return layer
