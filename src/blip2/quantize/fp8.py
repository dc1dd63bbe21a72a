"""8-bit floating-point weights (e4m3): for GPUs that multiply such, Hopper and newer.

A number keeps four bits whatever its size: normal weights lose 2.6%, in int8 0.8% of them and in int4 9%. Torch's own
product reads them, with a scale a row on both sides.

Letters: M rows, K inputs, N outputs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from blip2.device import passes
from blip2.products import close
from blip2.quantize.linear import QuantLinear, above_zero, pieces, plain_pieces

E4M3 = torch.float8_e4m3fn
END = torch.finfo(E4M3).max
MULTIPLE = 16  # that rows and columns must be of for CUDA's product


class Fp8Linear(QuantLinear):
    """e4m3 weights [N, K], kept as int8 so that no change of type turns them into wide ones, with scales float32[N].

    Where the device multiplies them a row of activations goes in as two e4m3 halves, as many bits together as bfloat16
    has: only weights are coarse. Few rows wait for weights to be read, and the second half costs them nothing; many
    take as long as in bfloat16. On a CPU, and on devices without the product, weights are made plain piece by piece.

    Attributes:
        one_half: rows go in as one half: half the work where rows are many, and as much rounding as the weights have.
    """

    one_half = False

    def __init__(self, weight: Tensor, scale: Tensor, bias: nn.Parameter | None, device: torch.device) -> None:
        super().__init__(weight, scale, bias)
        fits = not any(side % MULTIPLE for side in weight.shape)
        self._multiplies = device.type == "cuda" and fits and multiplies_fp8(device.type)

    def plain(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """See `QuantLinear`."""
        weight = self.weight.view(E4M3)
        for rows in pieces(*weight.shape):
            yield weight[rows].float().mul_(self.scale[rows, None]).to(dtype)

    def product(self, x: Tensor) -> Tensor:
        """See `QuantLinear`."""
        return by_fp8(x, self.weight, self.scale, one=self.one_half) if self._multiplies else self._plainly(x)


def to_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """float[N, K] made coarse: e4m3 seen as int8[N, K], and scales float32[N]."""
    coarse = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
    for rows, some in plain_pieces(weight):
        scales[rows] = above_zero(torch.maximum(-some.amin(1), some.amax(1)) / END)
        coarse[rows] = some.div_(scales[rows, None]).to(E4M3).view(torch.int8)
    return coarse, scales


def by_fp8(x: Tensor, weight: Tensor, scale: Tensor, *, one: bool = False) -> Tensor:
    """Activations times e4m3 weights, as `Fp8Linear` holds them, by torch's product: float[M, K] to bfloat16[M, N].

    A row is divided by its own largest value over 448, and what rounding to e4m3 leaves of it goes in as a row of its
    own. An error is 2^-8 of a number at most, or 2^-19 of the row's largest: an outlier costs the others nothing. Every
    operation is a kernel's start on a GPU, which few rows wait for longer than for the arithmetic: hence so few.

    Args:
        one: without the second half.
    """
    halves = x.expand(1 if one else 2, *x.shape)  # (H, M, K)
    peak = torch.linalg.vector_norm(halves, math.inf, dim=-1, keepdim=True, dtype=torch.float32)
    step = torch.rsub(peak, torch.finfo(torch.float32).tiny, alpha=-1 / END)  # (H, M, 1): peak / 448, above zero
    coarse = torch.empty(halves.shape, dtype=E4M3, device=x.device)
    steps = x / step.select(0, 0)
    high = coarse.select(0, 0).copy_(steps)
    if not one:
        coarse.select(0, 1).copy_(steps.sub_(high.float()))
    across = scale.float()[None]  # (1, N)
    found = torch.ops.aten._scaled_mm(
        coarse.flatten(0, 1), weight.view(E4M3).T, step.flatten(0, 1), across, out_dtype=torch.bfloat16
    )
    return found if one else found.unflatten(0, (2, -1)).sum(0)


@functools.cache
def holds_fp8(device: str) -> bool:
    """Whether a device can make e4m3 numbers wide."""
    return passes(lambda: bool(torch.zeros(1, dtype=torch.int8, device=device).view(E4M3).float() == 0))


@functools.cache
def multiplies_fp8(device: str) -> bool:
    """Whether `torch._scaled_mm` takes a scale a row on both sides on this device, and is right."""
    draw = torch.Generator().manual_seed(0)
    weight, scale = (each.to(device) for each in to_fp8(torch.randn(48, 208, generator=draw)))
    plain = weight.view(E4M3).float() * scale[:, None]

    def test() -> bool:
        right = True
        for count in (1, 5, 257):
            x = (100 * torch.randn(count, 208, generator=draw)).clamp_(-END, END).to(device)
            right = right and close(by_fp8(x, weight, scale), x @ plain.T)
            x = x.to(E4M3).float()
            x[:, 0] = END  # with it a step is 1, and nothing is left for a second half
            right = right and close(by_fp8(x, weight, scale, one=True), x @ plain.T)
        return right

    return passes(test)
