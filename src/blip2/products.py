"""Products with int8 and float16 weights, by what the device has; what that is is found by asking it for a small one.

Letters: M rows, L rows of halves, K inputs, N outputs.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from blip2.device import passes

INT8_END = 127
HALVES = 2 * INT8_END  # steps of the second half in one of the first
EVEN = 6.0  # largest value over root mean square of a row without outliers: one int8 half errs by 1.4% of it
UNSIGNED = 128  # added to whole numbers that a kernel takes without a sign
ZERO = -1  # of weights that have one: from -127 to 127 they stay int8


def by_halves(x: Tensor, sums: Callable[[Tensor], Tensor], *, one: bool = False) -> Tensor:
    """Activations times int8 weights, float[M, K] to float32[M, N], in whole numbers.

    A row is split into its value in steps of its largest over 127 and the rest in steps 254 times as fine: 16 bits, so
    that a channel 60 times the others costs them nothing. The sums of whole numbers are exact.

    Args:
        sums: the product of whole numbers from -127 to 127, float[L, K], with the weights: a new float32[L, N].
        one: even rows go without their second half, see `Int8Linear.one_half`.
    """
    count = len(x)
    x = x.float()
    peak = x.abs().amax(1, keepdim=True)  # (M, 1); the norm takes 20 times as long
    fine = (peak / (INT8_END * HALVES)).clamp_(min=torch.finfo(torch.float32).tiny)  # a step of the second half
    if not one:
        steps = x / fine
        both = torch.empty(2, *x.shape, device=x.device)  # in place: few rows take as long as their operations begin
        high, low = both.unbind(0)
        torch.div(steps, HALVES, out=high).round_()
        torch.sub(steps, high, alpha=HALVES, out=low).round_()
        first, second = sums(both.flatten(0, 1)).unflatten(0, (2, count)).unbind(0)
        return first.mul_(HALVES * fine).add_(second.mul_(fine))
    mean = torch.linalg.vector_norm(x, 2, 1, keepdim=True) / x.shape[1] ** 0.5
    uneven = (peak > EVEN * mean)[:, 0].nonzero()[:, 0]
    halves = torch.empty(count + len(uneven), x.shape[1], device=x.device)  # of many rows: fresh memory costs most
    high, low = halves.split([count, len(uneven)])
    torch.div(x, HALVES * fine, out=high).round_()
    low.copy_((x[uneven] / fine[uneven]).sub_(high[uneven], alpha=HALVES)).round_()
    found = sums(halves)
    return found[:count].mul_(HALVES * fine).index_add_(0, uneven, found[count:].mul_(fine[uneven]))


def plain_sums(numbers: Tensor, weight: Tensor) -> Tensor:
    """Whole numbers [L, K] times int8[N, K]: float32[L, N]."""
    count, coarse = len(numbers), numbers.to(torch.int8)
    if coarse.is_cuda:  # its kernel takes more than 16 rows, in eights
        coarse = F.pad(coarse, (0, 0, 0, max(32, -(-count // 8) * 8) - count))
    return torch.ops.aten._int_mm(coarse, weight.T)[:count].float()


class OneDNN:
    """int8[N, K] with scales float32[N], as oneDNN's product reads it: faster than fbgemm's where rows are many."""

    name = "oneDNN"

    def __init__(self, weight: Tensor, scale: Tensor) -> None:
        self._scale, self._zeros = scale, torch.zeros(len(scale), dtype=torch.int64)
        with torch.inference_mode(False), torch.no_grad():
            self._weight = torch.ops.onednn.qlinear_prepack(weight, None)

    def sums(self, numbers: Tensor) -> Tensor:
        """Whole numbers [L, K] times the weights and the scales: float32[L, N]."""
        coarse = (numbers + UNSIGNED).to(torch.uint8)  # what VNNI multiplies; with signed ones it goes number by number
        return torch.ops.onednn.qlinear_pointwise(
            coarse, 1.0, UNSIGNED, self._weight, self._scale, self._zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )

    def plain(self) -> Tensor:
        """int8[N, K]."""
        return self._weight.to_dense().T.contiguous()


class Fbgemm:
    """As `OneDNN`, read by fbgemm: at two rows in 0.7 of its time, at ten in 0.85, at ninety in 1.08."""

    name = "fbgemm"

    def __init__(self, weight: Tensor, scale: Tensor) -> None:
        zeros = torch.full(scale.shape, ZERO)  # weights with a zero of their own are packed by fbgemm, all others not
        with torch.inference_mode(False), torch.no_grad():
            make: Any = torch._make_per_channel_quantized_tensor  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
            moved = make(weight + ZERO, scale.double(), zeros, 0)
            self._packed = torch.ops.quantized.linear_prepack(moved, None)

    def sums(self, numbers: Tensor) -> Tensor:
        """See `OneDNN.sums`."""
        product = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
        return product(numbers, 1.0, UNSIGNED, self._packed)

    def plain(self) -> Tensor:
        """int8[N, K]."""
        return torch.ops.quantized.linear_unpack(self._packed)[0].int_repr() - ZERO


@functools.cache
def multiplies_whole_numbers(device: str) -> bool:
    """Whether `torch._int_mm` is there and exact: without VNNI a CPU's sums overflow on the way."""
    draw = torch.Generator().manual_seed(0)
    left, right = (torch.randint(-127, 128, (32, 512), generator=draw, dtype=torch.int8) for _ in range(2))
    left[0], left[1], right[0], right[1] = 127, -127, 127, -127
    exact = (left.double() @ right.double().T).to(torch.int32)
    return passes(lambda: torch.equal(torch.ops.aten._int_mm(left.to(device), right.to(device).T).cpu(), exact))


@functools.cache
def packings() -> tuple[type[OneDNN | Fbgemm], ...]:
    """What packs int8 weights here, the fastest first: its product is there and exact, it gives the weights back."""
    draw = torch.Generator().manual_seed(0)
    left, right = (torch.randint(-127, 128, (32, 512), generator=draw, dtype=torch.int8) for _ in range(2))
    left[0], left[1], right[0], right[1] = 127, -127, 127, -127
    exact, ones = (left.double() @ right.double().T).float(), torch.ones(32)

    def is_right(kind: type[OneDNN | Fbgemm]) -> bool:
        packed = kind(right, ones)
        return torch.equal(packed.sums(left.float()), exact) and torch.equal(packed.plain(), right)

    if not multiplies_whole_numbers("cpu"):
        return ()
    able: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.11 has none
    kinds = (OneDNN, Fbgemm) if able.get("amx_int8") else (Fbgemm, OneDNN)  # oneDNN knows AMX
    with warnings.catch_warnings():  # once a process torch calls quantised tensors deprecated: oneDNN comes after them
        warnings.simplefilter("ignore", UserWarning)
        return tuple(kind for kind in kinds if passes(functools.partial(is_right, kind)))


def packing() -> type[OneDNN | Fbgemm] | None:
    """The fastest of `packings`."""
    return next(iter(packings()), None)


@functools.cache
def reads_int8() -> bool:
    """Whether `torch._weight_int8pack_mm` is there and right."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randint(-127, 128, (64, 128), generator=draw, dtype=torch.int8)
    x, scale = torch.randn(3, 128, generator=draw).bfloat16(), torch.rand(64, generator=draw).bfloat16()
    exact = x.float() @ (weight * scale.float()[:, None]).T
    return passes(lambda: close(torch.ops.aten._weight_int8pack_mm(x, weight, scale), exact))


def pack_half(weight: Tensor) -> Any:
    """float16[N, K] as fbgemm's product reads it; `unpack_half` gives it back."""
    return torch.ops.quantized.linear_prepack_fp16(weight.float(), None)


def unpack_half(packed: Any) -> Tensor:
    """float16[N, K] of what `pack_half` gave."""
    return torch.ops.quantized.linear_unpack_fp16(packed)[0].half()


def by_half(x: Tensor, packed: Any) -> Tensor:
    """float[M, K] times packed float16[N, K], each widened as it is read, and sums in float32: float32[M, N]."""
    return torch.ops.quantized.linear_dynamic_fp16(x.float(), packed)


@functools.cache
def multiplies_half() -> bool:
    """Whether fbgemm's product with float16 weights is there and right, and gives them back."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(100, 130, generator=draw).half()

    def test() -> bool:
        packed = pack_half(weight)
        right = torch.equal(unpack_half(packed), weight)
        for rows in (1, 5, 40):
            x = torch.randn(rows, 130, generator=draw)
            exact = x.double() @ weight.double().T
            right = right and bool((by_half(x, packed) - exact).abs().max() <= 1e-6 * exact.abs().max())
        return right

    return passes(test)


def close(found: Tensor, exact: Tensor) -> bool:
    """Whether what a kernel that sums in bfloat16 found is right."""
    return bool((found.float() - exact).abs().max() <= 2**-6 * exact.abs().max())
