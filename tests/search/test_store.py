"""What was finished is never lost, nothing is there twice, and what is damaged is named or mended."""

from __future__ import annotations

import errno
import json
import logging
import multiprocessing
import os
import random
import re
import resource
import signal
import time
from multiprocessing.context import ForkProcess
from multiprocessing.queues import SimpleQueue as Queue
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pictures import Fake, names, paint, rainbow

from blip2.errors import ConfigError, DataError
from blip2.search import ImageIndex, store, update
from blip2.search.store import MANIFEST, Collection, Store, tidied

FORK = multiprocessing.get_context("fork")  # a fresh interpreter would import torch for seconds


def index_slowly(photos: Path, out: Path, seconds: float, encoded: Queue[int]) -> None:
    """Indexes, and writes what is done after every batch."""
    logging.basicConfig(force=True, stream=open(2, "w", closefd=False))  # noqa: SIM115  (what a terminal shows)
    update.COMMIT_SECONDS = 0.0
    model = Fake(seconds=seconds)
    ImageIndex.build(model, [photos], out, batch_size=4)
    encoded.put(model.encoded)


def indexing(photos: Path, out: Path, seconds: float, encoded: Queue[int] | None = None) -> ForkProcess:
    """Another process that indexes, so many seconds an image."""
    process = FORK.Process(target=index_slowly, args=(photos, out, seconds, encoded or FORK.SimpleQueue()))
    process.start()
    return process


def finished(out: Path) -> int:
    """Images that the manifest names; 0 where there is none yet."""
    return len(Store(out).read().files()) if Store(out).exists else 0


# -- killed and doubled ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kills", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_an_index_that_is_killed_loses_nothing_and_has_nothing_twice(tmp_path: Path, kills: int) -> None:
    photos, out = rainbow(tmp_path / "photos", 40 * kills), tmp_path / "index"
    draw, everything = random.Random(0), sorted(map(str, photos.iterdir()))
    before, ends, moments = 0, list[int | None](), set[int]()
    for _ in range(kills):
        process = indexing(photos, out, 0.002)
        wanted = before + draw.choice([0, 4, 8])
        while finished(out) < wanted and process.is_alive():  # or a busy machine would be killed before it begins
            time.sleep(0.001)
        process.join(draw.uniform(0, 0.05))
        process.kill()
        process.join()
        ends.append(process.exitcode)
        now = finished(out)
        assert now >= before, "what was finished is lost"
        before = now
        moments.add(now)
    assert ends.count(-signal.SIGKILL) > kills / 2
    assert len(moments) > 2, "no run was killed in the middle"
    model = Fake()
    index = ImageIndex.build(model, [photos], out)
    assert model.encoded == len(everything) - before
    live = [file[0] for part in index.collection.segments for file in np.array(part.files, object)[~part.dead].tolist()]
    assert sorted(live) == everything
    assert index.search("a dog", 9999) == ImageIndex.build(Fake(), [photos]).search("a dog", 9999)
    assert {path.name for path in out.iterdir()} == {
        ".lock", MANIFEST, *(segment.name for segment in index.collection.segments)
    }  # fmt: skip


def test_what_a_killed_run_left_half_written_goes(tmp_path: Path) -> None:
    photos, out = rainbow(tmp_path / "photos", 2), tmp_path / "index"
    ImageIndex.build(Fake(), [photos / "00.png"], out)
    left = [out / ".tmpOpOeXp", out / ".0123.partial", out / "0123.safetensors"]
    for path in left:
        path.touch()
    ImageIndex.build(Fake(), [photos], out)
    assert not any(path.exists() for path in left)


def test_two_processes_at_once_do_the_work_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    photos, out, encoded = rainbow(tmp_path / "photos", 60), tmp_path / "index", FORK.SimpleQueue()
    both = [indexing(photos, out, 0.02, encoded) for _ in range(2)]
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [0, 0]
    assert sorted((encoded.get(), encoded.get())) == [0, 60]
    assert "another run is writing to it; waiting until it is done" in capfd.readouterr().err
    assert finished(out) == 60


def test_a_reader_is_not_disturbed_by_a_writer(tmp_path: Path) -> None:
    photos, out = rainbow(tmp_path / "photos", 100), tmp_path / "index"
    ImageIndex.build(Fake(), [photos / "00.png"], out)
    process = indexing(photos, out, 0.005)
    sizes: list[int] = []
    while process.is_alive():
        index = ImageIndex.open(out, Fake())
        sizes.append(len(index.search("a dog", 999)))
        assert sizes[-1] == len(index)
    assert process.exitcode == 0
    assert sizes == sorted(sizes)
    assert len(set(sizes)) > 2
    assert finished(out) == 100


# -- keeping ----------------------------------------------------------------------------------------------------------


def test_an_index_comes_back_equal(photos: Path, tmp_path: Path) -> None:
    (photos / "ünïcode name.png").write_bytes((photos / "01.png").read_bytes())
    (photos / os.fsdecode(b"not \xff utf-8.png")).write_bytes((photos / "02.png").read_bytes())
    (photos / "broken.png").write_text("no picture")
    built = ImageIndex.build(Fake(), [photos], tmp_path / "index", name="a model")
    opened = ImageIndex.open(tmp_path / "index", Fake())
    assert (opened.paths, opened.failed, len(opened)) == (built.paths, built.failed, 14)
    assert opened.search("a dog", 99) == built.search("a dog", 99)
    assert opened.collection.model == "a model"
    assert opened.update().model.encoded == 0  # pyright: ignore


def test_searching_writes_nothing(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "index"
    ImageIndex.build(Fake(), [photos], out)
    (out / ".lock").unlink()
    before = {path: path.stat().st_mtime_ns for path in (out, *out.iterdir())}
    ImageIndex.open(out, Fake()).search("a dog")
    assert {path: path.stat().st_mtime_ns for path in (out, *out.iterdir())} == before


def test_many_small_additions_lie_in_few_segments() -> None:
    collection = Collection("fake")
    draw = torch.Generator().manual_seed(0)
    for number in range(100):
        vectors = torch.randn(1, 2, 8, generator=draw).half()
        collection = collection.plus([(f"/{number % 60}", number, 0)], vectors, torch.zeros(1, 3).byte())
        before = collection.files()
        segments = tidied(collection.segments)
        assert [len(segment) for segment in segments] == sorted((len(s) for s in segments), reverse=True)
        assert len(segments) <= 8  # log2(100) + 1
        collection = Collection("fake", segments=segments, next_serial=collection.next_serial)
        assert collection.files() == before
        assert (np.diff(np.concatenate([segment.serials for segment in segments])) > 0).all()
    assert len(collection.files()) == 60


def test_patches_are_kept_or_not_for_good(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "index"
    ImageIndex.build(Fake(), [photos], out, patches=True)
    paint(photos, {"20.png": (1, 2, 3)})
    assert len(ImageIndex.build(Fake(), [], out)) == 13
    with pytest.raises(ConfigError, match="index: keeps patches, which cannot be changed"):
        ImageIndex.build(Fake(), [photos], out, patches=False)


# -- refused ----------------------------------------------------------------------------------------------------------


def test_another_model_is_refused_with_the_way_out(photos: Path, tmp_path: Path) -> None:
    ImageIndex.build(Fake(), [photos], tmp_path / "index", name="mini")
    for use in (ImageIndex.open, lambda out, model: ImageIndex.build(model, [photos], out)):
        with pytest.raises(DataError, match=r"index: was made by another model \(mini\).*make another index"):
            use(tmp_path / "index", Fake("other"))


def test_a_folder_of_other_things_is_never_touched(photos: Path) -> None:
    before = sorted(photos.iterdir())
    with pytest.raises(DataError, match="photos: holds other things, and no index"):
        ImageIndex.build(Fake(), [photos], photos)
    assert sorted(path for path in photos.iterdir() if path.name != ".lock") == before
    with pytest.raises(DataError, match="photos: is no index"):
        ImageIndex.open(photos, Fake())


def edited(out: Path, **changes: Any) -> None:
    content = json.loads((out / MANIFEST).read_text())
    (out / MANIFEST).write_text(json.dumps(content | changes))


def test_a_damaged_manifest_is_refused_and_another_version_too(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "index"
    ImageIndex.build(Fake(), [photos], out)
    whole = (out / MANIFEST).read_bytes()
    for content in (b"", b"words", whole[:-5], b"[" * 100_000, b"[]", b"\xff"):
        (out / MANIFEST).write_bytes(content)
        with pytest.raises(DataError, match=r"is damaged .*; remove the folder and index again"):
            ImageIndex.open(out, Fake())
    (out / MANIFEST).write_bytes(whole)
    outside = {"name": "../../0123456789abcdef.safetensors", "dead": []}
    for changes in ({"next_serial": "x"}, {"extra": 1}, {"failed": [[1]]}, {"segments": [outside]}):
        (out / MANIFEST).write_bytes(whole)
        edited(out, **changes)
        with pytest.raises(DataError, match="is damaged"):
            ImageIndex.open(out, Fake())
    (out / MANIFEST).write_bytes(whole)
    edited(out, format=99)
    with pytest.raises(DataError, match="has format 99, this version reads 2; remove the folder and index again"):
        ImageIndex.open(out, Fake())


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "words"])
def test_a_damaged_segment_is_named_and_indexing_mends_it(photos: Path, tmp_path: Path, damage: str) -> None:
    out = tmp_path / "index"
    (segment,) = ImageIndex.build(Fake(), [photos], out).collection.segments
    path = out / segment.name
    whole = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes({"empty": b"", "cut": whole[:-9], "words": b"words" * 99}[damage])
    with pytest.raises(DataError, match=rf"{segment.name}: is missing or damaged .*`blip2 index` mends it"):
        ImageIndex.open(out, Fake())
    model = Fake()
    assert len(ImageIndex.build(model, [photos], out)) == 12
    assert model.encoded == 12
    assert len(ImageIndex.open(out, Fake())) == 12


# -- full and read-only disks ------------------------------------------------------------------------------------------


def index_on_a_small_disk(photos: Path, out: Path, said: Queue[str]) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
    update.COMMIT_SECONDS = 0.0
    try:
        ImageIndex.build(Fake(), [photos], out, batch_size=4)
    except DataError as error:
        said.put(str(error))


def test_a_full_disk_keeps_what_was_finished(tmp_path: Path) -> None:
    """A limit on the size of files stands for the end of the disk: a real write is refused by the system."""
    photos, out, said = rainbow(tmp_path / "photos", 40), tmp_path / "index", FORK.SimpleQueue()
    process = FORK.Process(target=index_on_a_small_disk, args=(photos, out, said))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert not said.empty()
    problem = r"index: cannot be written \(.*File too large.*\); what was finished is kept: make room, and run again"
    assert re.search(problem, said.get())
    done = finished(out)
    assert 0 < done < 40
    model = Fake()
    assert len(ImageIndex.build(model, [photos], out)) == 40
    assert model.encoded == 40 - done


def test_a_read_only_disk_is_named(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "index"
    ImageIndex.build(Fake(), [photos], out)
    paint(photos, {"20.png": (1, 2, 3)})

    def refused(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(store, "FileLock", refused)
    with pytest.raises(DataError, match=r"index: cannot be written \(Read-only file system\)"):
        ImageIndex.build(Fake(), [photos], out)
    assert "00.png" in names(ImageIndex.open(out, Fake()).search("a dog", 99))
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot be written"):
        ImageIndex.build(Fake(), [photos], tmp_path / "file" / "index")


def test_stopping_with_ctrl_c_keeps_what_was_encoded(photos: Path, tmp_path: Path) -> None:
    class Stopped(Fake):
        def encode(self, images: Any) -> Any:
            if isinstance(images, torch.Tensor) and self.encoded >= 8:
                raise KeyboardInterrupt
            return super().encode(images)

    with pytest.raises(KeyboardInterrupt):
        ImageIndex.build(Stopped(), [photos], tmp_path / "index", batch_size=4)
    assert finished(tmp_path / "index") == 8
