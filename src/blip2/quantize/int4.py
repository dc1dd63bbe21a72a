"""int4 weights: a scale and a zero for each 64 inputs of an output channel.

Letters: M rows, K inputs, N outputs, G groups of inputs, B outputs of a block.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip2.device import computes, passes
from blip2.products import close
from blip2.quantize.linear import QuantLinear, above_zero, pieces, plain_pieces

GROUP = 64  # inputs that share a scale in int4: divides the widths of every published model
BLOCKS = (64, 32)  # outputs that int4 packs together: what kernels for AVX-512 and for AVX2 read
MANY = 192  # rows from which plain bfloat16 weights beat the kernel that reads int4
LEVELS, MIDDLE = 15, 8


class Int4Linear(QuantLinear):
    """int4 weights, two a byte [N/B, K, B/2], with scales and zeros bfloat16[G, N, 2].

    A byte holds an output channel of the first half of its block below one of the second: what torch's CPU kernels read
    (`torch.ops.aten._weight_int4pack_mm_for_cpu`). On CUDA the weights are made plain, piece by piece: a quarter of the
    memory, not faster.
    """

    def __init__(self, weight: Tensor, scale: Tensor, bias: nn.Parameter | None, device: torch.device) -> None:
        super().__init__(weight, scale, bias)
        self._reads = device.type == "cpu" and reads_int4() == 2 * weight.shape[2]
        self._half = device.type == "cpu" and computes(torch.bfloat16, device)

    def plain(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """See `QuantLinear`."""
        return plain_int4(self.weight, self.scale, dtype)

    def product(self, x: Tensor) -> Tensor:
        """See `QuantLinear`."""
        if not self._reads or (self._half and len(x) > MANY):
            return self._plainly(x.bfloat16() if self._half else x)
        return by_int4(x, self.weight, self.scale)


def to_int4(weight: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """float[N, K] made coarse: weights and scales as `Int4Linear` holds them."""
    outputs, inputs = weight.shape
    packed = torch.empty(outputs // block, inputs, block // 2, dtype=torch.int8, device=weight.device)
    scales = torch.empty(inputs // GROUP, outputs, 2, dtype=torch.bfloat16, device=weight.device)
    for rows, some in plain_pieces(weight, of=block):
        groups = some.unflatten(1, (-1, GROUP))  # (n, G, 64)
        low, high = groups.amin(2), groups.amax(2)
        scale = above_zero((high - low) / LEVELS).bfloat16()
        zero = (low + MIDDLE * scale.float()).bfloat16()
        groups.sub_(zero[..., None]).div_(scale[..., None]).add_(MIDDLE).round_().clamp_(0, LEVELS)
        levels = some.to(torch.uint8).view(-1, 2, block // 2, inputs)
        both = levels[:, 0].bitwise_or_(levels[:, 1] << 4).transpose(1, 2)  # (n/B, K, B/2)
        packed[rows.start // block : rows.stop // block] = both.view(torch.int8)
        scales[:, rows] = torch.stack([scale, zero], dim=-1).transpose(0, 1)
    return packed, scales


def by_int4(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Activations times int4 weights, as `Int4Linear` holds them, by torch's kernel: float[M, K] to float32[M, N]."""
    blocks, inputs, half = weight.shape
    packed = weight.view(torch.uint8).view(2 * half * blocks, inputs // 2)
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x.bfloat16(), packed, GROUP, scale).float()


def plain_int4(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """int4 weights, as `Int4Linear` holds them, made plain, some output channels after another: float[n, K]."""
    blocks, inputs, half = weight.shape
    for rows in pieces(2 * half * blocks, inputs, of=2 * half):
        packed = weight[rows.start // (2 * half) : rows.stop // (2 * half)].view(torch.uint8)
        packed = packed.transpose(0, 1)  # (K, n/B, B/2)
        levels = torch.empty(*packed.shape[:2], 2, half, dtype=dtype, device=packed.device)
        levels[:, :, 0], levels[:, :, 1] = packed & 15, packed >> 4
        width, zero = scale[:, None, rows].to(dtype).unbind(-1)  # (G, 1, n)
        plain = levels.view(-1, GROUP, width.shape[-1]).mul_(width).add_(zero - MIDDLE * width)
        yield plain.view(inputs, -1).T


@functools.cache
def reads_int4() -> int | None:
    """How many outputs go into a block of what `torch.ops.aten._weight_int4pack_mm_for_cpu` reads; None without it."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(128, 2 * GROUP, generator=draw)
    x = torch.randn(3, 2 * GROUP, generator=draw).bfloat16()
    for block in BLOCKS:
        packed = to_int4(weight, block)
        exact = torch.cat([F.linear(x.float(), some) for some in plain_int4(*packed, torch.float32)], dim=1)
        if passes(lambda packed=packed, exact=exact: close(by_int4(x, *packed), exact)):
            return block
    return None
