"""Our own format: a directory with `config.json`, `bridge.safetensors` and, for our own encoder, `vision.safetensors`.

`vocabulary.safetensors` is there where the bridge was trained to write only some of the language model's tokens.

Frozen parts that somebody else made are not in it: the configuration names them with the SHA-256 of their weights.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from blip2.config import Blip2Config, write_config
from blip2.errors import CheckpointError
from blip2.files import replacing
from blip2.model.bridge import Bridge
from blip2.weights import card

FROZEN_WORDS = "qformer.words.weight"  # belongs to the frozen text part where the configuration says so


def save(
    directory: Path,
    config: Blip2Config,
    bridge: Bridge,
    vision: nn.Module | None = None,
    dtype: torch.dtype | None = None,
    vocabulary: Tensor | None = None,
) -> None:
    """Write a model; each file appears whole or not at all, the configuration last.

    Args:
        config: with the SHA-256 of each frozen part filled in.
        vision: our own image encoder, None where a frozen part is named.
        dtype: that weights are stored in, their own where None.
        vocabulary: int64[K], sorted: the tokens that the bridge was trained to write, all where None.
    Raises:
        CheckpointError: the directory cannot be written (a full disk, say); the files before are untouched.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _write(trained(bridge), directory / "bridge.safetensors", dtype)
        if vision is not None:
            _write(vision.state_dict(), directory / "vision.safetensors", dtype)
        if vocabulary is not None:
            _write({"ids": vocabulary}, directory / "vocabulary.safetensors", None)
        config = config.replace(vocabulary=None if vocabulary is None else len(vocabulary))
        card.write(directory, config)
        with replacing(directory / "config.json") as partial:
            write_config(config, partial)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own error
        raise CheckpointError(
            f"{directory}: the model cannot be written: {error}; free some space or choose another"
        ) from error


def trained(bridge: Bridge) -> dict[str, Tensor]:
    """The bridge's tensors by name, without what belongs to a frozen part."""
    state = bridge.state_dict()
    if bridge.config.qformer.frozen_words:
        state.pop(FROZEN_WORDS, None)
    return state


def _write(state: dict[str, Tensor], path: Path, dtype: torch.dtype | None) -> None:
    stored = {name: tensor.detach().cpu().to(dtype or tensor.dtype).contiguous() for name, tensor in state.items()}
    with replacing(path) as partial:
        save_file(stored, partial)
