"""How much is done at once: work that is read ahead, and a batch size that is found and gives way where memory ends."""

from __future__ import annotations

import os
import time
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Literal, TypeAlias, TypeVar

import torch

from blip2.device import free_memory, peak_memory
from blip2.errors import ConfigError

Size: TypeAlias = int | Literal["auto"]
T = TypeVar("T")
R = TypeVar("R")

FIRST = 8  # items in the first batch of `auto`
MOST = {"cpu": 64, "mps": 64, "cuda": 512}  # items that `auto` never goes beyond
GAIN = 1.05  # times as many items a second a doubled batch must give
TRIES = 2  # batches that a size has to show it
LONGEST = 20.0  # seconds: a batch that takes so long is not doubled, as a run that is stopped loses the one it is at
WORKERS = min(16, os.cpu_count() or 1)  # threads that read ahead
_EXHAUSTED = ("not enough memory", "can't allocate memory", "ALLOC_FAILED", "out of memory")


class BatchSize:
    """How many items the next batch takes.

    `auto` starts with `FIRST` and doubles while that gives more items a second and twice the memory would fit; one size
    that is better stays. A given size stays as it is. Either is halved where memory runs out.

    Args:
        asked: so many, or `auto`.
        device: that the work runs on.
    Raises:
        ConfigError: the size is no positive number.
    """

    def __init__(self, asked: Size, device: torch.device) -> None:
        if asked != "auto" and (isinstance(asked, str) or asked < 1):
            raise ConfigError(f"batch_size is {asked!r}; it must be at least 1, or auto")
        self._device = device
        self._growing = asked == "auto"
        self._most = MOST[device.type] if asked == "auto" else asked
        self._best, self._best_rate, self._tries = FIRST, 0.0, 0
        self._peak = peak_memory(device)
        self._warned = False
        self.now = FIRST if asked == "auto" else asked
        """Items of the next batch."""

    @property
    def ahead(self) -> int:
        """Items worth having ready: those of the next batch and of one doubled, few enough to be held."""
        return min(2 * self.now, self._most)

    def took(self, count: int, seconds: float) -> None:
        """A batch of so many items was done in so many seconds: the next may be another size."""
        if not self._growing or 2 * count <= self.now:
            return
        rate = count / max(seconds, 1e-9)
        peak, self._peak = self._peak, peak_memory(self._device)
        more = 2 * (self._peak - peak) if self._best_rate else 0  # twice the last doubling; at first weights come too
        if rate > GAIN * self._best_rate:
            self._best, self._best_rate, self._tries = self.now, rate, 0
            if 2 * self.now <= self._most and seconds < LONGEST and more < free_memory(self._device) / 2:
                self.now *= 2
                return
        elif self.now > self._best and self._tries + 1 < TRIES:
            self._tries += 1
            return
        self._growing, self.now = False, self._best

    def halve(self, count: int) -> None:
        """Memory ran out at so many items: no batch is that large again. The first time a warning says so."""
        self._growing = False
        self.now = min(self.now, max(1, count // 2))
        if not self._warned:
            warnings.warn(
                f"memory ran out at {count} images in one pass: they are done again in smaller ones; nothing is lost",
                RuntimeWarning,
                stacklevel=3,
            )
            self._warned = True


def batches(items: Iterable[T], size: BatchSize) -> Generator[list[T]]:
    """Lists of so many items as the size says at each turn, the last of what is left."""
    rest = iter(items)
    while batch := list(islice(rest, size.now)):
        yield batch


def sparing(work: Callable[[Sequence[T]], Sequence[R]], items: Sequence[T], size: BatchSize) -> list[R]:
    """What the work gives for each item, in order; done again in halves where memory runs out.

    Raises:
        Whatever the work raises; that memory ran out only for a single item.
    """
    done: list[R] = []
    while len(done) < len(items):
        part = items[len(done) : len(done) + size.now]
        start = time.perf_counter()
        try:
            done += work(part)
        except (RuntimeError, MemoryError) as error:
            if len(part) == 1 or not out_of_memory(error):
                raise
        else:
            size.took(len(part), time.perf_counter() - start)
            continue
        size.halve(len(part))  # outside of the handler: the error's frames hold the tensors
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return done


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on whichever device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(mark in str(error) for mark in _EXHAUSTED)


def in_order(
    work: Callable[[T], R], items: Iterable[T], ahead: Callable[[], int], workers: int = WORKERS
) -> Generator[R]:
    """The work's results in the order of the items, done by threads before they are asked for.

    Args:
        work: what lets go of the interpreter for most of its time, as decoding a picture does.
        ahead: how many to hold ready at most, asked each time.
    """
    pool = ThreadPoolExecutor(workers)
    rest = iter(items)
    ready: deque[Future[R]] = deque()

    def fill(most: int) -> None:
        ready.extend(pool.submit(work, item) for item in islice(rest, max(0, most - len(ready))))

    try:
        fill(ahead())
        while ready:
            result = ready.popleft().result()
            fill(ahead())
            yield result
    finally:
        pool.shutdown(cancel_futures=True)
