"""A linear layer with coarse weights: what every kind of them has in common.

Letters: M rows, K inputs, N outputs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PLAIN_AT_ONCE = 2**22  # weights that are made plain at a time: 16 MB in float32
COARSE_AT_ONCE = 2**20  # weights that are made coarse at a time: 4 MB in float32


class QuantLinear(nn.Module, ABC):
    """x Wᵀ + b, in the type of x; the gradient to x is that of the plain weights.

    Attributes:
        laid_out_on: the kind of device that `pack` is for.
        weight: int8, as the scheme lays it out.
        scale: what makes it plain again.
        bias: float[N] or None.
    """

    laid_out_on: ClassVar[str] = "cpu"

    def __init__(self, weight: Tensor, scale: Tensor, bias: nn.Parameter | None) -> None:
        super().__init__()
        self._packed: Any = None
        self.weight: Tensor
        self.scale: Tensor
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.bias = bias

    @abstractmethod
    def plain(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """The weights, some output channels after another: float[n, K]."""

    @abstractmethod
    def product(self, x: Tensor) -> Tensor:
        """x Wᵀ without a gradient, by the fastest way that is right: float[M, K] to float[M, N]."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)  # (M, K)
        recorded = torch.is_grad_enabled()
        out = self._plainly(rows) if recorded and x.requires_grad else self.product(rows)  # (M, N)
        if self.bias is not None:
            learned = recorded and (x.requires_grad or self.bias.requires_grad)
            in_place = not learned and out.dtype == torch.result_type(out, self.bias)
            out = out.add_(self.bias) if in_place else out + self.bias
        return out.to(x.dtype).unflatten(0, x.shape[:-1])

    def _plainly(self, x: Tensor) -> Tensor:
        return torch.cat([F.linear(x, some) for some in self.plain(x.dtype)], dim=1)

    # -- packed for a device's products --------------------------------------------------------------------------------

    def pack(self) -> None:
        """Lay the weights out as the device's product reads them, if it has one; who asks gets them as they were."""
        if self._packed is None and self.weight.device.type == self.laid_out_on:
            self._packed = self._lay_out(self.weight)
        if self._packed is not None:
            self._buffers.pop("weight", None)

    def _lay_out(self, weight: Tensor) -> Any:  # noqa: ARG002
        """The weights packed, None where there is no product for such."""
        return None

    def _read_back(self, packed: Any) -> Tensor:
        """The weights of what `_lay_out` gave."""
        return packed

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and self._packed is not None:
            return self._read_back(self._packed)
        return super().__getattr__(name)

    def __getstate__(self) -> dict[str, Any]:  # copying and pickling
        return {**self.__dict__, "_packed": None, "_buffers": {"weight": self.weight, "scale": self.scale}}

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        again, self._buffers["weight"], self._packed = self._packed is not None, self.weight, None
        super()._apply(fn, recurse)
        if again:
            self.pack()
        return self


def plain_pieces(weight: Tensor, of: int = 1) -> Iterator[tuple[slice, Tensor]]:
    """Some output channels after another in float32, all in one place: what is only passed through takes no memory."""
    found = list(pieces(*weight.shape, of=of, at_once=COARSE_AT_ONCE))
    room = torch.empty(found[0].stop, weight.shape[1], dtype=torch.float32, device=weight.device)
    for rows in found:
        yield rows, room[: rows.stop - rows.start].copy_(weight[rows])


def above_zero(scale: Tensor) -> Tensor:
    """Scales that can be divided by: zeros stay zeros."""
    return scale.clamp(min=torch.finfo(torch.bfloat16).tiny)


def pieces(outputs: int, inputs: int, of: int = 1, at_once: int = PLAIN_AT_ONCE) -> Iterator[slice]:
    """Some output channels after another, a multiple of so many each time, few enough to be held in float32."""
    step = max(of, at_once // inputs // of * of)
    return (slice(start, min(start + step, outputs)) for start in range(0, outputs, step))
