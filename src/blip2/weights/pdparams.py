"""Paddle's `.pdparams`: a pickle of numpy arrays by name, read without running anything that it names.

The file is untrusted: its few classes are replaced by ones of ours that only take notes, and any other is refused.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor

from blip2.errors import CheckpointError
from blip2.files import replacing

NAMES = "StructuredToParameterName@@"  # an entry of Paddle's own, no tensor
_TYPES = {
    "f4": torch.float32,
    "f2": torch.float16,
    "f8": torch.float64,
    "u2": torch.bfloat16,  # which numpy does not have
    "i8": torch.int64,
    "i4": torch.int32,
    "i1": torch.int8,
    "u1": torch.uint8,
    "b1": torch.bool,
}


def read(path: Path) -> dict[str, Tensor]:
    """Tensors by name.

    Raises:
        CheckpointError: the file is missing, damaged, or holds anything but arrays.
    """
    try:
        with path.open("rb") as file:
            found = _Reader(file).load()
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing; the checkpoint is not whole") from None
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except Exception as error:  # a damaged pickle makes its reader stumble over anything
        raise CheckpointError(f"{path}: damaged or no Paddle file: {error}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: holds a {type(found).__name__}, no arrays by name")
    state: dict[str, Tensor] = {}
    arrays = cast("dict[Any, Any]", found)
    for name in list(arrays):
        value = arrays.pop(name)  # not held twice
        if name == NAMES:
            continue
        array = value[1] if isinstance(value, tuple) and len(cast("tuple[Any, ...]", value)) == 2 else value
        if not isinstance(name, str) or not isinstance(array, _Array):
            raise CheckpointError(f"{path}: {str(name)[:80] if isinstance(name, str) else 'a name'} is no array")
        try:
            state[name] = array.tensor()
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {name}: {error}") from None
    return state


def write(state: Mapping[str, Tensor], path: Path) -> None:
    """Tensors as Paddle saves them: `read` and `paddle.load` give them back."""
    arrays: dict[str, Any] = {name: _array(tensor) for name, tensor in state.items()}
    with replacing(path) as partial, partial.open("wb") as file:
        pickle.dump(arrays, file, protocol=4)


def _array(tensor: Tensor) -> np.ndarray[Any, Any]:
    tensor = tensor.detach().cpu().contiguous()
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


class _Type:
    """In the place of numpy's dtype."""

    __slots__ = ("code", "order")

    def __init__(self, code: Any, *_: Any) -> None:
        if code not in _TYPES:
            raise CheckpointError(f"an array of type {str(code)[:20]!r}")
        self.code: str = code
        self.order = "="

    def take(self, state: Any) -> None:
        """What the file says of it."""
        self.order = state[1]


class _Array:
    """In the place of numpy's array: notes of what the file says, checked when the tensor is made."""

    __slots__ = ("state",)

    def __init__(self, *_: Any) -> None:
        self.state: Any = ()

    def take(self, state: Any) -> None:
        """What the file says of it."""
        self.state = state

    def tensor(self) -> Tensor:
        """The array.

        Raises:
            CheckpointError: shape, type and bytes do not go together.
        """
        match self.state:
            case (int(), tuple(shape), _Type() as kind, bool(columns), bytes(data)):
                pass
            case _:
                raise CheckpointError("an array that is not whole")
        sizes = [size for size in cast("tuple[Any, ...]", shape) if isinstance(size, int) and size >= 0]
        dtype = _TYPES[kind.code]
        if kind.order == ">" or len(sizes) != len(cast("tuple[Any, ...]", shape)):
            raise CheckpointError("an array of another byte order, or of no shape")
        if math.prod(sizes) * dtype.itemsize != len(data):
            raise CheckpointError(f"an array of shape {sizes} in {len(data)} bytes")
        flat = torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return flat.reshape(sizes[::-1]).permute(*reversed(range(len(sizes)))) if columns else flat.reshape(sizes)


def _reconstruct(*_: Any) -> _Array:
    return _Array()


def _bytes(text: str, encoding: str) -> bytes:
    """How pickles before protocol 3 write bytes."""
    if encoding != "latin1":
        raise CheckpointError("bytes in an encoding that no array is written in")
    return text.encode("latin1")


def _no_bytes(*content: Any) -> bytes:
    """How they write none of them."""
    if content:
        raise CheckpointError("bytes of a length that an array does not have")
    return b""


_KNOWN: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Type,
    ("_codecs", "encode"): _bytes,
    ("__builtin__", "bytes"): _no_bytes,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _reconstruct for core in ("core", "_core")},
}


class _Reader(pickle._Unpickler):  # pyright: ignore[reportPrivateUsage]
    """The reader in Python: its memo grows with the file; the one in C takes memory for whatever index a file names."""

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)  # pyright: ignore[reportPrivateUsage]

    def __init__(self, file: BufferedReader) -> None:
        super().__init__(file, encoding="latin1")

    def find_class(self, module: str, name: str) -> Any:
        """One of ours in the place of numpy's."""
        if (module, name) not in _KNOWN:
            raise CheckpointError(f"names {module[:40]}.{name[:40]}, which no array needs; nothing of it was run")
        return _KNOWN[module, name]

    def load_build(self) -> None:
        """Give an object its state: arrays and types only, so that nothing else can be changed."""
        stack: list[Any] = self.stack  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
        state = stack.pop()
        if not isinstance(stack[-1], _Array | _Type):
            raise CheckpointError("gives a state to what has none")
        stack[-1].take(state)

    dispatch[pickle.BUILD[0]] = load_build
