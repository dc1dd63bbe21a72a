"""Give modules their weights, one tensor after another: read, joined, cast, made coarse, moved. None is held twice.

On a CPU a tensor that keeps its type stays mapped to the checkpoint's safetensors: its pages come when it is used, and
the system may drop them. What is meant to lie on disk and is not there as it is needed gets a file of its own.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from blip2.errors import CheckpointError
from blip2.files import cache_directory
from blip2.model.t5 import T5
from blip2.pages import release
from blip2.protocols import Progress
from blip2.quantize import in_blocks, quantized
from blip2.weights.placement import DISK, FROZEN, Home, put
from blip2.weights.rules import Rule, check, listed
from blip2.weights.tensors import Safetensors, Tensors


@dataclass(frozen=True)
class Part:
    """One module of a model that is being loaded.

    Attributes:
        module: from `skeleton()`, its tensors in the types that they are to have.
        keeps: whether each tensor has the checkpoint's type instead.
    """

    module: nn.Module
    keeps: bool

    @classmethod
    def of(cls, module: nn.Module, dtype: torch.dtype | None) -> Part:
        """With weights of a type, that of the checkpoint where None; in float16, T5's that must be float32 are."""
        if dtype is not None:
            module.to(dtype)
        if dtype is torch.float16 and isinstance(module, T5):
            module.half_safe()
        return cls(module, dtype is None)


def fill(
    parts: Mapping[str, Part],
    rules: Sequence[Rule],
    tensors: Tensors,
    source: object,
    home: Home,
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
        home: where the tensors go; `home.connect` makes them work together when all are filled.
        ignored: tensors of theirs that may be there and are not needed.
        given: tensors of ours that are filled elsewhere.
    Raises:
        CheckpointError: tensors are missing, left over or of another shape; the message lists them. Or the disk that
            some are to lie on is full.
    """
    check((name for rule in rules for name in rule.theirs), tensors.names() - {*ignored}, source)
    wanted = {
        f"{key}.{name}": tensor for key, part in parts.items() for name, tensor in part.module.state_dict().items()
    }
    check(wanted.keys() - {*given}, (name for rule in rules for name in rule.ours), "our names")
    _check_shapes(rules, tensors, wanted, source)
    for number, rule in enumerate(rules):
        read = [tensors.get(name) for name in rule.theirs]
        made = rule.operation.join(read)
        settled: list[Tensor] = []
        for name, tensor in zip(rule.ours, made, strict=True):
            mapped = isinstance(tensors, Safetensors) and any(tensor is each for each in read)
            settled += _settle(parts[name.partition(".")[0]], name, tensor, home, mapped=mapped)
        if isinstance(tensors, Safetensors):
            kept = {each.untyped_storage().data_ptr() for each in settled}
            for each in read:
                if each.untyped_storage().data_ptr() not in kept:
                    release(each)
        if progress is not None:
            progress(number + 1, len(rules))


def _settle(part: Part, name: str, tensor: Tensor, home: Home, *, mapped: bool) -> list[Tensor]:
    """One tensor to its place, as it is to lie there.

    Args:
        mapped: whether it lies in a file of the checkpoint.
    Returns:
        what lies there now, if that may be the tensor itself.
    """
    key, _, path = name.partition(".")
    module, _, leaf = path.rpartition(".")
    place = home.place(name)
    here = torch.device("cpu" if place == DISK else place)
    owner = part.module.get_submodule(module)
    if home.quantize and key in FROZEN and in_blocks(path) and leaf == "weight" and type(owner) is nn.Linear:
        computes = home.device if here.type == "cpu" else here
        layer = quantized(owner, tensor.to(here), home.quantize, computes)
        if place == DISK:
            layer.weight, layer.scale = on_disk(layer.weight), on_disk(layer.scale)
        part.module.set_submodule(module, layer)
        return []
    made = tensor.to(here, tensor.dtype if part.keeps else getattr(owner, leaf).dtype)
    made = on_disk(made) if place == DISK and not (mapped and made is tensor) else made
    put(part.module, path, made)
    return [made]


def on_disk(tensor: Tensor) -> Tensor:
    """The same values, mapped from a file in the cache directory that is gone when they are.

    Raises:
        CheckpointError: it cannot be written.
    """
    path = cache_directory() / "offload" / f"{secrets.token_hex(8)}.safetensors"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"tensor": tensor.contiguous()}, path)
        mapped = Safetensors.open([path]).get("tensor")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path.parent}: what does not fit into memory cannot be written: {error}; free some space there or set "
            "BLIP2_CACHE to another directory"
        ) from None
    finally:
        with contextlib.suppress(OSError):  # where an open file cannot be deleted it stays in the cache
            path.unlink(missing_ok=True)
    return mapped


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
