"""One process or many: who we are, and how rows of all ranks come together."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from blip2.device import pick_device
from blip2.errors import ConfigError


@dataclass(frozen=True)
class World:
    """This process among its peers; alone by default, and then nothing distributed is ever called."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    def gather(self, rows: Tensor, *, gradient: bool = False) -> Tensor:
        """Rows of all ranks in order of rank: [B, ...] to [B * size, ...].

        Args:
            rows: the same shape on every rank.
            gradient: whether the loss of every rank flows back to the rank that a row came from; without, rows of
                all ranks, the own ones too, are constants. A process alone has its rows as they are.
        """
        if self.size == 1:
            return rows
        if gradient:
            return _Gather.apply(rows, self)
        parts = [torch.empty_like(rows) for _ in range(self.size)]
        dist.all_gather(parts, rows.detach().contiguous())
        return torch.cat(parts)

    def own(self, rows: Tensor, count: int) -> Tensor:
        """The `count` rows of this rank, out of the rows of all ranks."""
        return rows[self.rank * count : (self.rank + 1) * count]

    def mean(self, values: Tensor) -> Tensor:
        """The mean over ranks, element by element and without gradient; the same tensor for a process alone."""
        if self.size == 1:
            return values.detach()
        total = values.detach().clone()
        dist.all_reduce(total)
        return total / self.size

    def wait(self) -> None:
        """Until every rank is here."""
        if self.size > 1:
            dist.barrier()

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module whose backward averages gradients over ranks; itself for a process alone.

        Parameters that a step does not use (heads of a loss of weight 0) keep no gradient, as on one process.
        """
        if self.size == 1:
            return module
        return DistributedDataParallel(module, find_unused_parameters=True)


class _Gather(torch.autograd.Function):
    """All-gather whose backward sums what every rank's loss asks of a row."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, rows: Tensor, world: World) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.world, ctx.count = world, len(rows)  # pyright: ignore[reportAttributeAccessIssue]
        parts = [torch.empty_like(rows) for _ in range(world.size)]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        gradient = gradient.clone(memory_format=torch.contiguous_format)  # autograd may still need its own
        dist.all_reduce(gradient)
        return ctx.world.own(gradient, ctx.count), None  # pyright: ignore[reportAttributeAccessIssue]


def first_rank() -> bool:
    """Whether this process is the one of its peers that talks to people; also before they have found each other."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"


def join_world(device: str = "auto") -> World:
    """The world that `torchrun` describes in the environment, or a process alone.

    Starts the process group if there are several: nccl for what is on CUDA, gloo for what is not.

    Args:
        device: as for `rank_device`. It becomes the current one first, since nccl runs a barrier there.
    Raises:
        ConfigError: no such device.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    chosen = rank_device(device, local_rank, size)
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo")
    return World(dist.get_rank(), size, local_rank)


@contextmanager
def world(device: str = "auto") -> Generator[World, None, None]:
    """`join_world`, and leave it at the end."""
    joined = dist.is_initialized()
    try:
        yield join_world(device)
    finally:
        if dist.is_initialized() and not joined:
            dist.destroy_process_group()


def rank_device(name: str, local_rank: int = 0, size: int = 1) -> torch.device:
    """The device of a rank: `auto` and `cuda` give each rank of a machine its own, and it becomes the current one.

    Raises:
        ConfigError: no such device, or one for several ranks.
    """
    device = pick_device(name)
    if device.type != "cuda":
        return device
    if size > 1 and ":" in name:
        raise ConfigError(f"device: {name!r} is one device and there are {size} ranks; write cuda, or auto")
    device = torch.device("cuda", device.index if ":" in name else local_rank)
    torch.cuda.set_device(device)
    return device
