"""int4 weights: a scale and a zero for each 64 inputs of an output channel.

Letters: M rows, K inputs, N outputs, G groups of inputs, B outputs of a block.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip2.device import computes, passes
from blip2.products import close
from blip2.quantize.linear import QuantLinear, above_zero, pieces, plain_pieces

TILE = 8  # outputs of a tile that a GPU's tensor cores take
SPAN = 32  # inputs of an output that one word in each of four lanes holds
GROUP = 64  # inputs that share a scale in int4: divides the widths of every published model
BLOCKS = (64, 32)  # outputs that int4 packs together: what kernels for AVX-512 and for AVX2 read
MANY = 192  # rows from which plain bfloat16 weights beat the kernel that reads int4; measured on CPUs only
LEVELS, MIDDLE = 15, 8


class Int4Linear(QuantLinear):
    """int4 weights, two a byte [N/B, K, B/2], with scales and zeros bfloat16[G, N, 2].

    A byte holds an output channel of the first half of its block below one of the second: what torch's CPU kernels read
    (`torch.ops.aten._weight_int4pack_mm_for_cpu`). On CUDA they are packed in tiles for `_weight_int4pack_mm`, where it
    is right; elsewhere made plain, piece by piece: a quarter of the memory, not faster.
    """

    laid_out_on = "cuda"

    def __init__(self, weight: Tensor, scale: Tensor, bias: nn.Parameter | None, device: torch.device) -> None:
        super().__init__(weight, scale, bias)
        self._reads = device.type == "cpu" and reads_int4() == 2 * weight.shape[2]
        self._half = device.type == "cpu" and computes(torch.bfloat16, device)
        self._tiled = device.type == "cuda" and reads_tiles(device.type)
        self._block = 2 * weight.shape[2]

    def plain(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """See `QuantLinear`."""
        if self._packed is not None:
            return plain_tiles(self._packed, self.scale, dtype)
        return plain_int4(self.weight, self.scale, dtype)

    def product(self, x: Tensor) -> Tensor:
        """See `QuantLinear`."""
        if self._packed is not None and len(x) <= MANY:
            return by_tiles(x, self._packed, self.scale)
        if not self._reads or (self._half and len(x) > MANY):
            return self._plainly(x.bfloat16() if self._half else x)
        return by_int4(x, self.weight, self.scale)

    def _lay_out(self, weight: Tensor) -> Any:
        return to_tiles(weight) if self._tiled else None

    def _read_back(self, packed: Any) -> Tensor:
        return torch.cat([_in_blocks(levels.T, self._block) for _, levels in _tile_levels(packed, of=self._block)])


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
        packed[rows.start // block : rows.stop // block] = _in_blocks(some.to(torch.uint8), block)
        scales[:, rows] = torch.stack([scale, zero], dim=-1).transpose(0, 1)
    return packed, scales


def _in_blocks(levels: Tensor, block: int) -> Tensor:
    """Levels uint8[n, K] as `Int4Linear` holds them: int8[n/B, K, B/2]."""
    halves = levels.reshape(-1, 2, block // 2, levels.shape[1])
    return (halves[:, 0] | halves[:, 1] << 4).transpose(1, 2).contiguous().view(torch.int8)


# -- as CPUs read them -------------------------------------------------------------------------------------------------


def by_int4(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Activations times int4 weights, as `Int4Linear` holds them, by torch's kernel: float[M, K] to float32[M, N]."""
    blocks, inputs, half = weight.shape
    packed = weight.view(torch.uint8).view(2 * half * blocks, inputs // 2)
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x.bfloat16(), packed, GROUP, scale.bfloat16()).float()


def plain_int4(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """int4 weights, as `Int4Linear` holds them, made plain, some output channels after another: float[n, K]."""
    blocks, inputs, half = weight.shape
    for rows in pieces(2 * half * blocks, inputs, of=2 * half):
        packed = weight[rows.start // (2 * half) : rows.stop // (2 * half)].view(torch.uint8)
        packed = packed.transpose(0, 1)  # (K, n/B, B/2)
        levels = torch.empty(*packed.shape[:2], 2, half, dtype=dtype, device=packed.device)
        levels[:, :, 0], levels[:, :, 1] = packed & 15, packed >> 4
        yield _plain(levels.view(inputs, -1), scale[:, rows])


def _plain(levels: Tensor, scale: Tensor) -> Tensor:
    """Levels float[K, n], which are overwritten, with scales and zeros [G, n, 2]: weights float[n, K]."""
    width, zero = scale[:, None].to(levels.dtype).unbind(-1)  # (G, 1, n)
    plain = levels.view(-1, GROUP, width.shape[-1]).mul_(width).add_(zero - MIDDLE * width)
    return plain.view(levels.shape).T


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


# -- as CUDA reads them ------------------------------------------------------------------------------------------------


def to_tiles(weight: Tensor) -> Tensor:
    """int4 weights, as `Int4Linear` holds them, in the order in which a GPU's lanes take them.

    Torch's operator makes tiles of bytes that hold two inputs each, the first of them above the second. T is how many
    tiles of 16 inputs a lane reads at once: 8, or 4 where the inputs do not divide.

    Returns:
        int32[N/8, K/16T, 32, T/2].
    """
    blocks, inputs, half = weight.shape
    tiles = 8 if inputs % 128 == 0 else 4
    made: list[Tensor] = []
    for rows in pieces(2 * half * blocks, inputs, of=2 * half):
        packed = weight[rows.start // (2 * half) : rows.stop // (2 * half)].view(torch.uint8)  # (n/B, K, B/2)
        levels = torch.stack([packed & 15, packed >> 4], dim=1).transpose(2, 3).reshape(-1, inputs)  # (n, K)
        pairs = (levels[:, 0::2] << 4) | levels[:, 1::2]
        made.append(torch.ops.aten._convert_weight_to_int4pack(pairs, tiles))
    return torch.cat(made)


def by_tiles(x: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    """Activations times int4 weights in tiles, by torch's kernel: float[M, K] to bfloat16[M, N]."""
    return torch.ops.aten._weight_int4pack_mm(x.bfloat16().contiguous(), packed, GROUP, scale.bfloat16())


def plain_tiles(packed: Tensor, scale: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """int4 weights in tiles made plain, some output channels after another: float[n, K]."""
    for rows, levels in _tile_levels(packed, of=TILE):
        yield _plain(levels.to(dtype), scale[:, rows])


def _tile_levels(packed: Tensor, of: int) -> Iterator[tuple[slice, Tensor]]:
    """Some output channels after another, a multiple of so many, of weights in tiles: their levels, uint8[K, n].

    A lane's word holds eight inputs of an output: of 32 those at 2c, 8 + 2c, 16 + 2c and 24 + 2c in its lower half from
    the lowest bits up, and each one's right neighbour in its upper half. Lanes count c from 0 to 3, then the output.
    """
    count, across, _, words = packed.shape
    inputs = across * words * SPAN
    for rows in pieces(count * TILE, inputs, of=of):
        some = packed[rows.start // TILE : rows.stop // TILE].view(torch.uint8)  # a word's lowest byte first
        some = some.view(-1, across, TILE, 4, words, 2, 2)  # (n/8, K/16T, 8, c, T/2, neighbours, bytes)
        levels = torch.stack([some & 15, some >> 4], dim=-1)
        yield rows, levels.permute(1, 4, 6, 7, 3, 5, 0, 2).reshape(inputs, -1)


@functools.cache
def reads_tiles(device: str) -> bool:
    """Whether `torch.ops.aten._weight_int4pack_mm` is there and right on a device, and its tiles are read back."""
    draw = torch.Generator().manual_seed(0)

    def test() -> bool:
        right = True
        for inputs in (11 * 128, 21 * 64):  # the width of EVA's ViT-g, which nothing larger divides, and half tiles
            weight, scale = (each.to(device) for each in to_int4(torch.randn(128, inputs, generator=draw), BLOCKS[0]))
            packed, plain = to_tiles(weight), torch.cat(list(plain_int4(weight, scale, torch.float32)))
            right = right and torch.equal(torch.cat(list(plain_tiles(packed, scale, torch.float32))), plain)
            for rows in (1, 40):
                x = torch.randn(rows, inputs, generator=draw).to(device).bfloat16()
                right = right and close(by_tiles(x, packed, scale), x.float() @ plain.T)
        return right

    return passes(test)
