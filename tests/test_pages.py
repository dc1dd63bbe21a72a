"""Pages of a mapped file that go back to the system, and those that must not."""

from __future__ import annotations

import mmap
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from blip2.bench.clock import anonymous
from blip2.pages import _CHOSEN, release, release_unwritten, trim
from blip2.weights import transformers
from blip2.weights.tensors import Safetensors

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux tells which pages are there")

COUNT = 2**21  # 8 MB


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "some.safetensors"
    save_file({"first": torch.arange(COUNT).float(), "second": torch.ones(COUNT)}, path)
    return path


def resident(path: Path) -> int:
    """Bytes of a file that count as this process's memory."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            inside = line.endswith(str(path))
        elif inside and line.startswith("Rss:"):
            found += 1024 * int(line.split()[1])
    return found


def test_what_is_released_is_gone_from_memory_and_comes_back_as_it_was(file: Path):
    tensors = Safetensors.open([file])
    first, second = tensors.get("first"), tensors.get("second")
    total = first.sum(), second.sum()
    assert resident(file) > 1.9 * first.nbytes
    release(first)
    assert resident(file) < 1.1 * first.nbytes  # the other stays
    release_unwritten(second)
    assert resident(file) < 0.1 * first.nbytes
    assert (first.sum(), second.sum()) == total


def test_what_was_written_to_or_lies_in_no_file_stays(file: Path):
    tensors = Safetensors.open([file])
    first, second = tensors.get("first"), tensors.get("second")
    second[5] = 7.0
    release_unwritten(first)  # in the same mapping
    release_unwritten(second)
    assert second[5] == 7.0
    own = torch.arange(COUNT).float()
    release_unwritten(own)
    assert torch.equal(own, first)


def test_what_was_freed_goes_back():
    kept = [torch.ones(2**12) for _ in range(2**12)]  # 64 MB in pieces that the allocator does not map one by one
    held = anonymous()
    del kept[:-1]  # the last is above them all: what the allocator gives back of itself is at the end
    trim()
    assert anonymous() < held - 2**25
    assert kept[0].sum() == 2**12


FAULTS = """
import ctypes, resource, torch
from blip2 import pages
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: a fault is one page
{}
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def compute():
    for side in range(3000, 4000, 200):
        torch.ones(side, side)
for _ in range(8):
    before = faults()
    compute()
print(faults() - before)
"""


GLIBC = platform.libc_ver() >= ("glibc", "2.35")  # earlier ones keep no piece above 32 MB


@pytest.mark.skipif(not GLIBC, reason="other allocators have ways of their own")
def test_what_is_kept_is_not_fetched_from_the_system_again():
    pages = sum(4 * side**2 // mmap.PAGESIZE for side in range(3000, 4000, 200))

    def faults(call: str, **chosen: str) -> int:
        plain = {name: value for name, value in os.environ.items() if name not in (*_CHOSEN, "LD_PRELOAD")}
        command = [sys.executable, "-c", FAULTS.format(call)]
        return int(subprocess.run(command, env=plain | chosen, check=True, capture_output=True, text=True).stdout)

    assert faults("") > pages / 2
    assert faults("pages.keep()") < pages / 100
    assert faults("pages.keep()", MALLOC_TRIM_THRESHOLD_="1000000") > pages / 2


def test_telling_a_checkpoint_from_another_leaves_no_page_behind(file: Path, monkeypatch: pytest.MonkeyPatch):
    sampled: list[Tensor] = []
    monkeypatch.setattr(transformers, "release", lambda tensor: sampled.append(tensor) or release(tensor))
    tensors = Safetensors.open([file])
    transformers._identity(tensors, None)  # pyright: ignore[reportPrivateUsage, reportArgumentType]
    assert {tensor.data_ptr() for tensor in sampled} == {tensors.get(name).data_ptr() for name in ("first", "second")}
    assert resident(file) < 0.1 * sampled[0].nbytes
