"""`blip2 bench`: a table for people, numbers for programs, a drawing for both."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

import blip2
import tiny_model
from blip2.bench import machine
from blip2.blip2 import Blip2
from blip2.cli import app


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is measured in no time."""
    monkeypatch.setattr(machine, "READ", 2**20)
    for name in ("ROWS", "INPUTS", "OUTPUTS"):
        monkeypatch.setattr(machine, name, 64)


@pytest.mark.usefixtures("model")
def test_every_row_is_shown_written_and_drawn(photos: Path):
    words = ["bench", "--images", "holiday", "--json", "speed.json", "--plot", "speed.svg"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    for what in ("one caption, 20 tokens, greedy", "5 beams", "10 questions", "match 3 images", "batches of 2"):
        assert what in done.stdout
    found = json.loads((photos / "speed.json").read_text())
    assert found["precision"] == "float32"
    assert {"bandwidth", "operations"} == set(found["rates"])
    for row in found["rows"]:
        assert all(seconds > 0 for seconds in row["seconds"])
        assert row["count"] > 0
    greedy = found["rows"][0]
    assert (greedy["count"], greedy["unit"]) == (20, "tokens")
    assert greedy["limit"] > 0
    assert greedy["bandwidth"] > 0
    folders = [row for row in found["rows"] if row["what"].startswith("captions of a folder")]
    assert [row["count"] for row in folders] == [3, 3]  # batches of 4 would not be full
    drawn = ElementTree.parse(photos / "speed.svg").getroot()
    assert "measured" in {each.text for each in drawn.iter("{http://www.w3.org/2000/svg}text")}


def test_a_model_that_only_matches_is_measured_at_that(monkeypatch: pytest.MonkeyPatch, photos: Path):
    only = dataclasses.replace(tiny_model.build(language=False), identity="tiny")
    monkeypatch.setattr(blip2, "load", lambda *_, **__: only)
    done = CliRunner().invoke(app, ["bench", "--images", str(photos / "holiday")])
    assert done.exit_code == 0, done.output
    assert "match 3 images with 32 texts" in done.stdout
    assert "caption" not in done.stdout


def test_a_place_that_cannot_be_written_is_refused_before_the_work(monkeypatch: pytest.MonkeyPatch, model: Blip2):
    del model
    monkeypatch.setattr(blip2, "load", lambda *_, **__: pytest.fail("loaded"))
    done = CliRunner().invoke(app, ["bench", "--json", "no/such/place.json"])
    assert isinstance(done.exception, blip2.ConfigError)
    assert "no/such" in str(done.exception)
