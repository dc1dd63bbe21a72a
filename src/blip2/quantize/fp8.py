"""8-bit floating-point weights (e4m3): for GPUs that multiply such, Hopper and newer.

A number keeps four bits whatever its size: normal weights lose 2.6%, in int8 0.8% of them and in int4 9%. Torch's own
product reads them, with a scale a row on both sides.

Letters: M rows, K inputs, N outputs.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from blip2.device import passes
from blip2.products import close
from blip2.quantize.linear import QuantLinear, above_zero, pieces, plain_pieces

E4M3 = torch.float8_e4m3fn
END = torch.finfo(E4M3).max
FINER = 16.0  # steps of the second half in one of the first: what the first leaves, a sixteenth at most, fits again
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
    """Activations times e4m3 weights, as `Fp8Linear` holds them, by torch's product: float[M, K] to float32[M, N].

    A row is divided by its own largest value over 448. What rounding to e4m3 leaves of a number is at most a sixteenth
    of it, and goes in again as a row of its own, 16 times as large. Numbers of their own exponents need no help with
    outliers: what is 4,000 times smaller than a row's largest keeps all its bits.

    Args:
        one: without the second half.
    """
    x = x.float().contiguous()
    step = (x.abs().amax(1, keepdim=True) / END).clamp_(min=torch.finfo(torch.float32).tiny)  # (M, 1)
    steps = x / step
    high = steps.to(E4M3)
    if one:
        return _multiplied(high, step, weight, scale).float()
    low = (steps - high.float()).mul_(FINER).to(E4M3)
    first, second = _multiplied(torch.cat([high, low]), torch.cat([step, step / FINER]), weight, scale).chunk(2)
    return first.float().add_(second)


def _multiplied(x: Tensor, step: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    across = scale.float()[None]  # (1, N)
    return torch.ops.aten._scaled_mm(x, weight.view(E4M3).T, step, across, out_dtype=torch.bfloat16)


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
