"""The measurement behind docs/explain.md, with a tiny model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import tiny_model
from benchmarks import explaining
from blip2.protocols import Places

MAPS = [f"{what}, {kind}" for what in ("caption", "match", "word") for kind in ("attention", "evidence")]


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(explaining, "load", lambda _: tiny_model.build())
    monkeypatch.setattr(sys, "argv", ["explaining", *words])
    explaining.main()


def test_the_command_measures_every_map_over_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    with (tmp_path / "pictures.jsonl").open("w") as file:
        for number in range(3):
            Image.fromarray(tiny_model.picture(number)).save(tmp_path / f"{number}.png")
            file.write(json.dumps({"image": f"{number}.png", "captions": ["a dog runs", "a red cat"]}) + "\n")
    run(monkeypatch, str(tmp_path / "pictures.jsonl"), "--limit", "2")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows] == MAPS
    assert {row[2] for row in rows} == {"2"}
    assert all(-1 <= float(row[1].split()[0]) <= 1 for row in rows)


def test_nothing_to_measure_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    Image.fromarray(tiny_model.picture(0)).save(tmp_path / "0.png")
    questions = [["is it a dog ?", "yes"]]
    (tmp_path / "pictures.jsonl").write_text(json.dumps({"image": "0.png", "questions": questions}) + "\n")
    for words, message in (([], "no pictures with captions"), (["--limit", "0"], "one picture at least")):
        with pytest.raises(SystemExit):
            run(monkeypatch, str(tmp_path / "pictures.jsonl"), *words)
        assert message in capsys.readouterr().err


def test_one_cell_at_a_time_is_covered_with_the_mean_colour():
    square = torch.arange(8 * 8 * 3, dtype=torch.uint8).view(8, 8, 3)
    found = explaining.covered(square, Places(2, 4, 0, ()))
    assert found.shape == (9, 8, 8, 3)
    assert torch.equal(found[0], square)
    mean = square.float().mean((0, 1)).round().to(torch.uint8)
    changed = (found[6] != square).any(-1)
    assert changed[4:, 2:4].all()
    assert changed.sum() == 8
    assert (found[6][4:, 2:4] == mean).all()


def test_equal_values_share_their_ranks():
    rising = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert explaining.rank_correlation(rising, rising.exp()) == pytest.approx(1)
    assert explaining.rank_correlation(rising, -rising) == pytest.approx(-1)
    zeros_first, zeros_last = torch.tensor([0.0, 0, 0, 1]), torch.tensor([1.0, 0, 0, 0])
    assert explaining.rank_correlation(zeros_first, rising) == pytest.approx(3 / 15**0.5)
    assert explaining.rank_correlation(zeros_last, rising) == -explaining.rank_correlation(zeros_first, rising)
    assert explaining.rank_correlation(torch.ones(4), rising) == 0
