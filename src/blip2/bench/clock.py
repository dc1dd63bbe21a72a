"""Seconds and bytes: calls timed one after another, phases of a call, memory at its highest."""

from __future__ import annotations

import functools
import statistics
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from blip2.bench.machine import synchronize
from blip2.blip2 import Blip2

POLL = 0.01  # seconds
PHASES = {  # of a verb: where in a model its time goes, by the calls that are timed
    "encoder": {"forward": "vision"},
    "bridge": dict.fromkeys(("see", "look", "image_vectors", "text_vectors", "match", "project"), "Q-Former"),
    "language": {"prefill": "prefill", "step": "steps"},
}
REST = "search and the rest"


@dataclass(frozen=True)
class Timing:
    """Seconds of each run, in order."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def timed(call: Callable[[], Any], device: torch.device, repeats: int = 3, budget: float = float("inf")) -> Timing:
    """Run a call some times.

    Args:
        repeats: at most.
        budget: seconds after which no further run begins; the first always does.
    """
    found: list[float] = []
    while len(found) < repeats and (not found or sum(found) < budget):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        found.append(time.perf_counter() - start)
    return Timing(tuple(found))


@dataclass
class Clock:
    """Seconds and calls of each phase, inner calls counted once."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict[str, float])
    calls: dict[str, int] = field(default_factory=dict[str, int])
    _busy: bool = False

    def __call__(self, phase: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The call with its time taken."""

        @functools.wraps(call)
        def run(*args: Any, **keywords: Any) -> Any:
            if self._busy:
                return call(*args, **keywords)
            synchronize(self.device)
            start, self._busy = time.perf_counter(), True
            try:
                return call(*args, **keywords)
            finally:
                synchronize(self.device)
                self._busy = False
                self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start
                self.calls[phase] = self.calls.get(phase, 0) + 1

        return run


@contextmanager
def phases(model: Blip2) -> Generator[Clock]:
    """Take the time of a model's parts while the block runs; a device is waited for at each, so sums are a bit long."""
    clock = Clock(model.device)
    parts = {"encoder": model.encoder, "bridge": model.bridge, "language": model.language}
    wrapped = [
        (part, name, phase)
        for key, part in parts.items()
        for name, phase in PHASES[key].items()
        if part is not None and hasattr(part, name)
    ]
    for part, name, phase in wrapped:
        setattr(part, name, clock(phase, getattr(part, name)))
    start = time.perf_counter()
    try:
        yield clock
    finally:
        whole = time.perf_counter() - start
        for part, name, _ in wrapped:
            delattr(part, name)  # the class's own is there again
        clock.seconds[REST] = whole - sum(clock.seconds.values())


class AnonymousMemory:
    """Watches what this process holds that no file backs, from now on; nothing where the system does not tell."""

    def __init__(self) -> None:
        self.start = self.highest = anonymous()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        """The most since the start, in bytes more than then."""
        self._stop.set()
        self._thread.join()
        return max(self.highest, anonymous()) - self.start

    def _watch(self) -> None:
        while not self._stop.wait(POLL):
            self.highest = max(self.highest, anonymous())


def anonymous() -> int:
    """Bytes that this process holds and no file backs."""
    return _status("RssAnon")


def resident_peak() -> int:
    """The most bytes that this process ever held, pages of mapped files among them; 0 where the system is silent."""
    return _status("VmHWM")


def _status(key: str) -> int:
    file = Path("/proc/self/status")
    lines = file.read_text().splitlines() if file.is_file() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:")), 0)
