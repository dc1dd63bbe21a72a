"""The batch size that is found: it grows while that pays, and stops where memory or patience would end."""

from __future__ import annotations

import threading

import pytest
import torch

from blip2 import batching
from blip2.batching import BatchSize, in_order, sparing
from blip2.errors import ConfigError

CPU = torch.device("cpu")


def found(rates: dict[int, float], asked: int | str = "auto", batches: int = 20) -> list[int]:
    """The sizes that batches take where so many items together are done at such a rate."""
    size = BatchSize(asked, CPU)  # pyright: ignore[reportArgumentType]
    taken: list[int] = []
    for _ in range(batches):
        taken.append(size.now)
        size.took(size.now, size.now / rates[size.now])
    return taken


@pytest.fixture(autouse=True)
def memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough of it, whatever this machine has."""
    monkeypatch.setattr(batching, "free_memory", lambda _: 2**40)


def test_it_doubles_while_that_is_faster_and_goes_back_to_the_fastest() -> None:
    assert found({8: 10, 16: 20, 32: 30, 64: 29}) == [8, 16, 32, 64, 64] + [32] * 15
    assert found({8: 10, 16: 10.2}) == [8, 16, 16] + [8] * 17


def test_it_goes_no_further_than_the_device_s_most() -> None:
    assert found({8: 1, 16: 2, 32: 4, 64: 8})[-1] == batching.MOST["cpu"]


def test_one_slow_batch_does_not_settle_it() -> None:
    size = BatchSize("auto", CPU)
    for count, rate, then in ((8, 10, 16), (16, 2, 16), (16, 20, 32), (32, 21, 32), (32, 30, 64)):
        size.took(count, count / rate)
        assert size.now == then


def test_a_batch_that_takes_long_is_not_doubled() -> None:
    assert set(found({8: 8 / (2 * batching.LONGEST)})) == {8}


def test_it_stops_where_twice_the_memory_would_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = iter((0, 100, 200, 400, 800))
    monkeypatch.setattr(batching, "peak_memory", lambda _: next(peaks))
    monkeypatch.setattr(batching, "free_memory", lambda _: 500)
    assert set(found({8: 1, 16: 2, 32: 4, 64: 8}, batches=3)[1:]) == {16, 32}
    peaks = iter((0, 100, 400, 800))
    assert found({8: 1, 16: 2, 32: 4}, batches=4) == [8, 16, 16, 16]


def test_a_given_size_stays_and_the_last_batch_tells_nothing() -> None:
    assert set(found({5: 1}, asked=5)) == {5}
    size = BatchSize("auto", CPU)
    size.took(3, 100)
    assert size.now == batching.FIRST


@pytest.mark.parametrize("asked", [0, -1, "many"])
def test_what_is_no_size_is_named(asked: int | str) -> None:
    with pytest.raises(ConfigError, match=f"batch_size is {asked!r}; it must be at least 1, or auto"):
        BatchSize(asked, CPU)  # pyright: ignore[reportArgumentType]


def test_a_halved_size_never_grows_again() -> None:
    size = BatchSize("auto", CPU)

    def work(items: object) -> list[int]:
        rows = list(items)  # pyright: ignore
        if len(rows) > 4:
            raise MemoryError
        return rows

    with pytest.warns(RuntimeWarning, match="memory ran out at 8"):
        assert sparing(work, range(20), size) == list(range(20))
    assert size.now == 4


def test_work_is_done_in_threads_and_given_in_order_and_an_error_comes_at_its_turn() -> None:
    together = threading.Barrier(2, timeout=10)

    def work(item: int) -> int:
        if item < 2:
            together.wait()  # two threads, or this breaks
        if item == 3:
            raise ValueError("three")
        return -item

    stream = in_order(work, range(9), lambda: 4, workers=2)
    assert [next(stream) for _ in range(3)] == [0, -1, -2]
    with pytest.raises(ValueError, match="three"):
        next(stream)
