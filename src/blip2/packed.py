"""Linear layers of frozen parts whose weights lie as the CPU's products read them.

torch hands a layer's weights to the product as they are stored; laid out once as the product reads them (oneDNN), it
takes two thirds of the time in float32, a third of it at a handful of rows. The values stay the same bits, and whoever
asks for the weights, be it for a gradient, another type or another device, finds them as they were.

Letters: N outputs, K inputs.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip2.device import computes, passes
from blip2.model.language import Language
from blip2.pages import trim
from blip2.quantize.linear import QuantLinear

LEAST = 2**16  # weights from which a layout pays: below it the call itself costs as much as the product
USES = {torch.float32: 0, torch.bfloat16: 20}  # at five rows packing gains a third of its own time, and a twentieth
LAID_FOR = 40  # rows: a layout for so many is as fast for one, and for 257, as those made for them
BETWEEN_TRIMS = 16  # layers that are packed before what that freed goes back to the system


class PackedLinear(nn.Linear):
    """A linear layer that holds its weights packed until somebody asks for them; then it is a plain one again.

    Whatever reads or changes parameters (`weight`, `parameters()`, `to()`, training) asks; `state_dict()` gets copies.

    Args:
        linear: whose weights are taken over: it is not to be used any more.
        uses: products with the plain weights before they are packed, so that packing has paid when it is done; with
            none they are packed for the first: a part that is loaded and never used costs nothing.
    """

    def __init__(self, linear: nn.Linear, uses: int = 0) -> None:
        nn.Module.__init__(self)
        self._packed: Tensor | None = None
        self._uses: int | None = None  # left until the weights are packed; None where they stay as they are
        self._trained = linear.weight.requires_grad
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.training = linear.training
        self.weight = linear.weight
        self.register_parameter("bias", linear.bias)
        self._uses = uses

    def pack(self) -> None:
        """Lay the weights out for products, where this machine has such."""
        held = self._held
        weight = held.get("weight")
        if weight is None or not packs(weight):
            return
        self._trained = weight.requires_grad
        self._packed = _packed(weight.detach())
        held.pop("weight", None)  # another thread may have done the same meanwhile

    def unpack(self) -> None:
        """The plain weights again, bit for bit; they stay until `pack`."""
        packed, self._uses = self._packed, None
        if packed is not None:
            plain = nn.Parameter(packed.to_dense(), requires_grad=self._trained)
            held = {"weight": plain, "bias": self._held["bias"]}  # in the order that optimizers count by
            self.__dict__["_parameters"] = held
            self._packed = None

    def forward(self, input: Tensor) -> Tensor:
        if torch.is_grad_enabled() and (self._trained or input.requires_grad):
            return F.linear(input, self.weight, self.bias)
        weight, bias = self._held.get("weight"), self._held["bias"]  # weight before `_packed`: one of them is there
        if weight is not None and self._uses is not None:
            self._uses -= 1
            if self._uses < 0:
                self.pack()
        packed = self._packed
        if packed is not None and input.dtype is packed.dtype:
            return _product(input, packed, bias)
        return F.linear(input, self.weight if weight is None else weight, bias)

    @property
    def is_packed(self) -> bool:
        """Whether the weights lie packed now."""
        return self._packed is not None

    @property
    def learns(self) -> bool:
        """Whether weights or bias take a gradient."""
        return any(p.requires_grad for p in self._held.values() if p is not None) or (self.is_packed and self._trained)

    # -- whoever asks for the weights ------------------------------------------------------------------------------

    @property
    def _held(self) -> dict[str, nn.Parameter | None]:
        """The parameters that lie here as they are."""
        return self.__dict__["_parameters"]

    @property
    def _parameters(self) -> dict[str, nn.Parameter | None]:  # pyright: ignore[reportIncompatibleVariableOverride]
        self.unpack()
        return self._held

    @_parameters.setter
    def _parameters(  # pyright: ignore[reportIncompatibleVariableOverride]
        self, value: dict[str, nn.Parameter | None]
    ) -> None:
        self.__dict__["_parameters"] = value

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            self.unpack()
        return super().__getattr__(name)

    def __getstate__(self) -> dict[str, Any]:  # copying and pickling
        self.unpack()
        return self.__dict__

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if keep_vars or self._packed is None:
            uses = self._uses
            super()._save_to_state_dict(destination, prefix, keep_vars)
            self._uses = None if keep_vars else uses  # who only reads does not keep them plain
            return
        destination[prefix + "weight"] = self._packed.to_dense()
        if (bias := self._held["bias"]) is not None:
            destination[prefix + "bias"] = bias.detach()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        again, uses = self._packed is not None, self._uses
        super()._apply(fn, recurse)
        self._uses = uses
        if again:
            self.pack()
        return self


class Head:
    """A product with words of a language model, float[..., K] to float[..., N]: of a copy, embeddings are read plain.

    Args:
        weight: float[N, K].
    """

    def __init__(self, weight: Tensor) -> None:
        self._packed = _packed(weight)

    def __call__(self, hidden: Tensor) -> Tensor:
        return _product(hidden, self._packed, None)

    def __reduce__(self) -> tuple[type[Head], tuple[Tensor]]:
        return Head, (self._packed.to_dense(),)


def pack_layers(*modules: object) -> None:
    """Let linear layers and language models' heads be packed at their first product, where that is faster.

    Coarse ones are packed at once, and so are those that were packed before.

    Args:
        modules: what is no torch module is left as it is.
    """
    for module in modules:
        if not isinstance(module, nn.Module):
            continue
        coarse = [child for child in module.modules() if isinstance(child, QuantLinear)]
        with ThreadPoolExecutor(torch.get_num_threads()) as threads:  # each of these layouts is made by one
            for start in range(0, len(coarse), BETWEEN_TRIMS):
                list(threads.map(QuantLinear.pack, coarse[start : start + BETWEEN_TRIMS]))
                trim()  # what the main thread laid out, other threads do not take again
        owners = Counter(id(weight) for child in module.modules() for weight in _plain_weights(child))
        for name in [name for name, _ in module.named_modules()]:  # names: a layer in a list would keep its weights
            child = module.get_submodule(name)
            if isinstance(child, PackedLinear):
                child.pack()
            elif type(child) is nn.Linear and name and owners[id(child.weight)] == 1 and packs(child.weight):
                module.set_submodule(name, PackedLinear(child, USES[child.weight.dtype]))
            elif isinstance(child, Language) and child.make_head is None and child.head is None:
                child.make_head = head


def unpack_layers(*modules: object) -> bool:
    """Make packed layers plain, one after another; whether there were any."""
    packed = [
        child
        for module in modules
        if isinstance(module, nn.Module)
        for child in module.modules()
        if isinstance(child, PackedLinear) and child.is_packed
    ]
    for layer in packed:
        layer.unpack()
    return bool(packed)


@contextmanager
def plain_weights(*modules: object) -> Generator[None]:
    """Weights as they are stored, for writing them; packed again at the end where they were before."""
    packed = unpack_layers(*modules)
    try:
        yield
    finally:
        if packed:
            pack_layers(*modules)


def learns(module: nn.Module) -> bool:
    """Whether any parameter takes a gradient; packed layers are not asked for theirs, and stay packed."""
    return any(
        child.learns if isinstance(child, PackedLinear) else any(p.requires_grad for p in child.parameters(False))
        for child in module.modules()
    )


def head(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """The product with words of a language model, float[N, K]; see `model.language.Language.make_head`."""
    return Head(weight) if packs(weight) else functools.partial(F.linear, weight=weight)


def packs(weight: Tensor) -> bool:
    """Whether a product of packed weights is there, right and faster for weights like these."""
    able = weight.dtype is torch.float32 or (weight.dtype is torch.bfloat16 and computes(torch.bfloat16, weight.device))
    return weight.device.type == "cpu" and weight.numel() >= LEAST and able and reads_packed(weight.dtype)


@functools.cache
def reads_packed(dtype: torch.dtype) -> bool:
    """Whether torch's packed product is there and right, and gives the weights back as they were."""

    def test() -> bool:
        draw = torch.Generator().manual_seed(0)
        weight, bias = torch.randn(96, 160, generator=draw).to(dtype), torch.randn(96, generator=draw).to(dtype)
        packed = _packed(weight)
        if not torch.equal(packed.to_dense(), weight):
            return False
        for rows in (1, 5, 40):
            x = torch.randn(rows, 160, generator=draw).to(dtype)
            exact = F.linear(x.double(), weight.double(), bias.double())
            error = (_product(x, packed, bias) - exact).abs().max() / exact.abs().max()
            if not error <= 8 * torch.finfo(dtype).eps:  # sums run in another order
                return False
        return True

    return passes(test)


def _packed(weight: Tensor) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), LAID_FOR)


def _product(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def _plain_weights(module: nn.Module) -> Iterator[nn.Parameter]:
    """Weights that a module holds itself; of what is packed nothing is asked."""
    if not isinstance(module, PackedLinear):
        yield from module.parameters(recurse=False)
