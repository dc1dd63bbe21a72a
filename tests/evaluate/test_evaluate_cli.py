"""`blip2 evaluate`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from blip2.blip2 import Blip2
from blip2.cli import evaluate
from blip2.evaluate import run
from blip2.evaluate.estimate import Estimate


@pytest.fixture
def command(model: Blip2, monkeypatch: pytest.MonkeyPatch) -> CliRunner:
    monkeypatch.setattr(evaluate, "open_model", lambda _name, _device, _dtype, _quantize: model)
    return CliRunner()


def test_the_command_prints_a_table_and_writes_what_it_measured(
    command: CliRunner, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    out = tmp_path_factory.mktemp("out") / "found.json"
    done = command.invoke(evaluate.app, ["retrieval", str(folder), "--rerank", "2", "--limit", "3", "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "text to image R@10 (ITM)" in done.stdout
    report = json.loads(out.read_text())
    assert report["images"] == 3
    assert report["data"] == str(folder)
    assert set(report["numbers"]["image to text R@5 (ITC)"]) == {"value", "low", "high"}
    assert report["seconds"] >= 0


def test_captions_and_answers_write_every_text(
    command: CliRunner, folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path_factory.mktemp("out")
    monkeypatch.setattr(run, "captions", lambda _written, _references: {"CIDEr": Estimate(0.5, 0.4, 0.6)})
    questions = folder / "questions.jsonl"
    questions.write_text(json.dumps({"id": "red", "questions": [["what color?", "red"]]}))
    done = command.invoke(evaluate.app, ["captions", str(folder), "--out", str(out / "captions.json")])
    assert done.exit_code == 0, done.output
    written = json.loads((out / "captions.json").read_text())["captions"]
    assert {"id": "blue", "caption": "a blue square"} in written
    done = command.invoke(
        evaluate.app, ["answers", str(folder), "--questions", str(questions), "--out", str(out / "answers.json")]
    )
    assert done.exit_code == 0, done.output
    assert 'always "red"' in done.stdout
    answered = json.loads((out / "answers.json").read_text())["answers"]
    assert answered == [{"id": "red", "question": "what color?", "answer": "red", "given": "red"}]
