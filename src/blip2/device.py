"""What the model runs on, and in which precision: the names that people give, checked against this machine."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from blip2.errors import ConfigError

try:
    import resource
except ImportError:  # Windows
    resource = None

_KINDS = ("cpu", "cuda", "mps")
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # what people set for torch to go by
_CPUS, _QUOTA = Path("/sys/devices/system/cpu"), Path("/sys/fs/cgroup/cpu.max")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name: str) -> torch.device:
    """The device of a name.

    Args:
        name: `auto` (CUDA where there is one, else the CPU), `cpu`, `cuda`, `cuda:1`, ..., or `mps`.
    Returns:
        With the index that was given, without one where none was.
    Raises:
        ConfigError: no such device, or this machine does not have it.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise _unknown(name) from None
    if device.type not in _KINDS:
        raise _unknown(name)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not count:
            raise ConfigError(f"device {name!r}: this torch sees no CUDA device; use cpu, or auto")
        if ":" in name and device.index >= count:
            raise ConfigError(f"device {name!r}: this machine has {count}, the last is cuda:{count - 1}")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError(f"device {name!r}: this torch sees no Metal device; use cpu, or auto")
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The precision of a name.

    Args:
        name: `float32`, `bfloat16`, `float16`, or `auto`: `half_dtype` on CUDA, float32 elsewhere.
    Raises:
        ConfigError: no such precision.
    """
    if name == "auto":
        return half_dtype(device) if device.type == "cuda" else torch.float32
    if name not in _DTYPES:
        raise ConfigError(f"dtype {name!r} is none; use auto, {', '.join(_DTYPES)}")
    return _DTYPES[name]


def half_dtype(device: torch.device) -> torch.dtype:
    """The half precision that the device computes in itself: bfloat16, which has the range of float32, else float16."""
    if device.type == "cpu":
        return torch.bfloat16
    if device.type == "mps":
        return torch.float16
    with torch.cuda.device(device):
        native = torch.cuda.is_bf16_supported(including_emulation=False)  # emulated, it is slower than float32
    return torch.bfloat16 if native else torch.float16


def computes(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the device computes a half precision itself; a CPU that does not is slower in it than in float32."""
    if device.type != "cpu":
        return True
    able: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.11 has none
    return dtype is torch.bfloat16 and bool(able.get("avx512_bf16") or able.get("amx_bf16"))


def passes(test: Callable[[], bool]) -> bool:
    """Whether a kernel passes a test; where this torch has none of that name, or refuses, it does not."""
    try:
        return bool(test())
    except (AttributeError, RuntimeError, TypeError):
        return False


@functools.cache
def fit_threads() -> None:
    """Let torch compute on as many threads as there are whole cores, once a process.

    Two threads on one core wait for each other in every product. A number that somebody chose stays: in the
    environment, or by `torch.set_num_threads` to anything but one for each logical processor, torch's own choice.
    """
    if any(name in os.environ for name in _THREADS):
        return
    cores = whole_cores()
    if cores < torch.get_num_threads() and torch.get_num_threads() in (len(_processors()), os.cpu_count()):
        torch.set_num_threads(cores)


def whole_cores() -> int:
    """Cores that this process may use: one for hyper-threads that share it, and no more than its control group has."""
    found = {_core(_CPUS / f"cpu{number}" / "topology", number) for number in _processors()}
    limit = len(found)
    with contextlib.suppress(OSError, ValueError):  # "max" where there is no limit
        quota, period = (int(value) for value in _QUOTA.read_text().split())
        limit = min(limit, -(-quota // period))
    return max(limit, 1)


def _core(topology: Path, number: int) -> tuple[str, ...]:
    """What logical processors of one core have in common; its own number where the system does not say."""
    try:
        return tuple((topology / name).read_text().strip() for name in ("physical_package_id", "core_id"))
    except OSError:
        return (str(number),)


def _processors() -> set[int]:
    """Logical processors that this process may use."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else {*range(os.cpu_count() or 1)}


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a CUDA device, or in the CPU's memory, as far as the system and its control group say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    pages = os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    free = pages * os.sysconf("SC_PAGE_SIZE") if pages else 0
    with contextlib.suppress(OSError):
        free = available_memory() or free
    with contextlib.suppress(OSError, ValueError):  # in a container; "max" where it has no limit
        limit, used = (int(Path("/sys/fs/cgroup", name).read_text()) for name in ("memory.max", "memory.current"))
        free = min(free, limit - used)
    return max(free, 0)


def peak_memory(device: torch.device) -> int:
    """Bytes that this process has held at most: on a CUDA device, else in the CPU's memory; 0 where nobody says."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    if resource is None:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def available_memory() -> int | None:
    """Bytes that Linux would give without swapping: free ones, and files that it can read again; None elsewhere."""
    file = Path("/proc/meminfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def _unknown(name: str) -> ConfigError:
    return ConfigError(f"device {name!r} is none; use auto, cpu, cuda, cuda:N or mps")
