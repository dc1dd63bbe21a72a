"""`blip2 filter`: texts below a threshold leave, with the reason; what is judged is judged once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from blip2 import choosing, filtering
from blip2.blip2 import Blip2
from blip2.cli import app
from blip2.data import sources
from blip2.errors import ConfigError, DataError

pytestmark = pytest.mark.usefixtures("model", "photos")
TEXTS = {"a": ["a red dog", "the beach"], "b": ["what is this"], "c": ["a cat runs", "how many", "yes"]}


@pytest.fixture(autouse=True)
def texts(photos: Path) -> None:
    for name, lines in TEXTS.items():
        (photos / "holiday" / f"{name}.txt").write_text("\n".join(lines))


def run(*words: str) -> Result:
    result = CliRunner().invoke(app, ["filter", "holiday", "--out", "out", *words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path("out", name).read_text().splitlines()]


def worths(model: Blip2, by: str) -> dict[tuple[str, str], float]:
    return {
        (name, text): getattr(model.match(f"holiday/{name}.jpg", text), by).item()
        for name, lines in TEXTS.items()
        for text in lines
    }


@pytest.mark.parametrize("by", ["itm", "itc"])
def test_what_reaches_the_threshold_stays_and_the_rest_has_a_reason(model: Blip2, by: str):
    all_of_it = worths(model, by)
    middle = (sorted(all_of_it.values())[2] + sorted(all_of_it.values())[3]) / 2
    result = run("--by", by, "--threshold", f"{middle}")
    assert result.exit_code == 0
    assert "3 texts kept, 3 dropped, 0 pictures could not be read" in result.stderr
    kept = {
        (row["id"], text): worth
        for row in rows("kept.jsonl")
        for text, worth in zip(row["captions"], row[by], strict=True)
    }
    assert kept == pytest.approx({pair: worth for pair, worth in all_of_it.items() if worth >= middle}, abs=1e-5)
    dropped = {(row["id"], row["caption"]): row["reason"] for row in rows("dropped.jsonl")}
    assert dropped.keys() == all_of_it.keys() - kept.keys()
    assert all(reason.startswith(f"{by} ") and "is below" in reason for reason in dropped.values())
    again = sources.read("out/kept.jsonl")  # what is kept can be trained on
    assert sum(len(sample.captions) for sample in again) == 3
    assert all(Path(str(sample.image)).samefile(f"holiday/{sample.id}.jpg") for sample in again)


def test_another_threshold_takes_no_second_look_and_a_stopped_run_goes_on(monkeypatch: pytest.MonkeyPatch):
    calls: list[int] = []
    whole = choosing.fits

    def counted(*words: Any) -> Any:
        if len(calls) == 1 and not Path("again").exists():
            raise KeyboardInterrupt
        calls.append(len(words[2]))
        return whole(*words)

    monkeypatch.setattr(filtering, "fits", counted)
    words = ("--threshold", "0", "--batch-size", "1")
    assert CliRunner().invoke(app, ["filter", "holiday", "--out", "out", *words]).exit_code == 130
    Path("again").touch()
    run(*words)
    assert calls == [2, 1, 3]
    assert (len(rows("kept.jsonl")), rows("dropped.jsonl")) == (3, [])
    run("--threshold", "1", "--batch-size", "1")
    assert calls == [2, 1, 3]
    assert rows("kept.jsonl") == []


def test_a_picture_that_cannot_be_read_is_dropped_with_its_texts():
    Path("holiday/a.jpg").write_bytes(b"no picture")
    result = run("--threshold", "0")
    assert result.exit_code == 1
    assert "4 texts kept, 2 dropped, 1 pictures could not be read" in result.stderr
    (dropped,) = rows("dropped.jsonl")
    assert (dropped["id"], dropped["captions"]) == ("a", TEXTS["a"])
    assert "a.jpg" in dropped["reason"]


def test_what_cannot_be_filtered_is_said_before_a_model_is_loaded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("blip2.cli.filter.open_model", lambda *_: pytest.fail("the model was loaded"))
    for words, error, message in (
        (["--threshold", "1.5"], ConfigError, "by itm it is a number from 0 to 1, not 1.5"),
        (["--threshold", "-2", "--by", "itc"], ConfigError, "by itc it is a number from -1 to 1"),
        (["--threshold", "0.5", "--format", "table"], DataError, "holiday"),
    ):
        with pytest.raises(error, match=message):
            run(*words)
    Path("classes.jsonl").write_text(json.dumps({"class": 0, "names": ["tench"]}))
    samples = sources.read("classes.jsonl", "classes")
    with pytest.raises(DataError, match="only pictures with texts can be filtered"):
        filtering.check_texts(samples)
