"""The measurements behind docs/troubleshooting.md, with a tiny model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from PIL import Image

import tiny_model
from benchmarks import remedies
from blip2.data.sources import ImageRef, Sample
from blip2.evaluate import Estimate


@pytest.fixture(autouse=True)
def _no_java(monkeypatch: pytest.MonkeyPatch) -> None:
    """CIDEr has its own tests; here it would start Java a dozen times."""
    made = {"CIDEr": Estimate(1.0, 0.9, 1.1)}
    monkeypatch.setattr(remedies.evaluate, "captions", lambda written, _: made if written else {})


def test_words_for_one_object_are_one_and_plurals_too():
    assert remedies.named("two boys play with puppies and a dog") == remedies.named("a woman and her dogs")
    assert not remedies.named("a blue sky")
    assert len(remedies.named("a man on a bicycle near the beaches")) == 3


def test_pictures_are_taken_evenly_and_none_twice():
    assert remedies.evenly([0, 1, 2, 3, 4, 5], 3) == [0, 2, 4]
    assert remedies.evenly([0, 1], 100) == [0, 1]


def test_a_caption_is_made_up_where_no_reference_names_its_object():
    sample = Sample("s", ImageRef(Path("s.jpg")), ("a dog runs", "a puppy on grass"))
    found = remedies.judged("way", ["a dog with a frisbee", "the puppy runs"], [sample, sample])
    assert found["made up"] == 0.5
    assert found["pictures"] == 2


def test_the_command_measures_every_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    asked = [["is it a dog ?", "yes"], ["what color is it ?", "red"], ["how many dog ?", "two"]]
    with (tmp_path / "pictures.jsonl").open("w") as file:
        for number in range(3):
            Image.fromarray(tiny_model.picture(number)).save(tmp_path / f"{number}.png")
            row = {"image": f"{number}.png", "captions": ["a dog runs", "a red cat"], "questions": asked}
            file.write(json.dumps(row) + "\n")
    monkeypatch.setattr(remedies, "load", lambda _: tiny_model.build())
    monkeypatch.setattr(remedies, "CAPTIONS", {"greedy": {"num_beams": 1}})
    words = ["remedies", str(tmp_path / "pictures.jsonl"), "--json", str(tmp_path / "out.json")]
    monkeypatch.setattr(sys, "argv", [*words, "--only", "captions", "objects", "answers"])
    remedies.main()
    found = json.loads((tmp_path / "out.json").read_text())
    assert [row["way"] for row in found["captions"]] == ["greedy"]
    assert len(found["objects"]) == 20
    assert {row["kind"] for row in found["answers"]} == {"yes/no", "color", "how many"}
    assert all(0 <= row["accuracy"] <= 1 for row in found["answers"])
    assert "| yes/no | `choices=`, three phrasings |" in capsys.readouterr().out
