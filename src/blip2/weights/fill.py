"""Give modules their weights, one tensor after another: read, joined, cast, moved. Nothing is held twice."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from blip2.errors import CheckpointError
from blip2.weights.rules import Rule, check, listed
from blip2.weights.tensors import Tensors

Progress = Callable[[int, int], None]
"""Tensors that are loaded, of how many."""


@dataclass(frozen=True)
class Part:
    """One module of a model that is being loaded.

    Attributes:
        module: from `skeleton()`.
        dtype: that its weights are to have; each its own where None.
    """

    module: nn.Module
    dtype: torch.dtype | None


def fill(
    parts: Mapping[str, Part],
    rules: Sequence[Rule],
    tensors: Tensors,
    source: object,
    device: torch.device,
    *,
    ignored: Collection[str] = (),
    given: Collection[str] = (),
    progress: Progress | None = None,
) -> None:
    """Fill modules from a checkpoint.

    Args:
        parts: modules by what stands before the dot in our names.
        rules: without `*`.
        source: what an error calls the checkpoint.
        ignored: tensors of theirs that may be there and are not needed.
        given: tensors of ours that are filled elsewhere.
    Raises:
        CheckpointError: tensors are missing, left over or of another shape; the message lists them.
    """
    check((name for rule in rules for name in rule.theirs), tensors.names() - {*ignored}, source)
    wanted = {
        f"{key}.{name}": tensor for key, part in parts.items() for name, tensor in part.module.state_dict().items()
    }
    check(wanted.keys() - {*given}, (name for rule in rules for name in rule.ours), "our names")
    _check_shapes(rules, tensors, wanted, source)
    for number, rule in enumerate(rules):
        made = rule.operation.join([tensors.get(name) for name in rule.theirs])
        for name, tensor in zip(rule.ours, made, strict=True):
            key, _, path = name.partition(".")
            put(parts[key].module, path, tensor.to(device, parts[key].dtype or tensor.dtype))
        if progress is not None:
            progress(number + 1, len(rules))


def put(module: nn.Module, name: str, tensor: Tensor) -> None:
    """A parameter or buffer of a module's module, by its dotted name."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    old = getattr(owner, leaf)
    if isinstance(old, nn.Parameter):
        owner.register_parameter(leaf, nn.Parameter(tensor, requires_grad=old.requires_grad))
    else:
        owner.register_buffer(leaf, tensor)


def _check_shapes(rules: Sequence[Rule], tensors: Tensors, wanted: Mapping[str, Tensor], source: object) -> None:
    wrong: list[str] = []
    for rule in rules:
        theirs = [torch.empty(tensors.shape(name), device="meta") for name in rule.theirs]
        names = " and ".join(rule.theirs)
        try:
            made = rule.operation.join(theirs)
        except RuntimeError:
            wrong.append(f"{names} do not go together: {', '.join(str(list(each.shape)) for each in theirs)}")
            continue
        for name, tensor in zip(rule.ours, made, strict=True):
            if tensor.shape != wanted[name].shape:
                wrong.append(f"{names} is {list(tensor.shape)}, the configuration wants {list(wanted[name].shape)}")
    if wrong:
        raise CheckpointError(f"{source}: {listed(wrong)}")
