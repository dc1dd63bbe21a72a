"""Time and memory, taken of calls."""

from __future__ import annotations

import gc
import sys
import time

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import tiny_model
from blip2.bench import machine
from blip2.bench.clock import REST, AnonymousMemory, phases, timed

CPU = torch.device("cpu")


def test_runs_stop_at_their_number_or_their_budget():
    assert len(timed(lambda: None, CPU, repeats=3).seconds) == 3
    assert len(timed(lambda: time.sleep(0.01), CPU, repeats=9, budget=0.0).seconds) == 1
    assert timed(lambda: time.sleep(0.02), CPU, repeats=1).median >= 0.02


def test_phases_cover_a_caption_and_leave_the_model_as_it_was():
    model = tiny_model.build()
    before = model.caption(tiny_model.picture(0))
    with phases(model) as clock:
        assert model.caption(tiny_model.picture(0)) == before
    assert set(clock.seconds) == {"vision", "Q-Former", "prefill", "steps", REST}
    assert all(seconds > 0 for seconds in clock.seconds.values())
    assert clock.calls["vision"] == 1
    assert clock.calls["steps"] >= 1
    assert not {"forward", "step", "prefill"} & (vars(model.encoder).keys() | vars(model.language).keys())
    assert model.caption(tiny_model.picture(0)) == before


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what no file backs")
def test_memory_that_was_held_and_let_go_is_seen():
    gc.collect()  # what other tests left goes before, not during
    watch = AnonymousMemory()
    held = torch.ones(2**26)  # 256 MB
    time.sleep(0.1)
    del held
    assert watch.stop() >= 2**27


def test_a_machine_says_what_it_is_and_what_it_reaches(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine, "READ", 2**22)
    for name in ("ROWS", "INPUTS", "OUTPUTS"):
        monkeypatch.setattr(machine, name, 64)
    own, rates = machine.describe(CPU), machine.measure(CPU)
    assert own.processor
    assert own.versions["torch"] == str(torch.__version__)
    assert own.threads == torch.get_num_threads()
    assert rates.bandwidth > 0
    assert rates.operations["float32"] > 0
    assert rates.peak("float32") == rates.operations["float32"]


def test_fp8_is_multiplied_as_cuda_asks_where_there_is_such_a_product(monkeypatch: pytest.MonkeyPatch):
    assert list(machine._products("fp8", CPU, 64)) == []
    monkeypatch.setattr(machine, "multiplies_fp8", lambda _: True)
    with FakeTensorMode():
        (product,) = machine._products("fp8", torch.device("cuda"), 64)
        found = product()
    assert (tuple(found.shape), found.dtype) == ((64, machine.OUTPUTS), torch.bfloat16)


def test_weights_of_4_bits_are_multiplied_in_the_best_plain_type():
    rates = machine.Rates(1.0, {"float32": 2.0, "bfloat16": 3.0, "int8": 9.0})
    assert (rates.peak("int4"), rates.peak("int8"), rates.peak("float16")) == (3.0, 9.0, 3.0)
    assert rates.peak("fp8") == 3.0  # made plain
    assert machine.Rates(1.0, {"bfloat16": 3.0, "int8": 9.0, "fp8": 8.0}).peak("fp8") == 8.0
    assert machine.Rates(1.0, {"float32": 2.0}).peak("int8") == 2.0
