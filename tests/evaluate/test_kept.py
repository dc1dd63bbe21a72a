"""What a run has found so far: kept through kills, given to the same run only."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from blip2.errors import DataError
from blip2.evaluate.kept import Kept, Row, keeping

ABOUT = {"task": "caption", "model": "mini"}


def double(batch: Sequence[int]) -> list[Row]:
    return [{"text": str(2 * item), "with": len(batch)} for item in batch]


def quiet(_done: int, _total: int) -> None:
    pass


def test_what_is_kept_is_not_done_again_and_a_batch_holds_the_same_items_always(tmp_path: Path) -> None:
    with keeping(tmp_path / "run", ABOUT) as kept:
        kept.complete([1, 2], str, double, 2, quiet)
        kept.complete([5], str, double, 2, quiet)
    seen: list[list[int]] = []

    def work(batch: Sequence[int]) -> list[Row]:
        seen.append(list(batch))
        return double(batch)

    with keeping(tmp_path / "run", ABOUT) as kept:
        rows = kept.complete([1, 2, 3, 4, 5, 6], str, work, 2, quiet)
    assert seen == [[3, 4], [5, 6]]
    assert [row["text"] for row in rows] == ["2", "4", "6", "8", "10", "12"]
    assert rows[4]["with"] == 1  # as it was, though its batch was done anew for 6


def test_a_line_that_was_cut_short_is_done_again_and_a_damaged_one_is_an_error(tmp_path: Path) -> None:
    with keeping(tmp_path, ABOUT) as kept:
        kept.complete([1, 2, 3], str, double, 1, quiet)
    journal = tmp_path / "journal.jsonl"
    whole = journal.read_bytes()
    journal.write_bytes(whole[:-5])
    with keeping(tmp_path, ABOUT) as kept:
        assert set(kept.rows) == {"1", "2"}
        kept.complete([1, 2, 3], str, double, 1, quiet)
    assert journal.read_bytes() == whole
    journal.write_bytes(b"{]\n" + whole)
    with pytest.raises(DataError, match="line 1 is damaged"), keeping(tmp_path, ABOUT):
        pass


def test_another_run_is_refused_the_folder_and_told_what_differs(tmp_path: Path) -> None:
    with keeping(tmp_path, ABOUT), pytest.raises(DataError, match="another run is writing"), keeping(tmp_path, ABOUT):
        pass
    other = {**ABOUT, "model": "other"}
    with pytest.raises(DataError, match="a run with model 'mini', this one has 'other'"), keeping(tmp_path, other):
        pass
    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "thesis.txt").write_text("do not touch")
    with pytest.raises(DataError, match="holds other files"), keeping(strange, ABOUT):
        pass


def test_arrays_are_made_once_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    made: list[int] = []

    def make() -> np.ndarray:
        made.append(1)
        return np.arange(3, dtype=np.float32)

    for _ in range(2):
        with keeping(tmp_path, ABOUT) as kept:
            np.testing.assert_array_equal(kept.block("a", make), make()[:3])
    assert len(made) == 3  # once for the block, twice for the comparison
    (tmp_path / "blocks" / "a.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(DataError, match=r"a\.npy: is damaged"), keeping(tmp_path, ABOUT) as kept:
        kept.block("a", make)


def test_without_a_folder_nothing_is_written() -> None:
    kept = Kept()
    assert [row["text"] for row in kept.complete([1, 2], str, double, 1, quiet)] == ["2", "4"]


RUN = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from conftest import namer
from blip2.cli import evaluate
model = namer()
class Slow(type(model)):
    def caption(self, *args, **options):
        time.sleep(0.05)
        return super().caption(*args, **options)
evaluate.open_model = lambda *_args: Slow(*(getattr(model, name) for name in model.__dataclass_fields__))
evaluate.app(["caption", {data!r}, "--no-java", "--batch-size", "1", "--out", {out!r}], standalone_mode=False)
"""


def test_a_run_that_is_killed_goes_on_to_what_an_undisturbed_one_finds(folder: Path, tmp_path: Path) -> None:
    for number in range(20):
        (folder / f"more{number}.png").write_bytes(
            (folder / ("red", "blue")[number % 2]).with_suffix(".png").read_bytes()
        )
        (folder / f"more{number}.txt").write_text(f"a thing number {number}\n")

    def start(out: Path) -> subprocess.Popen[bytes]:
        code = RUN.format(tests=str(Path(__file__).parent), data=str(folder), out=str(out))
        return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, env=dict(os.environ))

    whole, killed = tmp_path / "out-whole", tmp_path / "out-killed"
    assert start(whole).wait(120) == 0
    process = start(killed)
    journal = killed / "journal.jsonl"
    deadline = time.monotonic() + 100
    while not journal.exists() or journal.read_bytes().count(b"\n") < 5:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "predictions.json").exists()
    written = journal.read_bytes().count(b"\n")
    assert 5 <= written < 24
    assert start(killed).wait(120) == 0
    assert (killed / "predictions.json").read_bytes() == (whole / "predictions.json").read_bytes()
    numbers = [json.loads((out / "numbers.json").read_text())["numbers"] for out in (whole, killed)]
    assert numbers[0] == numbers[1]
    assert journal.read_bytes().count(b"\n") == 24
