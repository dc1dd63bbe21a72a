"""The page of an evaluation."""

from __future__ import annotations

from pathlib import Path

import pytest

from blip2.blip2 import Blip2
from blip2.data import sources
from blip2.errors import DataError
from blip2.evaluate import protocols, report
from blip2.evaluate.estimate import Estimate
from blip2.evaluate.questions import Question
from blip2.evaluate.run import rank_pictures
from blip2.evaluate.writing import Written

NUMBERS = {"CIDEr": Estimate(0.5, 0.4, 0.6), "distribution": 1.25}


def test_a_page_stands_alone_and_every_text_in_it_is_only_text(folder: Path, tmp_path: Path) -> None:
    samples = sources.read(folder)
    evil = '"><script>alert(1)</script>'
    written = [Written(evil), Written("a green square"), Written("", error=evil), Written("a white square")]
    page = tmp_path / "out.html"
    report.write(page, evil, NUMBERS, {"command": evil}, report.of_captions(samples, written, java=False))
    html = page.read_text()
    assert "<script" not in html
    assert html.count("&lt;script&gt;") == 5  # twice in the title, in the command, in a caption, in an error
    assert html.count("data:image/jpeg;base64,") == 4
    assert "http" not in html
    assert "0.4000 to 0.6000" in html
    assert "<td>1.2500</td><td></td>" in html


def test_the_worst_and_the_best_are_told_apart_and_none_comes_twice(folder: Path) -> None:
    images = {sample.id: sample.image for sample in sources.read(folder)}
    names = ("red", "green", "blue", "white")
    questions = [Question(name, name, name, images[name], "what color?", (name,)) for name in names]
    written = [Written("red", -2), Written("red", -1), Written("red", -3), Written("white", -1)]
    found = report.of_answers(questions, written)
    assert [case.name for case in found["the worst"]] == ["green", "blue"]  # wrong, and surest of it
    assert [case.name for case in found["the best"]] == ["white", "red"]
    assert ("true", "green") in found["the worst"][0].lines


def test_retrieval_shows_who_was_not_found(model: Blip2, folder: Path) -> None:
    samples = sources.read(folder)
    found = rank_pictures(model, samples, protocols.Ranking("own"))
    lost, seen = report.of_ranking(samples, found).values()
    places = [int(dict(case.lines)["its picture stands"].split()[0]) for case in lost]
    assert places == sorted(places, reverse=True)
    assert len(seen) == len(samples)


def test_a_picture_that_is_gone_is_said_and_a_folder_that_is_not_there_too(folder: Path, tmp_path: Path) -> None:
    samples = sources.read(folder)
    (folder / "red.png").unlink()
    cases = report.of_captions(samples, [Written("a")] * 4, java=False)
    report.write(tmp_path / "out.html", "x", NUMBERS, {}, cases)
    assert "red.png" in (tmp_path / "out.html").read_text()
    with pytest.raises(DataError, match="cannot be written"):
        report.write(tmp_path / "none" / "out.html", "x", NUMBERS, {}, cases)
