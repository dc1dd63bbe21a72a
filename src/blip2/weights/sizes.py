"""Sizes in a configuration that is not trusted, before a module is made by them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from blip2.config import PartConfig, T5Config
from blip2.errors import CheckpointError

MOST = 2**20  # of any number: three of them in one shape are still a number of bytes that torch can count
MAY_BE_0 = ("adapter",)  # counts of what a model need not have


def check_sizes(parts: Mapping[str, Any], source: object, tensors: int = 0) -> None:
    """Refuse sizes that no model has, and more layers than there are tensors.

    Args:
        parts: configurations by their keys; what is None is left out.
        tensors: of the checkpoint that these parts are in; 0 where they are not known.
    Raises:
        CheckpointError: a number is out of its range; the message names it.
    """
    for key, part in parts.items():
        if part is None:
            continue
        for name, value in vars(part).items():
            low = 0 if name.endswith("_id") or name in MAY_BE_0 else 1
            if type(value) is int and not low <= value <= MOST:
                raise CheckpointError(f"{source}: {key}: our {name} would be {value}, not {low} to {MOST:,}")
            if type(value) is float and not 0 <= value < 1:  # a share, or what keeps a norm from dividing by nothing
                raise CheckpointError(f"{source}: {key}: our {name} would be {value}, not from 0 to less than 1")
        if not isinstance(part, PartConfig) and hasattr(part, "layers"):
            _check_shape(part, f"{source}: {key}", tensors)


def _check_shape(part: Any, where: str, tensors: int) -> None:
    """What numbers of one part say of each other, and of the checkpoint."""
    if tensors and part.layers > tensors:
        raise CheckpointError(f"{where}: {part.layers} layers, and the checkpoint has {tensors} tensors")
    if isinstance(part, T5Config):
        if part.buckets < 4 or part.max_distance <= part.buckets // 2:
            raise CheckpointError(f"{where}: {part.buckets} buckets cannot hold distances up to {part.max_distance}")
        if part.start_id >= part.vocab_size:
            raise CheckpointError(f"{where}: our start_id would be {part.start_id}, of {part.vocab_size} words")
    elif part.width % part.heads:
        raise CheckpointError(f"{where}: {part.heads} heads cannot share a width of {part.width}")
