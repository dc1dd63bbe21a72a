"""float16 weights for CPUs that do not compute in 16 bits.

Letters: N outputs, K inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from blip2.products import by_half, multiplies_half, pack_half, unpack_half
from blip2.quantize.linear import QuantLinear, pieces


class HalfLinear(QuantLinear):
    """float16 weights [N, K], multiplied in float32: for CPUs that do not compute in 16 bits. The scale is 1.

    Weights of a bfloat16 checkpoint keep every bit from 6e-5 on; below, a difference of 3e-8 is left.
    """

    def __init__(self, weight: Tensor, bias: nn.Parameter | None) -> None:
        end = torch.finfo(torch.float16).max
        super().__init__(weight.half().clamp_(-end, end), torch.ones((), device=weight.device), bias)

    def plain(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """See `QuantLinear`."""
        weight = self.weight
        for rows in pieces(*weight.shape):
            yield weight[rows].to(dtype)

    def product(self, x: Tensor) -> Tensor:
        """See `QuantLinear`."""
        return self._plainly(x.float()) if self._packed is None else by_half(x, self._packed)

    def _lay_out(self, weight: Tensor) -> Any:
        return pack_half(weight) if multiplies_half() else None

    def _read_back(self, packed: Any) -> Tensor:
        return unpack_half(packed)
