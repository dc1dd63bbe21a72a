"""Linear layers whose weights take 16, 8 or 4 bits; nothing else in the package knows how they multiply.

Only weights are made coarse. half: 16 bits, multiplied in float32. int8: one scale an output channel. int4: a scale and
a zero for each 64 inputs of an output channel. Activations lose nothing that counts, outliers among them: where the
machine multiplies whole numbers, each row goes in as two int8 halves, 16 bits together, of its own largest value; it
never depends on its neighbours. An image encoder's rows without outliers go in as one, see `Int8Linear.one_half`.

What a device multiplies with is found by asking it: a kernel is used where it gives the right numbers on a small
example, else the weights are made plain piece by piece. The plain way is also the one with a gradient.

Letters: M rows, K inputs, N outputs, G groups of inputs.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip2.device import computes, passes
from blip2.errors import CheckpointError, ConfigError
from blip2.model.language import Language
from blip2.pages import release_unwritten, trim
from blip2.products import (
    INT8_END,
    by_half,
    by_halves,
    close,
    multiplies_half,
    multiplies_whole_numbers,
    pack_half,
    packing,
    plain_sums,
    reads_int8,
    unpack_half,
)

Scheme = Literal["int8", "int4", "half"]
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)

GROUP = 64  # inputs that share a scale in int4: divides the widths of every published model
BLOCKS = (64, 32)  # outputs that int4 packs together: what kernels for AVX-512 and for AVX2 read
PLAIN_AT_ONCE = 2**22  # weights that are made plain at a time: 16 MB in float32
COARSE_AT_ONCE = 2**20  # weights that are made coarse at a time: 4 MB in float32
HEAD_AT_ONCE = 2**25  # words' weights that are packed at a time: 32 MB, held four times meanwhile
MANY = 192  # rows from which plain bfloat16 weights beat the kernel that reads int4
FEW = 8  # rows up to which int8 weights read once beat a product in float32
INT4_LEVELS, INT4_MIDDLE = 15, 8


def check_scheme(name: str | None) -> Scheme | None:
    """A scheme by its name.

    Raises:
        ConfigError: there is none of that name.
    """
    if name is None:
        return None
    for scheme in SCHEMES:
        if name == scheme:
            return scheme
    raise ConfigError(f"quantize {name!r} is none; use {', '.join(SCHEMES)}, or leave it out")


class QuantLinear(nn.Module, ABC):
    """x Wᵀ + b, in the type of x; the gradient to x is that of the plain weights.

    Attributes:
        weight: int8, as the scheme lays it out.
        scale: what makes it plain again.
        bias: float[N] or None.
    """

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
        wanted = torch.is_grad_enabled() and x.requires_grad
        out = self._plainly(rows) if wanted else self.product(rows)  # (M, N)
        if self.bias is not None:
            out = out + self.bias
        return out.to(x.dtype).unflatten(0, x.shape[:-1])

    def _plainly(self, x: Tensor) -> Tensor:
        return torch.cat([F.linear(x, some) for some in self.plain(x.dtype)], dim=1)

    # -- packed for a CPU's products -----------------------------------------------------------------------------------

    def pack(self) -> None:
        """Lay the weights out as a CPU's product reads them, where it has such; whoever asks gets them as they were."""
        if self._packed is None and self.weight.device.type == "cpu":
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
        for rows in _pieces(*weight.shape):
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
        for rows in _pieces(*weight.shape):
            yield weight[rows].to(dtype)

    def product(self, x: Tensor) -> Tensor:
        """See `QuantLinear`."""
        return self._plainly(x.float()) if self._packed is None else by_half(x, self._packed)

    def _lay_out(self, weight: Tensor) -> Any:
        return pack_half(weight) if multiplies_half() else None

    def _read_back(self, packed: Any) -> Tensor:
        return unpack_half(packed)


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
    outputs, inputs = weight.shape
    block = (reads_int4() if device.type == "cpu" else None) or BLOCKS[0]
    if scheme == "int4" and not (inputs % GROUP or outputs % block):
        return Int4Linear(*_to_int4(weight, block), bias, device)
    return Int8Linear(*_to_int8(weight), bias, device)


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
    pieces: list[Int8Linear] = []
    for rows in _pieces(*weight.shape, at_once=HEAD_AT_ONCE if device.type == "cpu" else weight.numel()):
        some = weight[rows]
        pieces.append(Int8Linear(*_to_int8(some), None, device))
        pieces[-1].pack()
        release_unwritten(some)  # of words only what is embedded is read again
        trim()
    return pieces[0] if len(pieces) == 1 else functools.partial(_beside, pieces)


def _beside(pieces: Sequence[Int8Linear], hidden: Tensor) -> Tensor:
    return torch.cat([piece(hidden) for piece in pieces], dim=-1)


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


# -- making weights coarse ---------------------------------------------------------------------------------------------


def _to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    coarse = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
    for rows, some in _plain_pieces(weight):
        peak = torch.maximum(-some.amin(1), some.amax(1))  # `aminmax` is several times slower, `abs` takes memory
        scales[rows] = _above_zero(peak / INT8_END)
        coarse[rows] = some.div_(scales[rows, None]).round_()
    return coarse, scales


def _to_int4(weight: Tensor, block: int) -> tuple[Tensor, Tensor]:
    outputs, inputs = weight.shape
    packed = torch.empty(outputs // block, inputs, block // 2, dtype=torch.int8, device=weight.device)
    scales = torch.empty(inputs // GROUP, outputs, 2, dtype=torch.bfloat16, device=weight.device)
    for rows, some in _plain_pieces(weight, of=block):
        groups = some.unflatten(1, (-1, GROUP))  # (n, G, 64)
        low, high = groups.amin(2), groups.amax(2)
        scale = _above_zero((high - low) / INT4_LEVELS).bfloat16()
        zero = (low + INT4_MIDDLE * scale.float()).bfloat16()
        groups.sub_(zero[..., None]).div_(scale[..., None]).add_(INT4_MIDDLE).round_().clamp_(0, INT4_LEVELS)
        levels = some.to(torch.uint8).view(-1, 2, block // 2, inputs)
        both = levels[:, 0].bitwise_or_(levels[:, 1] << 4).transpose(1, 2)  # (n/B, K, B/2)
        packed[rows.start // block : rows.stop // block] = both.view(torch.int8)
        scales[:, rows] = torch.stack([scale, zero], dim=-1).transpose(0, 1)
    return packed, scales


def _plain_pieces(weight: Tensor, of: int = 1) -> Iterator[tuple[slice, Tensor]]:
    """Some output channels after another in float32, all in one place: what is only passed through takes no memory."""
    pieces = list(_pieces(*weight.shape, of=of, at_once=COARSE_AT_ONCE))
    room = torch.empty(pieces[0].stop, weight.shape[1], dtype=torch.float32, device=weight.device)
    for rows in pieces:
        yield rows, room[: rows.stop - rows.start].copy_(weight[rows])


def _above_zero(scale: Tensor) -> Tensor:
    return scale.clamp(min=torch.finfo(torch.bfloat16).tiny)  # zeros stay zeros


def _pieces(outputs: int, inputs: int, of: int = 1, at_once: int = PLAIN_AT_ONCE) -> Iterator[slice]:
    """Some output channels after another, a multiple of so many each time, few enough to be held in float32."""
    step = max(of, at_once // inputs // of * of)
    return (slice(start, min(start + step, outputs)) for start in range(0, outputs, step))


# -- what a device multiplies with -------------------------------------------------------------------------------------


def by_int4(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Activations times int4 weights, as `Int4Linear` holds them, by torch's kernel: float[M, K] to float32[M, N]."""
    blocks, inputs, half = weight.shape
    packed = weight.view(torch.uint8).view(2 * half * blocks, inputs // 2)
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x.bfloat16(), packed, GROUP, scale).float()


def plain_int4(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """int4 weights, as `Int4Linear` holds them, made plain, some output channels after another: float[n, K]."""
    blocks, inputs, half = weight.shape
    for rows in _pieces(2 * half * blocks, inputs, of=2 * half):
        packed = weight[rows.start // (2 * half) : rows.stop // (2 * half)].view(torch.uint8)
        packed = packed.transpose(0, 1)  # (K, n/B, B/2)
        levels = torch.empty(*packed.shape[:2], 2, half, dtype=dtype, device=packed.device)
        levels[:, :, 0], levels[:, :, 1] = packed & 15, packed >> 4
        width, zero = scale[:, None, rows].to(dtype).unbind(-1)  # (G, 1, n)
        plain = levels.view(-1, GROUP, width.shape[-1]).mul_(width).add_(zero - INT4_MIDDLE * width)
        yield plain.view(inputs, -1).T


@functools.cache
def reads_int4() -> int | None:
    """How many outputs go into a block of what `torch.ops.aten._weight_int4pack_mm_for_cpu` reads; None without it."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(128, 2 * GROUP, generator=draw)
    x = torch.randn(3, 2 * GROUP, generator=draw).bfloat16()
    for block in BLOCKS:
        packed = _to_int4(weight, block)
        exact = torch.cat([F.linear(x.float(), some) for some in plain_int4(*packed, torch.float32)], dim=1)
        if passes(lambda packed=packed, exact=exact: close(by_int4(x, *packed), exact)):
            return block
    return None
