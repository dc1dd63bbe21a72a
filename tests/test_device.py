"""Names of devices and precisions, on machines with other hardware than this one."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from blip2 import device
from blip2.device import fit_threads, half_dtype, pick_device, pick_dtype, whole_cores
from blip2.errors import ConfigError


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """Gives torch a number of CUDA devices, with or without bfloat16, and Metal or none."""

    def have(cuda: int = 0, *, bfloat16: bool = True, metal: bool = False) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
        monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation=True: bfloat16 or including_emulation
        )
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: metal)

    return have


def test_auto_is_cuda_where_there_is_one(machine):
    machine(cuda=0, metal=True)
    assert pick_device("auto") == torch.device("cpu")
    machine(cuda=2)
    assert pick_device("auto") == torch.device("cuda")


def test_a_device_that_is_there_is_given_as_named(machine):
    machine(cuda=2, metal=True)
    for name in ("cpu", "cuda", "cuda:0", "cuda:1", "mps"):
        assert pick_device(name) == torch.device(name)


@pytest.mark.parametrize("name", ["", "gpu", "cuda:x", "cuda:-1", " cuda", "meta", "xpu"])
def test_a_name_that_is_none_lists_those_that_are(machine, name: str):
    machine(cuda=1)
    with pytest.raises(ConfigError, match=f"device '{name}' is none; use auto, cpu, cuda, cuda:N or mps"):
        pick_device(name)


def test_a_device_that_this_machine_lacks_is_named_with_the_way_out(machine):
    machine(cuda=1)
    with pytest.raises(ConfigError, match="'cuda:7': this machine has 1, the last is cuda:0"):
        pick_device("cuda:7")
    machine(cuda=0)
    with pytest.raises(ConfigError, match="'cuda:7': this torch sees no CUDA device; use cpu, or auto"):
        pick_device("cuda:7")
    with pytest.raises(ConfigError, match="'mps': this torch sees no Metal device; use cpu, or auto"):
        pick_device("mps")


def test_half_precision_is_bfloat16_unless_the_hardware_would_emulate_it(machine):
    machine(cuda=1, bfloat16=True)
    assert half_dtype(torch.device("cuda")) is torch.bfloat16
    machine(cuda=1, bfloat16=False)
    assert half_dtype(torch.device("cuda")) is torch.float16
    assert half_dtype(torch.device("cpu")) is torch.bfloat16
    assert half_dtype(torch.device("mps")) is torch.float16


def test_auto_precision_is_half_on_cuda_and_full_elsewhere(machine):
    machine(cuda=1, bfloat16=False)
    assert pick_dtype("auto", torch.device("cuda", 0)) is torch.float16
    assert pick_dtype("auto", torch.device("cpu")) is torch.float32
    assert pick_dtype("auto", torch.device("mps")) is torch.float32


def test_a_precision_is_given_as_named_and_an_unknown_one_lists_the_known():
    assert pick_dtype("bfloat16", torch.device("cpu")) is torch.bfloat16
    with pytest.raises(ConfigError, match="dtype 'fp16' is none; use auto, float32, bfloat16, float16"):
        pick_dtype("fp16", torch.device("cpu"))


# -- threads -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Gives this process logical processors, each on a core, and a quota of them."""

    def have(*cores: int, quota: str = "max 100000") -> None:
        for number, core in enumerate(cores):
            topology = tmp_path / f"cpu{number}" / "topology"
            topology.mkdir(parents=True)
            (topology / "core_id").write_text(f"{core}\n")
            (topology / "physical_package_id").write_text("0\n")
        (tmp_path / "cpu.max").write_text(quota)
        monkeypatch.setattr(device, "_CPUS", tmp_path)
        monkeypatch.setattr(device, "_QUOTA", tmp_path / "cpu.max")
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: {*range(len(cores))}, raising=False)
        monkeypatch.setattr(os, "cpu_count", lambda: len(cores))
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
            monkeypatch.delenv(name, raising=False)
        fit_threads.cache_clear()

    yield have
    fit_threads.cache_clear()


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch):
    """What torch is told, from a number that it has."""
    told: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    return lambda count: monkeypatch.setattr(torch, "get_num_threads", lambda: count) or told


def test_hyper_threads_count_as_one_core_and_a_quota_is_kept(cores):
    cores(0, 1, 0, 1)
    assert whole_cores() == 2


@pytest.mark.parametrize(("quota", "expected"), [("max 100000", 4), ("150000 100000", 2), ("10000 100000", 1)])
def test_a_control_group_s_quota_limits_the_cores(cores, quota: str, expected: int):
    cores(0, 1, 2, 3, quota=quota)
    assert whole_cores() == expected


def test_where_the_system_does_not_say_each_processor_is_a_core(cores, monkeypatch: pytest.MonkeyPatch):
    cores(0, 0)
    monkeypatch.setattr(device, "_CPUS", Path("nowhere"))
    monkeypatch.setattr(device, "_QUOTA", Path("nowhere"))
    assert whole_cores() == 2


def test_torch_gets_a_thread_for_each_whole_core(cores, threads):
    cores(0, 0, 1, 1)
    told = threads(4)
    fit_threads()
    fit_threads()
    assert told == [2]


@pytest.mark.parametrize("count", [1, 2, 3, 16])
def test_a_number_of_threads_that_somebody_chose_stays(cores, threads, count: int):
    cores(0, 0, 1, 1)
    told = threads(count)
    fit_threads()
    assert told == []


def test_the_environment_s_number_of_threads_stays(cores, threads, monkeypatch: pytest.MonkeyPatch):
    cores(0, 0, 1, 1)
    told = threads(4)
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    fit_threads()
    assert told == []
