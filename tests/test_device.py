"""Names of devices and precisions, on machines with other hardware than this one."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from blip2.device import half_dtype, pick_device, pick_dtype
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
