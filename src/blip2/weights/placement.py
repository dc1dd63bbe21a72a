"""Where the blocks of a model lie: on devices that compute them, or in memory and on disk until they are run.

A block is a layer of the frozen image encoder or of the frozen language model. Everything else (embeddings, norms,
head, the bridge) lies on the device that the model computes on. What comes out of a block comes back to that device;
keys and values stay with their block.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from blip2.device import free_memory, pick_device
from blip2.errors import ConfigError
from blip2.quantize import Scheme, coarse_size, in_blocks

DISK = "disk"
Place = torch.device | Literal["disk"]
DeviceMap = Literal["auto"] | Mapping[str, str | int]
FROZEN = ("vision", "language")  # the parts that have blocks
SPARE = 0.1  # of free memory, left for activations and caches
METHODS = {"forward": True, "keys_values": False}  # what is called of a block, and whether it comes back: keys stay


@dataclass(frozen=True)
class Memory:
    """How a model's frozen parts are to be kept; see `blip2.load`."""

    quantize: Scheme | None = None
    device_map: DeviceMap | None = None


WHOLE = Memory()  # as they are, on one device


@dataclass(frozen=True)
class Home:
    """Where a model lies and how.

    Attributes:
        device: that it computes on.
        quantize: of the linear layers in blocks.
        places: of blocks that lie elsewhere, by their names: `vision.blocks.3`, `language.decoder.0`.
    """

    device: torch.device
    quantize: Scheme | None = None
    places: Mapping[str, Place] = field(default_factory=dict[str, Place])

    def place(self, name: str) -> Place:
        """Of a tensor, by its name."""
        return self.places.get(block_of(name) or "", self.device)

    def connect(self, parts: Mapping[str, nn.Module]) -> None:
        """Make blocks that lie elsewhere run from where they are; to be called when they are filled."""
        for name, place in self.places.items():
            key, _, path = name.partition(".")
            block: Any = parts[key].get_submodule(path)
            held = place == DISK or torch.device(place).type == "cpu"
            if held and self.device.type == "cpu":
                continue  # it computes where it lies, the system brings what is on disk
            for method, back in METHODS.items():
                if not hasattr(block, method):
                    continue
                run = getattr(block, method)
                if held:
                    there = _brought(block, run, self.device)
                else:
                    there = _sent(run, torch.device(place), self.device if back else None)
                setattr(block, method, there)


def check_map(given: Any) -> DeviceMap | None:
    """A device map as it was given.

    Raises:
        ConfigError: it is neither `auto` nor places by name.
    """
    if given is None or given == "auto":
        return given
    if isinstance(given, Mapping):
        for name, place in cast("Mapping[Any, Any]", given).items():
            if not isinstance(name, str) or not isinstance(place, str | int) or isinstance(place, bool):
                raise ConfigError(
                    f"device_map: {name!r}: {place!r} is no place; name a block, and a device (cpu, cuda:0, 1) or disk"
                )
        return given
    raise ConfigError(f"device_map {given!r} is none; use auto, or places by name; for one device use `device`")


def plan(modules: Mapping[str, nn.Module], device: torch.device, memory: Memory) -> Home:
    """Find a place for every block.

    Args:
        modules: from `skeleton()`, by what stands before the dot in our names, in the types that they will have.
        device: that the model computes on.
        memory: what was asked for.
    Raises:
        ConfigError: the map names a place or a part that is not there.
    """
    quantize, device_map = memory.quantize, memory.device_map
    if device_map is None:
        return Home(device, quantize)
    if device.type == "mps":
        raise ConfigError("device_map: not on mps, whose memory is the CPU's; leave it out")
    device = torch.empty(0, device=device).device  # with its number
    blocks, rest = _sizes(modules, quantize)
    places = _by_room(blocks, rest, device) if device_map == "auto" else _named(blocks, device, device_map)
    return Home(device, quantize, {name: place for name, place in places.items() if place != device})


def block_of(name: str) -> str | None:
    """The block that a tensor is in: `language.layers.3` of `language.layers.3.qkv.weight`."""
    steps = name.split(".")
    number = next((place for place, step in enumerate(steps) if step.isdigit()), None)
    return ".".join(steps[: number + 1]) if number is not None and steps[0] in FROZEN else None


def _sizes(modules: Mapping[str, nn.Module], quantize: Scheme | None) -> tuple[dict[str, int], int]:
    """Bytes of each block in the order in which they run, and of everything else."""
    blocks: dict[str, int] = {}
    rest = 0
    for key in sorted(modules, key=(*FROZEN, *sorted(modules)).index):
        linear = {f"{name}.weight" for name, module in modules[key].named_modules() if type(module) is nn.Linear}
        for name, tensor in modules[key].state_dict().items():
            coarse = quantize is not None and key in FROZEN and name in linear and in_blocks(name)
            size = coarse_size(tensor.shape, quantize) if coarse and quantize else tensor.nbytes
            if block := block_of(f"{key}.{name}"):
                blocks[block] = blocks.get(block, 0) + size
            else:
                rest += size
    return blocks, rest


def _by_room(blocks: Mapping[str, int], rest: int, device: torch.device) -> dict[str, Place]:
    """One device after another is filled, the one that computes first; what fits into no memory is on disk."""
    devices = [device]
    if device.type == "cuda":
        others = (torch.device("cuda", number) for number in range(torch.cuda.device_count()))
        devices += [*(other for other in others if other != device), torch.device("cpu")]
    room = [int(free_memory(each) * (1 - SPARE)) for each in devices]
    room[0] -= rest + max([0, *blocks.values()])  # a block that lies elsewhere comes here to run
    at = 0
    places: dict[str, Place] = {}
    for name, size in blocks.items():
        while at < len(devices) and room[at] < size:
            at += 1
        places[name] = DISK if at == len(devices) else devices[at]
        if at < len(devices):
            room[at] -= size
    return places


def _named(blocks: Mapping[str, int], device: torch.device, device_map: Mapping[str, str | int]) -> dict[str, Place]:
    """Each block by the longest name in the map that it begins with."""
    given: dict[str, Place] = {}
    for name, value in device_map.items():
        given[name] = DISK if value == DISK else pick_device(f"cuda:{value}" if isinstance(value, int) else value)
    used: set[str] = set()
    places: dict[str, Place] = {}
    for block in blocks:
        steps = block.split(".")
        begins = (".".join(steps[:count]) for count in range(len(steps), -1, -1))
        name = next((begin for begin in begins if begin in given), None)
        places[block] = device if name is None else given[name]
        used |= {name} if name is not None else set()
    if unused := given.keys() - used:
        known = ", ".join(list(blocks)[:1] + list(blocks)[-1:])
        raise ConfigError(
            f"device_map: {min(unused)!r} is no block of this model, nor the beginning of one's name ({known}); "
            "everything else lies on `device`"
        )
    return places


def _sent(run: Callable[..., Any], there: torch.device, home: torch.device | None) -> Callable[..., Any]:
    """A method that runs on another device; what it gives comes home, or stays there."""

    @functools.wraps(run)
    def call(*values: Any) -> Any:
        found = run(*_moved(values, there))
        return found if home is None else _moved(found, home)

    return call


def _brought(block: nn.Module, run: Callable[..., Any], home: torch.device) -> Callable[..., Any]:
    """A method whose block is brought for it, one caller at a time, and goes when it has run."""
    turn = threading.RLock()

    @functools.wraps(run)
    def call(*values: Any) -> Any:
        with turn:
            kept = block.state_dict(keep_vars=True)
            try:
                for name, tensor in kept.items():
                    put(block, name, tensor.detach().to(home))
                return run(*values)
            finally:
                for name, tensor in kept.items():
                    put(block, name, tensor.detach())

    return call


def _moved(values: Any, device: torch.device) -> Any:
    if isinstance(values, Tensor):
        return values.to(device)
    return tuple(_moved(value, device) for value in values) if isinstance(values, tuple) else values


def put(module: nn.Module, name: str, tensor: Tensor) -> None:
    """A parameter or buffer of a module's module, by its dotted name."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    old = getattr(owner, leaf)
    if isinstance(old, nn.Parameter):
        owner.register_parameter(leaf, nn.Parameter(tensor, requires_grad=old.requires_grad))
    else:
        owner.register_buffer(leaf, tensor)
