"""One update of the weights: forward and backward, on any number of ranks and in any precision."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from blip2.device import computes, half_dtype
from blip2.errors import Blip2Error, ConfigError
from blip2.train.checkpoint import State
from blip2.train.distributed import World
from blip2.train.draws import draw_seed
from blip2.train.log import figures
from blip2.train.objectives import Batch
from blip2.train.optimizer import set_rate
from blip2.train.recipe import Recipe


@dataclass(frozen=True)
class Made:
    """One update: its losses and stop signal are those of all ranks."""

    losses: dict[str, float]
    norm: float
    rate: float
    stop: bool


@dataclass(frozen=True)
class Update:
    """One step: forward and backward over its parts, then the optimizer. Changes the state it holds.

    Attributes:
        model: the objective, wrapped so that gradients are averaged over ranks.
    """

    recipe: Recipe
    model: nn.Module
    epoch_steps: int
    state: State
    world: World
    device: torch.device
    precision: Precision

    def __call__(self, batches: Iterator[Batch], stop: bool) -> Made:
        """Make it.

        Args:
            stop: whether this rank was asked to stop after it.
        Raises:
            Blip2Error: a loss or the gradient is not finite; the weights are those of the step before.
        """
        started = time.perf_counter()
        state, step = self.state, self.state.step
        rate = self.recipe.learning_rate(step, self.epoch_steps)
        set_rate(state.optimizer, rate)
        state.bridge.train()
        totals: dict[str, Tensor] = {}
        for part in range(self.recipe.accumulate):
            losses = self._backward(next(batches), step * self.recipe.accumulate + part)
            for name, loss in losses.items():
                totals[name] = totals.get(name, 0) + loss.detach() / self.recipe.accumulate
        asked = torch.tensor(float(stop), device=self.device)
        *values, stopping = self.world.mean(torch.stack([*totals.values(), asked])).tolist()
        means = dict(zip(totals, values, strict=True))
        norm = self._descend(means)
        state.step += 1
        state.seconds += time.perf_counter() - started
        return Made(means, norm, rate, stopping > 0)

    def _backward(self, batch: Batch, number: int) -> dict[str, Tensor]:
        """Add the gradient of one part of the step, `number` counting parts over the whole run."""
        seed = self.recipe.seed
        torch.manual_seed(draw_seed(seed, number, self.world.rank))  # dropout
        with self._quiet(number):
            with self.precision.autocast():
                losses: dict[str, Tensor] = self.model(batch.to(self.device), draw_seed(seed, number))
            total = torch.stack(list(losses.values())).sum() / self.recipe.accumulate
            self.state.scaler.scale(total).backward()
        return losses

    def _quiet(self, number: int) -> AbstractContextManager[Any]:
        """Ranks exchange gradients in the last part of a step only."""
        if isinstance(self.model, DistributedDataParallel) and (number + 1) % self.recipe.accumulate:
            return self.model.no_sync()  # pyright: ignore[reportCallIssue]  (typed as a Tensor through __getattr__)
        return nullcontext()

    def _descend(self, losses: dict[str, float]) -> float:
        """Clip and apply the gradient, unless something is no number; the gradient's norm."""
        state = self.state
        self._check(losses, "loss")
        state.scaler.unscale_(state.optimizer)
        parameters = [p for group in state.optimizer.param_groups for p in group["params"]]
        norm = float(nn.utils.clip_grad_norm_(parameters, self.recipe.clip or math.inf))
        if not state.scaler.is_enabled():  # with fp16 the scaler leaves such a step out and lowers its scale
            self._check({"norm": norm}, "gradient")
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.optimizer.zero_grad()
        if state.average:
            state.average.update(state.step)
        return norm

    def _check(self, values: dict[str, float], what: str) -> None:
        if not all(map(math.isfinite, values.values())):
            raise Blip2Error(
                f"step {self.state.step + 1}: the {what} is no number any more ({figures(values)}); nothing of it is "
                "saved. Lower `lr`, lengthen `warmup`, set `clip`, or try precision=fp32; what was saved before is good"
            )


@dataclass(frozen=True)
class Precision:
    """What the forward pass computes in; the bridge's weights and the optimizer stay in float32.

    Attributes:
        compute: None where everything is float32.
        half: of frozen parts.
    """

    device: torch.device
    compute: torch.dtype | None
    half: torch.dtype

    @classmethod
    def choose(cls, name: str, device: torch.device) -> Precision:
        """`auto`: bfloat16 where the device computes it itself, else float16 on CUDA, and float32 on a CPU.

        Raises:
            ConfigError: float16 on a CPU.
        """
        half = half_dtype(device)
        if name == "auto":
            return cls(device, half, half) if computes(half, device) else cls(device, None, torch.float32)
        if name == "fp16" and device.type == "cpu":
            raise ConfigError("precision: fp16 needs CUDA; write fp32 or bf16")
        compute = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
        return cls(device, compute, torch.float32 if compute is None else compute)

    def autocast(self) -> AbstractContextManager[Any]:
        """Mixed precision inside."""
        return nullcontext() if self.compute is None else torch.autocast(self.device.type, self.compute)

    def scaler(self) -> torch.amp.GradScaler:
        """Keeps small gradients alive in float16; passes everything through otherwise."""
        return torch.amp.GradScaler(self.device.type, enabled=self.compute is torch.float16)
