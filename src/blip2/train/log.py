"""What a run says while it runs: a line of numbers a step on disk, a bar on the terminal, curves for TensorBoard."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, Self

from blip2.errors import CheckpointError
from blip2.train.distributed import first_rank
from blip2.train.folder import Folder

PLAIN_SECONDS = 15.0  # between two lines where standard error is no terminal


class Log:
    """Writes to a run's folder and to standard error; only rank 0 has one.

    Args:
        done: step that the run goes on from; what was logged after it is cut off.
        every: steps between two points of the TensorBoard curves.
    """

    def __init__(self, folder: Folder, steps: int, done: int, every: int) -> None:
        folder.cut_log(done)
        self._file = folder.metrics.open("a", encoding="utf-8")
        self._every = every
        self._bar = _Bar(steps, done) if sys.stderr.isatty() else _Lines(steps, done)
        self._board = _board(folder, done)
        if self._board is None:
            say('no TensorBoard curves: pip install "blip2[train]" (metrics.jsonl has the same numbers)')

    def step(self, step: int, rate: float, losses: Mapping[str, float], norm: float) -> None:
        """An update was made.

        Args:
            step: counted from 1.
            rate: the learning rate it was made with.
            norm: of the gradient, before it was clipped; null in the file where float16 has overflowed.
        """
        self._write({"step": step, "lr": rate, "norm": norm if math.isfinite(norm) else None, **losses})
        self._bar.show(step, losses)
        if self._board is not None and step % self._every == 0:
            for name, value in {"lr": rate, "norm": norm, **{f"loss/{name}": x for name, x in losses.items()}}.items():
                self._board.add_scalar(name, value, step)

    def validation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Held-out data were looked at."""
        self._write({"step": step, "validation": dict(metrics)})
        say(f"step {step}, validation: {figures(metrics)}")
        if self._board is not None:
            for name, value in metrics.items():
                self._board.add_scalar(f"validation/{name}", value, step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()
        self._file.close()
        if self._board is not None:
            self._board.close()

    def _write(self, line: dict[str, Any]) -> None:
        try:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        except OSError as error:
            raise CheckpointError(
                f"{self._file.name}: cannot be written ({error.strerror}). "
                "Free some space and start the same command again: it goes on from its last checkpoint"
            ) from error


def say(text: str) -> None:
    """A line for the person who watches; of several ranks only the first speaks."""
    if first_rank():
        print(text, file=sys.stderr, flush=True)


def now_and_then(text: str) -> Callable[[int, int], None]:
    """A reporter of progress, done and total, that says `text` and how far it is once in a while and at the end."""
    shown = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal shown
        if done == total or time.monotonic() - shown >= PLAIN_SECONDS:
            shown = time.monotonic()
            say(f"{text}: {done} of {total}")

    return report


def figures(values: Mapping[str, float]) -> str:
    """`itc 1.234, itm 0.567`."""
    return ", ".join(f"{name} {value:.3f}" for name, value in values.items())


class _Bar:
    """A progress bar, for a terminal."""

    def __init__(self, steps: int, done: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._progress = Progress(
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._task = self._progress.add_task("", total=steps, completed=done)
        self._start = (done, time.monotonic())
        self._progress.start()

    def show(self, step: int, losses: Mapping[str, float]) -> None:
        seconds = _seconds_a_step(self._start, step)
        self._progress.update(
            self._task, completed=step, description=f"{figures(losses)}, {seconds:.2f} s a step, left"
        )

    def close(self) -> None:
        self._progress.stop()


class _Lines:
    """A line now and then, where standard error is a file or a pipe."""

    def __init__(self, steps: int, done: int) -> None:
        self._steps = steps
        self._start = (done, time.monotonic())
        self._shown = 0.0

    def show(self, step: int, losses: Mapping[str, float]) -> None:
        now = time.monotonic()
        if now - self._shown < PLAIN_SECONDS and step < self._steps:
            return
        self._shown = now
        seconds = _seconds_a_step(self._start, step)
        left = timedelta(seconds=round((self._steps - step) * seconds))
        say(f"step {step} of {self._steps}: {figures(losses)}, {seconds:.2f} s a step, {left} left")

    def close(self) -> None:
        """Nothing is held open."""


def _seconds_a_step(start: tuple[int, float], step: int) -> float:
    return (time.monotonic() - start[1]) / (step - start[0])


def _board(folder: Folder, done: int) -> Any:
    """TensorBoard's writer, which forgets what was logged after `done`; None where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder.path / "tensorboard"), purge_step=done + 1)
