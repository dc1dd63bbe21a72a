"""What a run needs to go on, and how it gets to the disk and back: whole or not at all.

Every random draw is a function of seed, step and rank, so no state of a random generator is here.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from blip2.errors import CheckpointError
from blip2.files import sync_directory
from blip2.weights.load import check_names

KEEP = 2  # the last one, and the one before in case the disk loses a block of it
BEST = "best.pt"
_PARTIAL = ".partial"


class Average:
    """The weights that are validated and saved, where these are not simply the last ones.

    Args:
        decay: of a running average, which often serves better on small data: the weight of the past, smaller over the
            first steps, so that the start is soon forgotten. None for the last weights.
        shares: by name, how much of the weights as they are now, before the first step, comes back in.
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        decay: float | None,
        shares: Mapping[str, float],
    ) -> None:
        self.parameters = parameters
        self.decay = decay
        self.shares = shares
        self.weights = {name: parameter.detach().clone() for name, parameter in parameters.items()} if decay else {}
        self.start = {name: parameters[name].detach().clone() for name in shares}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after the update that ended in `step`."""
        for name, weight in self.weights.items():
            weight.lerp_(self.parameters[name], 1 - min(self.decay or 0.0, (1 + step) / (10 + step)))

    @contextmanager
    def applied(self) -> Generator[None, None, None]:
        """The model has the average's weights inside, and its own again afterwards."""
        own = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self.apply()
        try:
            yield
        finally:
            self._fill(own)

    @torch.no_grad()
    def apply(self) -> None:
        """Give the model the average's weights."""
        self._fill(self.weights)
        for name, start in self.start.items():
            self.parameters[name].lerp_(start, self.shares[name])

    def capture(self) -> dict[str, dict[str, Tensor]]:
        """As plain data and tensors; the start too, whose folder may be another's by the time that the run goes on."""
        return {"weights": self.weights, "start": self.start}

    @torch.no_grad()
    def restore(self, saved: dict[str, dict[str, Tensor]]) -> None:
        """What `capture` gave."""
        for kind, own in self.capture().items():
            for name, weight in own.items():
                weight.copy_(saved[kind][name])

    @torch.no_grad()
    def _fill(self, weights: dict[str, Tensor]) -> None:
        for name, weight in weights.items():
            self.parameters[name].copy_(weight)


@dataclass
class State:
    """Everything that changes while training.

    Attributes:
        bridge: with whatever else is trained, see `trained.Trained`.
        step: updates done.
        best: step and score of the best validation so far.
        seconds: spent on the updates, over all sittings.
    """

    bridge: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: Average | None
    step: int = 0
    best: tuple[int, float] | None = None
    seconds: float = 0.0

    def capture(self) -> dict[str, Any]:
        """As plain data and tensors."""
        return {
            "step": self.step,
            "best": self.best,
            "seconds": self.seconds,
            "bridge": self.bridge.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "average": self.average.capture() if self.average else None,
        }

    def restore(self, path: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            CheckpointError: the file is damaged, or of a model of another shape.
        """
        saved = read(path)
        check_names(self.bridge, saved["bridge"], path)
        self.bridge.load_state_dict(saved["bridge"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scaler.load_state_dict(saved["scaler"])
        if self.average:
            self.average.restore(saved["average"])
        self.step, self.seconds = saved["step"], saved["seconds"]
        self.best = saved["best"]


def save(directory: Path, state: State) -> Path:
    """The state as the newest checkpoint; all but the last two leave.

    Raises:
        CheckpointError: it cannot be written (a full disk, say); the checkpoints before it are untouched.
    """
    path = directory / f"step-{state.step:08d}.pt"
    write(path, state.capture())
    for old in _all(directory)[:-KEEP]:
        old.unlink()
    return path


def write(path: Path, content: dict[str, Any]) -> None:
    """A file of tensors that appears whole or not at all, and is on the disk when this returns.

    Raises:
        CheckpointError: it cannot be written.
    """
    partial = path.with_name(path.name + _PARTIAL)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        sync_directory(path.parent)
    except (OSError, RuntimeError) as error:  # torch's writer turns some failed writes into RuntimeError
        partial.unlink(missing_ok=True)
        last = latest(path.parent)
        kept = f"the last good checkpoint is {last}" if last else "there is no earlier checkpoint"
        reason = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0]
        raise CheckpointError(
            f"{path}: cannot be written ({reason}); {kept}. Free some space and start the same command again"
        ) from error


def read(path: Path) -> dict[str, Any]:
    """What `write` wrote, on the CPU.

    Raises:
        CheckpointError: the file is damaged.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and file errors, each of its own type
        raise CheckpointError(
            f"{path}: damaged or no checkpoint ({str(error).splitlines()[0]}); delete it to go on from the one before"
        ) from None


def latest(directory: Path) -> Path | None:
    """The newest checkpoint, None before the first."""
    return next(reversed(_all(directory)), None)


def remove_partial(directory: Path) -> None:
    """What a killed run left half written."""
    for path in directory.glob(f"*{_PARTIAL}"):
        path.unlink()


def _all(directory: Path) -> list[Path]:
    return sorted(directory.glob("step-*.pt"))
