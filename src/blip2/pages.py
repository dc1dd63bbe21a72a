"""Memory that is given back to the system: pages of mapped files that were read, and what was freed; and what is kept.

Without it, every page of a checkpoint that was read counts as this process's memory until the file is closed, and so
does what the allocator keeps of the copies that a layer passes through while it is packed. What a model computes with,
on the other hand, is asked for again by the next picture, and a page that comes from the system is cleared first.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

_SMAPS = Path("/proc/self/smaps")
_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) .{4} \S+ \S+ (\d+)\s")  # addresses, rights, offset, device, inode

_CHOSEN = ("GLIBC_TUNABLES", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")  # what people set for glibc to go by
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # mallopt's names


def release(tensor: Tensor) -> None:
    """Give back the pages of a tensor that lies in a mapped file and was not written to: what was written is lost."""
    advise = _system("madvise")
    if advise is None or not tensor.is_contiguous():
        return
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE  # whole pages of it alone
    length = (tensor.data_ptr() + tensor.nbytes - start) // mmap.PAGESIZE * mmap.PAGESIZE
    if length > 0:
        advise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_DONTNEED)


def release_unwritten(tensor: Tensor) -> None:
    """As `release`, of any tensor: only what lies in a mapped file of which no page was written to goes."""
    if _system("madvise") is not None and tensor.device.type == "cpu" and _is_unwritten(tensor.data_ptr()):
        release(tensor)


def _is_unwritten(address: int) -> bool:
    """Whether an address is in a file's mapping that is as the file is."""
    inside = False
    with _SMAPS.open() as lines:
        for line in lines:
            if mapping := _MAPPING.match(line):
                low, high = (int(mapping[each], 16) for each in (1, 2))
                inside = low <= address < high
                if inside and mapping[3] == "0":  # no file
                    return False
            elif inside and line.startswith("Anonymous:"):  # pages that were written to are copies of the file's
                return line.split()[1] == "0"
    return False


def trim() -> None:
    """Give back what was freed and the allocator (glibc's) keeps."""
    if (call := _system("malloc_trim")) is not None:
        call(0)


def keep() -> None:
    """From now on what is freed stays with this process, glibc's allocator willing, until `trim`.

    Otherwise every large piece comes from the system and goes back to it: a fifth to two fifths of the time of mini's
    image encoder. It is for a process of our own, after loading or before a long run; one that only imports us, or
    whose environment chooses, stays as it is.
    """
    if (call := _system("mallopt")) is not None and not any(name in os.environ for name in _CHOSEN):
        if not call(_MMAP_THRESHOLD, 2**31 - 1):
            call(_MMAP_THRESHOLD, 2**25)  # the most that glibc takes before 2.35
        call(_TRIM_THRESHOLD, -1)  # never


@functools.cache
def _system(name: str) -> Callable[..., int] | None:
    """A call of Linux's C library; None where there is none of that name."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
