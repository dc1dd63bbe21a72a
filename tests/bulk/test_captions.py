"""Captions on disk: resumed after any death, mended, never half written."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from blip2 import image
from blip2.bulk import Failure, Report, caption_files
from blip2.errors import ConfigError, DataError, ImageError


class Painter:
    """Says the colour of an image; of batches, only how many it saw."""

    transform = image.Transform(2, (0.5,) * 3, (0.5,) * 3)
    device = torch.device("cpu")

    def __init__(self, delay: float = 0.0) -> None:
        self.delay = delay
        self.sizes: list[int] = []

    def caption(self, images: Tensor, num_captions: int = 1, **_: Any) -> list[Any]:
        time.sleep(self.delay)
        self.sizes.append(len(images))
        texts = [f"colour {colour(square)} é" for square in images]
        return texts if num_captions == 1 else [[f"{text} {n}" for n in range(num_captions)] for text in texts]


def colour(square: Tensor) -> tuple[int, ...]:
    return tuple(square[0, 0].tolist())


class Dying(Painter):
    """Stops at its n-th batch, as Ctrl-C would."""

    def __init__(self, batches: int) -> None:
        super().__init__()
        self.batches = batches

    def caption(self, images: Tensor, num_captions: int = 1, **_: Any) -> list[Any]:
        if len(self.sizes) == self.batches:
            raise KeyboardInterrupt
        return super().caption(images, num_captions)


def paint(folder: Path, count: int, broken: Sequence[int] = ()) -> list[Path]:
    """Small pictures, each of its own colour; the broken ones hold text."""
    (folder / "sub").mkdir(parents=True, exist_ok=True)
    paths = [folder / ("sub" if n % 3 == 2 else "") / f"{n:03}.png" for n in range(count)]
    for n, path in enumerate(paths):
        if n in broken:
            path.write_text("no picture")
        else:
            Image.new("RGB", (2, 2), (n, 255 - n, 7)).save(path)
    return paths


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text("utf-8").splitlines()]


def texts(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text("utf-8") for path in folder.rglob("*.txt")}


# -- one run ------------------------------------------------------------------------------------------------------


def test_every_image_gets_a_line_in_order_with_its_path_from_the_file(tmp_path: Path) -> None:
    paint(tmp_path / "photos", 5)
    model, out = Painter(), tmp_path / "captions.jsonl"
    assert caption_files(model, [tmp_path / "photos"], out, batch_size=2) == Report(5, 0, ())
    names = [f"photos/{n}.png" for n in ("000", "001", "003", "004", "sub/002")]
    assert [row["image"] for row in rows(out)] == names
    assert rows(out)[0] == {"image": "photos/000.png", "caption": "colour (0, 255, 7) é"}
    assert model.sizes == [2, 2, 1]


def test_paths_lead_from_the_file_to_the_image_also_through_links(tmp_path: Path) -> None:
    paint(tmp_path / "far" / "photos", 2)
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "er")
    out = tmp_path / "link" / "captions.jsonl"
    caption_files(Painter(), [tmp_path / "far"], out)
    assert all(Image.open(out.parent / row["image"]).size == (2, 2) for row in rows(out))


def test_the_words_before_a_caption_are_trigger_comma_prefix(tmp_path: Path) -> None:
    (path,) = paint(tmp_path, 1)
    for trigger, prefix, expected in (
        ("", "", "colour"),
        ("sks", "", "sks, colour"),
        ("", "photo of ", "photo of colour"),
        ("sks", "a ", "sks, a colour"),
    ):
        caption_files(Painter(), [path], form="txt", existing="overwrite", trigger=trigger, prefix=prefix)
        assert path.with_suffix(".txt").read_text("utf-8").startswith(f"{expected} (")


def test_several_captions_are_a_list_or_a_line_each(tmp_path: Path) -> None:
    (path,) = paint(tmp_path, 1)
    out = tmp_path / "captions.jsonl"
    caption_files(Painter(), [path], out, num_captions=2, prefix="a ")
    assert rows(out) == [{"image": "000.png", "captions": ["a colour (0, 255, 7) é 0", "a colour (0, 255, 7) é 1"]}]
    caption_files(Painter(), [path], form="txt", num_captions=2)
    assert path.with_suffix(".txt").read_text("utf-8").splitlines() == [f"colour (0, 255, 7) é {n}" for n in (0, 1)]


@pytest.mark.parametrize("form", ["jsonl", "txt"])
def test_a_broken_image_is_named_and_does_not_stop_the_others(tmp_path: Path, form: Any) -> None:
    paths = paint(tmp_path / "photos", 6, broken=(1, 4))
    out = tmp_path / "captions.jsonl" if form == "jsonl" else None
    for done, skipped in ((4, 0), (0, 4)):
        report = caption_files(Painter(), [tmp_path / "photos"], out, form=form, batch_size=2)
        assert (report.done, report.skipped) == (done, skipped)
        assert [failure.image for failure in report.failed] == [paths[1], paths[4]]
        assert all(str(failure.image) in failure.error for failure in report.failed)
        if out:
            assert [row["image"][-7:] for row in rows(out)] == [f"00{n}.png" for n in (0, 1, 3, 4, 2, 5)]
            assert [row["image"][-7:] for row in rows(out) if "error" in row] == ["001.png", "004.png"]
        else:
            assert sorted(texts(tmp_path / "photos")) == ["000.txt", "003.txt", "sub/002.txt", "sub/005.txt"]


def test_a_mended_image_loses_its_error_and_gets_its_caption(tmp_path: Path) -> None:
    paths = paint(tmp_path, 3, broken=(0,))
    out = tmp_path / "captions.jsonl"
    caption_files(Painter(), paths, out)
    paint(tmp_path, 3)
    assert caption_files(Painter(), paths, out) == Report(1, 2, ())
    assert sorted((row["image"], "caption" in row) for row in rows(out)) == [
        ("000.png", True), ("001.png", True), ("sub/002.png", True),
    ]  # fmt: skip


def test_of_an_image_that_still_fails_the_last_error_is_kept(tmp_path: Path) -> None:
    paths = paint(tmp_path, 3, broken=(0,))
    out = tmp_path / "captions.jsonl"
    caption_files(Painter(), paths, out)
    paths[0].write_bytes(b"")
    caption_files(Painter(), paths, out)
    errors = [row["error"] for row in rows(out) if "error" in row]
    assert len(rows(out)) == 3
    assert len(errors) == 1
    assert "is empty" in errors[0]


def test_an_image_that_the_model_refuses_fails_alone(tmp_path: Path) -> None:
    class Picky(Painter):
        def caption(self, images: Tensor, num_captions: int = 1, **_: Any) -> list[Any]:
            if any(colour(square) == (1, 254, 7) for square in images):
                raise ImageError("too green")
            return super().caption(images, num_captions)

    paths = paint(tmp_path, 4)
    report = caption_files(Picky(), paths, tmp_path / "captions.jsonl", batch_size=4)
    assert (report.done, report.failed) == (3, (Failure(paths[1], "too green"),))


def test_progress_counts_what_was_there_and_ends_at_all(tmp_path: Path) -> None:
    paths = paint(tmp_path, 5, broken=(3,))
    out = tmp_path / "captions.jsonl"
    caption_files(Painter(), paths[:2], out)
    seen: list[tuple[int, int]] = []
    caption_files(Painter(), paths, out, batch_size=2, progress=lambda *now: seen.append(now))
    assert seen == [(2, 5), (4, 5), (5, 5)]


# -- what is there already ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["jsonl", "txt"])
def test_skip_leaves_overwrite_replaces_and_append_adds(tmp_path: Path, form: Any) -> None:
    paths = paint(tmp_path, 3)
    out = tmp_path / "captions.jsonl" if form == "jsonl" else None

    def captions(path: Path) -> list[str]:
        if out is None:
            return path.with_suffix(".txt").read_text("utf-8").splitlines()
        return [row["caption"] for row in rows(out) if row["image"].endswith(path.name)]

    def run(some: Sequence[Path], prefix: str, existing: Any) -> Report:
        return caption_files(Painter(), some, out, form=form, prefix=prefix, existing=existing)

    run(paths, "1 ", "skip")
    assert run(paths, "2 ", "skip") == Report(0, 3, ())
    assert [text[0] for path in paths for text in captions(path)] == ["1", "1", "1"]
    assert run(paths[1:2], "3 ", "overwrite") == Report(1, 0, ())
    assert [[text[0] for text in captions(path)] for path in paths] == [["1"], ["3"], ["1"]]
    assert run(paths[:2], "4 ", "append") == Report(2, 0, ())
    assert [[text[0] for text in captions(path)] for path in paths] == [["1", "4"], ["3", "4"], ["1"]]


def test_an_empty_text_file_is_no_caption(tmp_path: Path) -> None:
    (path,) = paint(tmp_path, 1)
    path.with_suffix(".txt").touch()
    assert caption_files(Painter(), [path], form="txt").done == 1


def test_text_files_that_would_collide_are_named(tmp_path: Path) -> None:
    (path,) = paint(tmp_path, 1)
    twin = path.with_suffix(".bmp")
    Image.new("RGB", (2, 2)).save(twin)
    disguised = tmp_path / "image.txt"
    shutil.copy(path, disguised)
    for done, skipped in ((1, 0), (0, 1)):
        report = caption_files(Painter(), [path, twin, disguised], form="txt")
        assert (report.done, report.skipped) == (done, skipped)
        assert [failure.image for failure in report.failed] == [twin, disguised]
    assert disguised.read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    "line", ["not json", "[]", "7", '{"caption": "x"}', '{"image": "x.png"}', '{"image": 3, "caption": "x"}']
)
def test_a_file_of_something_else_is_refused_and_left_alone(tmp_path: Path, line: str) -> None:
    (path,) = paint(tmp_path, 1)
    out = tmp_path / "captions.jsonl"
    content = f'{{"image": "y.png", "caption": "y"}}\n{line}\n{{"image": "z.png", "caption": "z"}}\n'
    out.write_text(content)
    for existing in ("skip", "overwrite", "append"):
        with pytest.raises(DataError, match=r"captions\.jsonl: line 2 is no caption"):
            caption_files(Painter(), [path], out, existing=existing)
    assert out.read_text() == content


def test_other_keys_and_other_images_stay_as_they_are(tmp_path: Path) -> None:
    (path,) = paint(tmp_path, 1)
    out = tmp_path / "captions.jsonl"
    mine = '{"image":  "other.png", "caption": "mine", "split": "train"}'
    out.write_text(mine)  # without its last newline, as some editors leave it
    caption_files(Painter(), [path], out, existing="overwrite")
    assert out.read_text("utf-8").splitlines()[0] == mine
    assert len(rows(out)) == 2


# -- deaths -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """A folder with broken images in it, and the file that an undisturbed run writes."""
    root = tmp_path_factory.mktemp("undisturbed")
    paint(root / "photos", 24, broken=(5, 11))
    out = root / "captions.jsonl"
    caption_files(Painter(), [root / "photos"], out, batch_size=3)
    return root / "photos", out.read_bytes()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_file_cut_at_any_byte_resumes_to_the_undisturbed_one(
    undisturbed: tuple[Path, bytes], data: st.DataObject
) -> None:
    photos, expected = undisturbed
    out = photos.parent / "cut.jsonl"
    out.write_bytes(expected[: data.draw(st.integers(0, len(expected)))] + data.draw(st.sampled_from([b"", b"\0" * 9])))
    caption_files(Painter(), [photos], out, batch_size=data.draw(st.integers(1, 30)))
    assert out.read_bytes() == expected


def test_ctrl_c_keeps_every_finished_batch(undisturbed: tuple[Path, bytes]) -> None:
    photos, expected = undisturbed
    out = photos.parent / "stopped.jsonl"
    for finished in (2, 3, 0, 1):
        before = len(rows(out)) if out.exists() else 0
        with pytest.raises(KeyboardInterrupt):
            caption_files(Dying(finished), [photos], out, batch_size=2)
        after = rows(out) if out.exists() else []
        assert before <= len(after) <= before + 2 * finished
        assert expected.startswith(out.read_bytes())
    caption_files(Painter(), [photos], out, batch_size=2)
    assert out.read_bytes() == expected


@pytest.mark.parametrize("form", ["jsonl", "txt"])
def test_killed_at_random_moments_it_resumes_to_the_undisturbed_output(
    undisturbed: tuple[Path, bytes], form: Any, tmp_path: Path
) -> None:
    source, expected = undisturbed
    photos = tmp_path / "photos"
    shutil.copytree(source, photos)
    out = tmp_path / "captions.jsonl" if form == "jsonl" else None
    fork, moments, killed = multiprocessing.get_context("fork"), random.Random(3), 0

    def work() -> None:
        caption_files(Painter(0.01), [photos], out, form=form, batch_size=2)

    for attempt in range(100):
        process = fork.Process(target=work)
        process.start()
        process.join(moments.uniform(0, 0.02 * (attempt + 1)))  # in the end any machine gets through
        if process.exitcode is None:
            process.kill()
            killed += 1
        process.join()
        assert process.exitcode in (0, -9)
        if process.exitcode == 0:
            break
    assert killed >= 3
    if out:
        # errors carry the path, which differs between the two folders
        assert out.read_bytes().replace(str(photos).encode(), str(source).encode()) == expected
    else:
        lines = [json.loads(line) for line in expected.decode().splitlines()]
        assert texts(photos) == {
            Path(row["image"]).relative_to("photos").with_suffix(".txt").as_posix(): row["caption"] + "\n"
            for row in lines if "caption" in row
        }  # fmt: skip


def test_a_full_disk_is_named_and_what_was_finished_is_kept(
    undisturbed: tuple[Path, bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    photos, expected = undisturbed
    out, real, calls = photos.parent / "full.jsonl", os.fsync, iter(range(100))

    def full(descriptor: int) -> None:
        if next(calls) >= 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match=r"full\.jsonl: cannot be written \(No space left.*run again"):
        caption_files(Painter(), [photos], out, batch_size=2)
    (path,) = paint(tmp_path, 1)
    with pytest.raises(DataError, match=r"000\.txt: cannot be written"):
        caption_files(Painter(), [path], form="txt")
    assert [entry.name for entry in tmp_path.rglob("*") if entry.is_file()] == ["000.png"]
    monkeypatch.undo()
    caption_files(Painter(), [photos], out)
    assert out.read_bytes() == expected


def test_two_runs_never_write_to_one_file(tmp_path: Path) -> None:
    paths = paint(tmp_path, 2)
    out = tmp_path / "captions.jsonl"

    class Nested(Painter):
        def caption(self, images: Tensor, num_captions: int = 1, **_: Any) -> list[Any]:
            with pytest.raises(DataError, match="another run is writing"):
                caption_files(Painter(), paths, out)
            return super().caption(images, num_captions)

    assert caption_files(Nested(), paths, out).done == 2
    assert caption_files(Painter(), paths, out).skipped == 2


# -- arguments ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arguments", "problem"), [
    ({}, "jsonl needs a file"),
    ({"form": "txt", "out": "x.txt"}, "takes no file"),
    ({"form": "csv", "out": "x.csv"}, "form is 'csv'"),
    ({"out": "x.jsonl", "existing": "ask"}, "existing is 'ask'"),
    ({"out": "x.jsonl", "batch_size": 0}, "batch_size is 0"),
    ({"out": "x.jsonl", "details": True}, "details does not go with files"),
    ({"out": "x.jsonl", "stream": True}, "stream does not go with files"),
])  # fmt: skip
def test_arguments_that_do_not_fit_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], problem: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=problem):
        caption_files(Painter(), paint(tmp_path, 1), **arguments)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent.* does not exist"):
        caption_files(Painter(), paint(tmp_path, 1), tmp_path / "absent" / "captions.jsonl")
