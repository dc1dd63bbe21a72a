"""What a machine is, and what it reaches: bytes it reads and operations it does in a second, measured."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import blip2
from blip2.device import computes
from blip2.quantize.fp8 import E4M3, multiplies_fp8

READ = 2**29  # bytes that are read to measure the bandwidth: no cache holds them
ROWS, INPUTS, OUTPUTS = 2048, 4096, 4096  # of the product that is measured: large enough to be bound by arithmetic
LARGER = {"cuda": 4}  # times as much, where that much is over before the clock has moved
TRIES = 4
TELLING = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "bf16", "i8mm")
EIGHT_BITS = ("int8", "fp8")  # measured as they are
PRECISIONS = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "int8": 1.0, "fp8": 1.0, "int4": 0.5}  # bytes a weight


@dataclass(frozen=True)
class Machine:
    """What was measured on.

    Attributes:
        processor, device: names; `device` is CUDA's, empty on a CPU.
        cores: that the system shows; threads: that torch computes with.
        memory: gigabytes (10^9).
        features: of the processor, those that decide which kernels it has.
        versions: of python, torch and blip2.
    """

    processor: str
    device: str
    cores: int
    threads: int
    memory: float
    features: tuple[str, ...]
    system: str
    versions: dict[str, str]


@dataclass(frozen=True)
class Rates:
    """What the machine reaches.

    Attributes:
        bandwidth: bytes read in a second.
        operations: in a second, a multiplication and an addition being two, by precision; none that it does not have.
    """

    bandwidth: float
    operations: dict[str, float]

    def peak(self, precision: str) -> float:
        """Operations a second of weights of a precision: int4 is multiplied in the best type of 16 or 32 bits.

        So is fp8 where the device has no product with such.
        """
        if precision in self.operations:
            return self.operations[precision]
        plain = [rate for name, rate in self.operations.items() if name not in EIGHT_BITS]
        return max(self.operations.values() if precision == "int8" else plain)


def describe(device: torch.device) -> Machine:
    """This machine."""
    table = cpu_table()
    flags = set((table.get("flags") or table.get("Features") or "").split())
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
    return Machine(
        processor=table.get("model name") or platform.processor() or platform.machine(),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "",
        cores=os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        memory=round(pages / 1e9, 1),
        features=tuple(name for name in TELLING if name in flags),
        system=platform.system(),
        versions={"python": platform.python_version(), "torch": str(torch.__version__), "blip2": blip2.__version__},
    )


def cpu_table() -> dict[str, str]:
    """What Linux tells about the first processor; nothing elsewhere."""
    file = Path("/proc/cpuinfo")
    first = file.read_text().split("\n\n")[0].splitlines() if file.is_file() else []
    pairs = (line.partition(":") for line in first)
    return {key.strip(): value.strip() for key, _, value in pairs}


def measure(device: torch.device) -> Rates:
    """The rates of a device: some seconds of work, and 0.6 GB of memory."""
    larger = LARGER.get(device.type, 1)
    with torch.inference_mode():
        bandwidth = _bandwidth(device, larger * READ)
        found: dict[str, float] = {}
        for precision in ("float32", "bfloat16", *EIGHT_BITS):
            best = min((_best(call, device) for call in _products(precision, device, larger * ROWS)), default=None)
            if best is not None:
                found[precision] = 2 * larger * ROWS * INPUTS * OUTPUTS / best
    return Rates(bandwidth, found)


def synchronize(device: torch.device) -> None:
    """Wait for what a device was given to do; a CPU has done it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _bandwidth(device: torch.device, size: int) -> float:
    values = torch.ones(size // 4, device=device)
    return size / min(_best(values.sum, device), _best(values.amax, device))


def _products(precision: str, device: torch.device, rows: int) -> Iterator[Callable[[], Any]]:
    """The ways to multiply in a precision that work here."""
    if precision == "int8":
        x, w = (torch.ones(shape, dtype=torch.int8, device=device) for shape in ((rows, INPUTS), (OUTPUTS, INPUTS)))
        yield from _working(lambda: torch.ops.aten._int_mm(x, w.t()))
        return
    if precision == "fp8":
        if device.type == "cuda" and multiplies_fp8(device.type):
            x, w = (torch.ones(shape, device=device).to(E4M3) for shape in ((rows, INPUTS), (OUTPUTS, INPUTS)))
            over, across = torch.ones(rows, 1, device=device), torch.ones(1, OUTPUTS, device=device)
            yield lambda: torch.ops.aten._scaled_mm(x, w.T, over, across, out_dtype=torch.bfloat16)
        return
    dtype = getattr(torch, precision)
    if not computes(dtype, device) and dtype is not torch.float32:
        return
    x, w = (torch.ones(shape, dtype=dtype, device=device) for shape in ((rows, INPUTS), (OUTPUTS, INPUTS)))
    yield from _working(lambda: F.linear(x, w))
    if device.type == "cpu":
        yield from _working(_packed(x, w))


def _packed(x: Tensor, w: Tensor) -> Callable[[], Tensor]:
    """A product with weights in oneDNN's own order, laid out at the first call."""
    kept: list[Tensor] = []

    def call() -> Tensor:
        if not kept:
            kept.append(torch.ops.mkldnn._reorder_linear_weight(w, len(x)))
        return torch.ops.mkldnn._linear_pointwise(x, kept[0], None, "none", [], "")

    return call


def _working(call: Callable[[], Any]) -> Iterator[Callable[[], Any]]:
    """The call, unless this build of torch or this device cannot do it."""
    with suppress(RuntimeError, AttributeError):
        call()
        yield call


def _best(call: Callable[[], Any], device: torch.device) -> float:
    """The shortest of some runs, in seconds: what others take of the machine only ever adds."""
    seconds: list[float] = []
    for _ in range(TRIES + 1):  # the first warms up, and is hardly ever the shortest
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds)
