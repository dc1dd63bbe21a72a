"""The benchmark against transformers, run at a tiny size; its tables, and the page that holds them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import measure, performance, tables  # noqa: E402

RATES = {"bandwidth": 1e9, "operations": {"float32": 1e9, "bfloat16": 2e9, "int8": 4e9}}


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs the benchmark in this process, its sides in theirs; gives its exit code and results."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(performance.machine, "measure", lambda _: performance.machine.Rates(**RATES))

    def run(*words: str) -> tuple[int, dict[str, Any]]:
        monkeypatch.setattr(sys, "argv", ["performance", str(tmp_path), "--tiny", "--quick", "--threads", "1", *words])
        with pytest.raises(SystemExit) as ended:
            performance.main()
        return int(ended.value.code or 0), json.loads((tmp_path / "results.json").read_text())

    return run


def test_both_sides_give_the_same_tokens_and_a_second_run_measures_nothing(command, capsys, monkeypatch):
    words = ("--rows", "beams,questions,memory", "--precisions", "float32")
    code, results = command(*words)
    shown = capsys.readouterr().out
    assert code == 0, shown
    assert "all 20 tokens as transformers" in shown
    ours, theirs = (results["runs"][f"opt2.7b {side} float32"] for side in ("ours", "theirs"))
    assert ours["beams"]["tokens"] == theirs["beams"]["tokens"]
    assert [len(row) for row in ours["beams"]["tokens"]] == [measure.TOKENS]
    assert ours["questions"]["tokens"][:2] == theirs["questions"]["tokens"]
    assert [len(row) for row in ours["questions"]["tokens"]] == [measure.ANSWER_TOKENS] * measure.QUESTIONS
    assert ours["beams"]["limit"] > 0
    assert ours["memory"]["resident"] > ours["memory"]["anonymous"] > 0
    monkeypatch.setattr(measure, "results", lambda *_: pytest.fail("measured again"))
    assert command(*words)[1]["runs"] == results["runs"]


def test_matching_gives_the_same_probabilities(command, capsys):
    code, results = command("--rows", "match", "--precisions", "float32")
    assert code == 0, capsys.readouterr().out
    ours, theirs = (results["runs"][f"itm-vit-g {side} float32"]["match"]["scores"] for side in ("ours", "theirs"))
    assert (len(ours), len(ours[0]), len(theirs)) == (measure.IMAGES, measure.TEXTS, 8)
    assert [row[at] for at, row in enumerate(ours)] == pytest.approx(theirs, abs=tables.SCORES)


def test_a_side_that_fails_is_an_error_in_the_table_and_the_others_go_on(command, capsys, monkeypatch):
    monkeypatch.setitem(measure.OURS, "float32", {})
    monkeypatch.setattr(performance, "SIDES", [("theirs", "float64x"), ("ours", "float32")])
    monkeypatch.setattr(tables, "PEERS", ("float64x",))
    _, results = command("--rows", "t5", "--precisions", "float32,float64x")
    assert "float64x" in results["runs"]["flan-t5-xl theirs float64x"]["t5"]["error"]
    assert results["runs"]["flan-t5-xl ours float32"]["t5"]["seconds"]
    assert "| failed |" in capsys.readouterr().out


def results(**tokens: list[int]) -> dict[str, Any]:
    """Two runs of one row, with these tokens."""
    timed = {"parts": 1, "whole": 1}
    return {
        "runs": {
            "opt2.7b theirs float32": {"caption": {"seconds": [8.0, 6.0, 9.0], "tokens": [tokens["theirs"]], **timed}},
            "opt2.7b theirs bfloat16": {"caption": {"seconds": [4.0], "tokens": [tokens["theirs"]], **timed}},
            "opt2.7b ours float32": {"caption": {"seconds": [2.0], "tokens": [tokens["ours"]], "limit": 0.5, **timed}},
        }
    }


def test_a_line_says_how_many_times_as_fast_and_how_far_from_the_limit():
    *_, line = tables.lines(results(ours=[1, 2, 3], theirs=[1, 2, 3]))
    assert (line.seconds, line.ratio, line.fastest, line.asked, line.limit) == (2.0, 4.0, 2.0, 1.15, 0.5)
    assert line.same == "all 3 tokens as transformers"
    assert not line.wrong


def test_other_tokens_in_float32_are_a_failure():
    *_, line = tables.lines(results(ours=[1, 2, 3], theirs=[1, 5, 3]))
    assert line.wrong
    assert line.same == "2 of 3 tokens as transformers"


def test_a_part_that_was_timed_is_scaled_and_says_so():
    found = results(ours=[1], theirs=[1])
    found["runs"]["opt2.7b theirs float32"]["caption"] |= {"parts": 2, "whole": 10}
    line = tables.lines(found)[0]
    assert line.seconds == 40.0
    assert line.note == "timed 2 of 10"


def test_rows_and_photos_that_are_not_there_are_refused(capsys, monkeypatch, tmp_path: Path):
    for words, said in ((["--rows", "captoin"], "captoin"), (["--rows", "mini"], "--photos")):
        monkeypatch.setattr(sys, "argv", ["performance", str(tmp_path), *words])
        with pytest.raises(SystemExit):
            performance.main()
        assert said in capsys.readouterr().err


def test_the_readme_says_what_was_measured():
    shown = {
        "one caption, greedy": "caption",
        "one caption, five beams": "beams",
        "ten questions about one image": "questions",
        "8 images matched with 32 texts (ViT-g)": "match",
        "an answer of Flan-T5-xl, five beams": "t5",
        "200 pictures captioned by mini": "mini",
    }
    measured = json.loads((ROOT / "docs" / "performance.json").read_text())
    ratios = {(line.row, line.precision): line.ratio for line in tables.lines(measured) if line.side == "ours"}
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for what, row in shown.items():
        found = [ratios.get((row, precision)) for precision in ("float32", "int8")]
        cells = ["" if ratio is None else f" {ratio:.0f}" if ratio > 9.95 else f" {ratio:.1f}" for ratio in found]
        assert f"\n| {what} |{' |'.join(cells)} |\n" in readme


def test_the_page_and_its_drawing_are_those_of_the_numbers(tmp_path: Path):
    page, drawn = ROOT / "docs" / "performance.md", ROOT / "docs" / "performance.svg"
    copy = tmp_path / "performance.md"
    copy.write_text(page.read_text())
    command = [sys.executable, "-m", "benchmarks.tables", str(ROOT / "docs" / "performance.json"), str(copy)]
    subprocess.run(command, cwd=ROOT, check=True)
    assert copy.read_text() == page.read_text(), (
        "run `python -m benchmarks.tables docs/performance.json docs/performance.md`"
    )
    assert copy.with_suffix(".svg").read_text() == drawn.read_text()
    assert set(re.findall(r"<!-- table: (\w+) -->", page.read_text())) == set(tables.TABLES)


@pytest.mark.slow  # both sides load mini, one of them in transformers
def test_the_row_of_mini_says_what_plain_transformers_says(tmp_path: Path):
    """`mini` itself, two pictures: one job a side."""
    photos = tuple(str(ROOT / "docs" / name) for name in ("palace.jpg", "cat.jpg"))
    texts: list[list[str]] = []
    for side, module in (("ours", "ours"), ("theirs", "plain_mini")):
        job = measure.Job("mini", side, "float32", ("mini",), str(tmp_path), 1, photos=photos)
        found = {each.get("row", "error"): each for each in measure.results(f"benchmarks.{module}", job)}
        assert "error" not in found, found["error"]
        texts.append(found["mini"]["texts"])
    assert texts[0] == texts[1]
    assert len(set(texts[0])) == 2
