"""What a run has found so far: kept through kills, given to the same run only."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

import tiny_model
from blip2.cli.measured import Measurement
from blip2.config import CaptionConfig
from blip2.errors import DataError
from blip2.evaluate.kept import Kept, Row, identity, keeping
from blip2.packed import PackedLinear, pack_layers, packs

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


def test_a_part_that_was_exchanged_is_another_model() -> None:
    """The models say the same of themselves; one value in a part differs, and nothing that a feature comes from."""
    model = tiny_model.build()
    own = identity(model)
    assert identity(tiny_model.build()) == own
    for name in ("language", "encoder", "bridge"):
        other = tiny_model.build()
        with torch.no_grad():
            next(iter(getattr(other, name).parameters())).flatten()[0].add_(1)
        assert identity(other) != own, name
    assert model.tokenizer is not None
    assert identity(dataclasses.replace(model, tokenizer=dataclasses.replace(model.tokenizer, bos=5))) != own
    config = model.config.replace(captions=CaptionConfig(length_penalty=0.5))
    assert identity(dataclasses.replace(model, config=config)) != own


def test_packed_weights_are_the_same_model() -> None:
    """What the CPU reads its products from has another layout and the same values."""
    layer = torch.nn.Sequential(torch.nn.Linear(256, 256)).requires_grad_(False)  # large enough to be packed
    model = dataclasses.replace(tiny_model.build(), language=cast(Any, layer))
    own = identity(model)
    pack_layers(layer)
    assert isinstance(layer[0], PackedLinear)
    layer[0].pack()
    assert identity(model) == own
    assert layer[0].is_packed == packs(torch.zeros(256, 256))


def test_a_resumed_command_refuses_another_language_model(tmp_path: Path) -> None:
    one, other = tiny_model.build(), tiny_model.build()
    with torch.no_grad():
        cast("torch.nn.Module", other.language).get_parameter("model.lm_head.weight").mul_(2)
    run = Measurement("caption", tmp_path / "run", None, {"data": "d", "model": "m", "quantize": None})
    with run.with_model(one, ["a"]).kept():
        pass
    with run.with_model(tiny_model.build(), ["a"]).kept():
        pass
    with pytest.raises(DataError, match="holds a run with identity"), run.with_model(other, ["a"]).kept():
        pass
