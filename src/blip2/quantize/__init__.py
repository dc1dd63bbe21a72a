"""Linear layers whose weights take 16, 8 or 4 bits; nothing else in the package knows how they multiply.

Only weights are made coarse. half: 16 bits, multiplied in float32. int8 and fp8: one scale an output channel. int4: a
scale and a zero for each 64 inputs of an output channel. Activations lose nothing that counts, outliers among them:
where the machine multiplies 8 bits, each row goes in as two halves, of its own largest value; it never depends on its
neighbours. An image encoder's rows go in as one on some devices, see `Int8Linear.one_half`, `Fp8Linear.one_half`.

What a device multiplies with is found by asking it: a kernel is used where it gives the right numbers on a small
example, else the weights are made plain piece by piece. The plain way is also the one with a gradient.

Letters: M rows, K inputs, N outputs, G groups of inputs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn

from blip2.errors import CheckpointError, ConfigError
from blip2.model.language import Language
from blip2.pages import release_unwritten, trim
from blip2.quantize.fp8 import Fp8Linear, holds_fp8, to_fp8
from blip2.quantize.half import HalfLinear
from blip2.quantize.int4 import BLOCKS, GROUP, Int4Linear, reads_int4, to_int4
from blip2.quantize.int8 import Int8Linear, to_int8
from blip2.quantize.linear import QuantLinear, pieces

Scheme = Literal["int8", "fp8", "int4", "half"]
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)

HEAD_AT_ONCE = 2**25  # words' weights that are packed at a time: 32 MB, held four times meanwhile


def check_scheme(name: str | None, device: torch.device) -> Scheme | None:
    """A scheme by its name, for a device that it is to compute on.

    Raises:
        ConfigError: there is none of that name, or the device has no such numbers.
    """
    if name is None:
        return None
    if name == "fp8" and not holds_fp8(device.type):
        raise ConfigError(f"quantize 'fp8': {device.type} has no such numbers; use int8")
    for scheme in SCHEMES:
        if name == scheme:
            return scheme
    raise ConfigError(f"quantize {name!r} is none; use {', '.join(SCHEMES)}, or leave it out")


@torch.no_grad()
def quantized(linear: nn.Linear, weight: Tensor, scheme: Scheme, device: torch.device) -> QuantLinear:
    """A linear layer with coarse weights.

    Args:
        linear: gives its bias, whose values may come later.
        weight: float[N, K], on whichever device it is to be made coarse and stay.
        scheme: int4 takes int8 where it does not fit: inputs in groups of 64, outputs in blocks of 64 or 32.
        device: that it computes on.
    """
    bias = cast("nn.Parameter | None", linear.bias)
    if scheme == "half":
        return HalfLinear(weight, bias)
    if scheme == "fp8":
        return Fp8Linear(*to_fp8(weight), bias, device)
    outputs, inputs = weight.shape
    block = (reads_int4() if device.type == "cpu" else None) or BLOCKS[0]
    if scheme == "int4" and not (inputs % GROUP or outputs % block):
        return Int4Linear(*to_int4(weight, block), bias, device)
    return Int8Linear(*to_int8(weight), bias, device)


def quantize_layers(module: nn.Module, scheme: Scheme, device: torch.device) -> None:
    """Make the linear layers of a module's blocks coarse, one after another, where they are.

    What stands in no list of blocks keeps its weights: embeddings, heads, projections.
    """
    for name, child in list(module.named_modules()):
        if type(child) is nn.Linear and in_blocks(name):
            owner, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(owner), leaf, quantized(child, child.weight, scheme, device))


def quantize_head(language: Language, device: torch.device) -> None:
    """Make the products with a language model's words coarse, in int8: a copy, what is embedded stays as it is."""
    language.make_head = functools.partial(_int8_head, device=device)


def _int8_head(weight: Tensor, device: torch.device) -> Callable[[Tensor], Tensor]:
    made: list[Int8Linear] = []
    for rows in pieces(*weight.shape, at_once=HEAD_AT_ONCE if device.type == "cpu" else weight.numel()):
        some = weight[rows]
        made.append(Int8Linear(*to_int8(some), None, device))
        made[-1].pack()
        release_unwritten(some)  # of words only what is embedded is read again
        trim()
    return made[0] if len(made) == 1 else functools.partial(_beside, made)


def _beside(made: Sequence[Int8Linear], hidden: Tensor) -> Tensor:
    return torch.cat([piece(hidden) for piece in made], dim=-1)


def in_blocks(name: str) -> bool:
    """Whether a dotted name goes through a list of blocks."""
    return any(step.isdigit() for step in name.split("."))


def coarse_size(shape: torch.Size, scheme: Scheme) -> int:
    """Bytes of a weight of shape (N, K) with what makes it plain again."""
    outputs, inputs = shape
    if scheme == "half":
        return 2 * outputs * inputs + 4
    if scheme == "int4" and not (inputs % GROUP or outputs % BLOCKS[0]):
        return outputs * inputs // 2 + 4 * outputs * inputs // GROUP
    return outputs * inputs + 4 * outputs


def check_plain(module: nn.Module) -> None:
    """Raises CheckpointError where weights are coarse: no format of checkpoints holds them."""
    if any(isinstance(child, QuantLinear) for child in module.modules()):
        raise CheckpointError("coarse weights are not written: load the model without `quantize` to save it")
