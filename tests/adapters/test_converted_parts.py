"""The cache of converted parts, with a build of two small files in the place of a conversion."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blip2.adapters.parts import MANIFEST, check, converted, fingerprint, require
from blip2.errors import CheckpointError, MissingExtraError

FORK = multiprocessing.get_context("fork")  # a fresh interpreter would import torch for seconds
WEIGHTS, CONFIG = b"weights" * 100, b"{}"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BLIP2_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def build(place: Path) -> None:
    (place / "weights").write_bytes(WEIGHTS)
    (place / "config").write_bytes(CONFIG)


def never(place: Path) -> None:
    raise AssertionError(f"{place} was built again")


def convert(how: Callable[[Path], None] = build) -> Path:
    return converted("part", how, "preparing part once")


def whole(directory: Path) -> bool:
    return (directory / "weights").read_bytes() == WEIGHTS and (directory / "config").read_bytes() == CONFIG


def beside(directory: Path) -> set[str]:
    return {path.name for path in directory.parent.iterdir()} - {directory.name, f"{directory.name}.lock"}


def test_a_part_is_built_once_and_announced_on_stderr_only(capsys: pytest.CaptureFixture[str]) -> None:
    directory = convert()
    assert whole(directory)
    assert convert(never) == directory
    assert capsys.readouterr() == ("", "preparing part once\n")
    assert not beside(directory)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(name=st.sampled_from(["weights", "config"]), position=st.integers(0, 10_000), flip=st.integers(1, 255))
def test_one_changed_byte_is_found_and_the_part_built_again(name: str, position: int, flip: int) -> None:
    path = convert() / name
    content = bytearray(path.read_bytes())
    content[position % len(content)] ^= flip
    path.write_bytes(content)
    os.utime(path, ns=(0, position))  # the clock may tick too slowly to show the change
    with pytest.raises(CheckpointError, match=f"{name}: damaged"):
        check(path.parent)
    assert whole(convert())


def test_a_file_cut_short_or_gone_is_built_again_even_if_its_time_is_kept() -> None:
    path = convert() / "weights"
    times = path.stat()
    path.write_bytes(WEIGHTS[:-1])
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert whole(convert())
    path.unlink()
    assert whole(convert())


def test_a_touched_file_is_read_once_and_not_built_again(monkeypatch: pytest.MonkeyPatch) -> None:
    directory = convert()
    os.utime(directory / "weights", ns=(0, 0))
    assert convert(never) == directory
    monkeypatch.setattr("blip2.adapters.parts.fingerprint", never)  # the manifest has the new time by now
    assert convert(never) == directory


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.binary(max_size=40)
    | st.recursive(st.none() | st.integers() | st.text(), lambda inner: st.dictionaries(st.text(), inner)).map(
        lambda value: json.dumps({"files": value}).encode()
    )
)
def test_a_foreign_manifest_is_never_taken_for_the_part(content: bytes) -> None:
    directory = convert()
    (directory / MANIFEST).write_bytes(content)
    (directory / "weights").unlink()
    assert whole(convert())


def test_two_processes_at_once_build_once(tmp_path: Path) -> None:
    log = tmp_path / "log"

    def slowly(place: Path) -> None:
        with log.open("a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(0.3)
        build(place)

    processes = [FORK.Process(target=convert, args=(slowly,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len(log.read_text().splitlines()) == 1
    assert whole(convert(never))


def test_a_build_killed_half_way_leaves_nothing_that_is_taken_for_whole(cache: Path) -> None:
    half_way = FORK.Event()

    def forever(place: Path) -> None:
        (place / "weights").write_bytes(WEIGHTS)
        half_way.set()
        time.sleep(60)

    process = FORK.Process(target=convert, args=(forever,))
    process.start()
    assert half_way.wait(30)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join(30)
    assert not (cache / "part").exists()
    assert beside(cache / "part")  # the kill came too early for it to tidy up
    assert whole(convert())
    assert not beside(cache / "part")


def test_a_full_disk_is_an_error_that_names_the_directory(cache: Path) -> None:
    def fill(place: Path) -> None:
        build(place)
        with Path("/dev/full").open("wb") as file:  # Linux's own full disk
            file.write(WEIGHTS)

    with pytest.raises(
        CheckpointError, match=r"cache/part: cannot be written: .*No space left.* BLIP2_CACHE"
    ) as raised:
        convert(fill)
    assert isinstance(raised.value.__cause__, OSError)
    assert raised.value.__cause__.errno == errno.ENOSPC
    assert not (cache / "part").exists()
    assert not beside(cache / "part")


def test_an_interrupted_repair_keeps_no_damaged_part(cache: Path) -> None:
    (convert() / "weights").write_bytes(b"")

    def interrupted(place: Path) -> None:
        build(place)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(interrupted)
    assert not beside(cache / "part")
    assert whole(convert())


def test_a_cache_that_is_a_file_is_an_error_that_names_it(cache: Path) -> None:
    cache.write_bytes(b"")
    with pytest.raises(CheckpointError, match="cache/part: cannot be written"):
        convert()


def test_the_fingerprint_is_over_all_files_in_order(tmp_path: Path) -> None:
    one, two = tmp_path / "1", tmp_path / "2"
    one.write_bytes(b"ab")
    two.write_bytes(b"c")
    assert fingerprint([one, two]) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # of "abc"
    assert fingerprint([two, one]) != fingerprint([one, two])
    with pytest.raises(CheckpointError, match="3: cannot be read"):
        fingerprint([tmp_path / "3"])


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    modules: dict[str, Any] = sys.modules
    monkeypatch.setitem(modules, "gguf", None)
    with pytest.raises(MissingExtraError, match=r'gemma-3-270m needs .*pip install "blip2\[mini\]"'):
        require("gguf", "gemma-3-270m")
