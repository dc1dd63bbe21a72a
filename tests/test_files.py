"""A file is the old one or the new one, whatever happens in between."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import stat
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from blip2.files import cache_directory, replacing

FORK = multiprocessing.get_context("fork")  # a fresh interpreter would import torch for seconds


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_new_content_takes_the_place_of_the_old(tmp_path: Path):
    path = tmp_path / "file"
    for content in (b"old", b"new"):
        with replacing(path) as partial:
            assert partial.parent == tmp_path  # on the same disk, so that a rename is one step
            partial.write_bytes(content)
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["file"]


def test_the_old_content_is_there_until_the_end(tmp_path: Path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with replacing(path) as partial:
        partial.write_bytes(b"new")
        assert path.read_bytes() == b"old"


@pytest.mark.parametrize("error", [ValueError("bad value"), KeyboardInterrupt(), OSError(errno.ENOSPC, "full")])
def test_a_failure_leaves_the_old_content_and_nothing_else(tmp_path: Path, error: BaseException):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail() -> None:
        with replacing(path) as partial:
            partial.write_bytes(b"half")
            raise error

    with pytest.raises(type(error)) as raised:
        fail()
    assert raised.value is error
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_a_disk_that_fails_at_the_end_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "file"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"), replacing(path) as partial:
        partial.write_bytes(b"new")
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_content_and_name_are_on_the_disk_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    synced: list[tuple[bool, bool]] = []
    path = tmp_path / "file"

    def fsync(descriptor: int) -> None:
        synced.append((stat.S_ISDIR(os.fstat(descriptor).st_mode), path.exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    with replacing(path) as partial:
        partial.write_bytes(b"new")
    assert synced == [(False, False), (True, True)]  # the content before the rename, the folder after it


def test_an_error_names_the_file_that_was_meant(tmp_path: Path):
    path = tmp_path / "absent" / "file"
    with pytest.raises(FileNotFoundError) as raised, replacing(path):
        pass
    assert raised.value.filename == str(path)


def test_a_killed_writer_leaves_the_old_content(tmp_path: Path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    half_way = FORK.Event()

    def write() -> None:
        with replacing(path) as partial:
            partial.write_bytes(b"half")
            half_way.set()
            time.sleep(60)

    process = FORK.Process(target=write)
    process.start()
    assert half_way.wait(30)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join(30)
    assert path.read_bytes() == b"old"
    with replacing(path) as partial:
        partial.write_bytes(b"new")
    assert path.read_bytes() == b"new"


def test_two_writers_at_once_do_not_mix(tmp_path: Path):
    path = tmp_path / "file"
    with replacing(path) as one, replacing(path) as two:
        one.write_bytes(b"one")
        two.write_bytes(b"two")
    assert path.read_bytes() == b"one"  # the last to end
    assert names(tmp_path) == ["file"]


def test_a_file_has_the_usual_permissions_whoever_writes_it(tmp_path: Path):
    (tmp_path / "usual").touch()
    with replacing(tmp_path / "file") as partial:
        save_file({"a": torch.zeros(1)}, partial)
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_name_may_be_as_long_as_the_disk_allows(tmp_path: Path):
    path = tmp_path / ("n" * 255)
    with replacing(path) as partial:
        partial.write_bytes(b"new")
    assert path.read_bytes() == b"new"


def test_the_cache_stands_where_the_environment_says(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("BLIP2_CACHE", "/own")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.setenv("HOME", "/home/me")
    assert cache_directory() == Path("/own")
    monkeypatch.delenv("BLIP2_CACHE")
    assert cache_directory() == Path("/xdg/blip2")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_directory() == Path("/home/me/.cache/blip2")
