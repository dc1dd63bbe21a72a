"""int8 weights: one scale an output channel, activations in whole numbers where the machine multiplies such.

Letters: M rows, K inputs, N outputs.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from blip2.products import INT8_END, by_halves, multiplies_whole_numbers, packing, plain_sums, reads_int8
from blip2.quantize.linear import QuantLinear, above_zero, pieces, plain_pieces

FEW = 8  # rows up to which int8 weights read once beat a product in float32


class Int8Linear(QuantLinear):
    """int8 weights [N, K] with scales float32[N].

    On CPUs that multiply whole numbers (AVX512-VNNI, AMX, AVX-VNNI) and on CUDA by torch's `_int_mm`; on other CPUs few
    rows by its `_weight_int8pack_mm`. What CUDA gives is checked as what a CPU gives.

    Attributes:
        one_half: rows whose largest value is at most `EVEN` times their root mean square go in as one int8 half: half
            the work where rows are many, and as much rounding as the weights have.
    """

    one_half = False

    def __init__(self, weight: Tensor, scale: Tensor, bias: nn.Parameter | None, device: torch.device) -> None:
        super().__init__(weight, scale, bias)
        outputs, inputs = weight.shape
        fits = device.type == "cpu" or not (outputs % 8 or inputs % 8)
        self._whole_numbers = fits and multiplies_whole_numbers(device.type)
        self._few_rows = device.type == "cpu" and not self._whole_numbers and reads_int8()

    def plain(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """See `QuantLinear`."""
        weight = self.weight
        for rows in pieces(*weight.shape):
            yield weight[rows].float().mul_(self.scale[rows, None]).to(dtype)

    def product(self, x: Tensor) -> Tensor:
        """See `QuantLinear`."""
        if self._packed is not None:
            return by_halves(x, self._packed.sums, one=self.one_half)
        if self._whole_numbers:
            sums = functools.partial(plain_sums, weight=self.weight)
            return by_halves(x, sums, one=self.one_half).mul_(self.scale)
        if self._few_rows and len(x) <= FEW:
            return torch.ops.aten._weight_int8pack_mm(x.bfloat16(), self.weight, self.scale.bfloat16()).float()
        return self._plainly(x)

    def _lay_out(self, weight: Tensor) -> Any:
        """As `QuantLinear`; where rows are many it would gain a twelfth and cost as much as two images."""
        kind = None if self.one_half else packing()
        return None if kind is None else kind(weight, self.scale)

    def _read_back(self, packed: Any) -> Tensor:
        return packed.plain()


def to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """float[N, K] made coarse: int8[N, K] and scales float32[N]."""
    coarse = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
    for rows, some in plain_pieces(weight):
        peak = torch.maximum(-some.amin(1), some.amax(1))  # `aminmax` is several times slower, `abs` takes memory
        scales[rows] = above_zero(peak / INT8_END)
        coarse[rows] = some.div_(scales[rows, None]).round_()
    return coarse, scales
