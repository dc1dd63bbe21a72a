"""The tensors of a checkpoint on disk, each read when it is asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from blip2.errors import CheckpointError


class Tensors(Protocol):
    """Names, shapes and tensors."""

    def names(self) -> set[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def get(self, name: str) -> Tensor: ...


@dataclass(frozen=True)
class Safetensors:
    """One file or several; nothing is read but what is asked for.

    Attributes:
        files: the file that holds each tensor.
    """

    files: Mapping[str, Any]

    @classmethod
    def open(cls, paths: list[Path]) -> Safetensors:
        """The tensors of some files.

        Raises:
            CheckpointError: a file is missing or damaged, or two hold a tensor of one name.
        """
        files: dict[str, Any] = {}
        for path in paths:
            try:
                opened: Any = safe_open(path, framework="pt")
            except FileNotFoundError:
                raise CheckpointError(f"{path}: missing; the checkpoint is not whole") from None
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path}: damaged or no safetensors file: {error}") from None
            for name in opened.keys():  # noqa: SIM118 (it is no mapping)
                if name in files:
                    raise CheckpointError(f"{path}: {name} is in another file of the checkpoint too")
                files[name] = opened
        return cls(files)

    def names(self) -> set[str]:
        """All names."""
        return set(self.files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one tensor."""
        return tuple(self.files[name].get_slice(name).get_shape())

    def get(self, name: str) -> Tensor:
        """One tensor, mapped from its file."""
        return self.files[name].get_tensor(name)


@dataclass(frozen=True)
class Pickled:
    """Files that torch saved, read with `weights_only` and mapped into memory."""

    state: Mapping[str, Tensor]

    @classmethod
    def open(cls, paths: list[Path]) -> Pickled:
        """The tensors of some files.

        Raises:
            CheckpointError: a file is missing, damaged, holds anything but tensors, or a name twice.
        """
        state: dict[str, Tensor] = {}
        for path in paths:
            some = cls.of(read_pickle(path), path).state
            if twice := state.keys() & some.keys():
                raise CheckpointError(f"{path}: {min(twice)} is in another file of the checkpoint too")
            state |= some
        return cls(state)

    @classmethod
    def of(cls, found: Any, path: Path) -> Pickled:
        """What a file held under names.

        Raises:
            CheckpointError: it is not all tensors.
        """
        if not isinstance(found, Mapping):
            raise CheckpointError(f"{path}: holds a {type(found).__name__}, no tensors by name")
        state = cast("Mapping[str, Any]", found)
        for name, tensor in state.items():
            if not isinstance(tensor, Tensor):
                raise CheckpointError(f"{path}: {name} is no tensor but a {type(tensor).__name__}")
        return cls(state)

    def names(self) -> set[str]:
        """All names."""
        return set(self.state)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one tensor."""
        return tuple(self.state[name].shape)

    def get(self, name: str) -> Tensor:
        """One tensor."""
        return self.state[name]


def read_pickle(path: Path) -> Mapping[str, Any]:
    """What torch saved under names; no code of the file is run.

    Raises:
        CheckpointError: the file is missing, damaged, holds code, or no names.
    """
    try:
        try:
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # files of torch before 1.6 cannot be mapped
            found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing; the checkpoint is not whole") from None
    except Exception as error:  # torch.load raises what its readers do
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: cannot be read as weights alone: {reason}") from None
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{path}: holds a {type(found).__name__}, no tensors by name")
    return cast("Mapping[str, Any]", found)


def open_directory(directory: Path) -> Tensors:
    """The tensors of a directory as transformers writes it: safetensors before pickles, in one file or by an index.

    Raises:
        CheckpointError: there are none, or a file is missing or damaged.
    """
    for name, kind in (("model.safetensors", Safetensors), ("pytorch_model.bin", Pickled)):
        index = directory / f"{name}.index.json"
        if index.is_file():
            return kind.open([directory / file for file in _shards(index)])
        if (directory / name).is_file():
            return kind.open([directory / name])
    raise CheckpointError(f"{directory}: holds neither model.safetensors nor pytorch_model.bin, whole or by an index")


def _shards(index: Path) -> list[str]:
    try:
        names = {str(file) for file in json.loads(index.read_text())["weight_map"].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: cannot be read as an index of shards: {error}") from None
    if outside := [name for name in names if Path(name).name != name]:
        raise CheckpointError(f"{index}: {outside[0]} is not a file beside the index")
    return sorted(names)
