"""`blip2 evaluate`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from blip2.blip2 import Blip2
from blip2.cli import evaluate


@pytest.fixture
def command(model: Blip2, monkeypatch: pytest.MonkeyPatch) -> CliRunner:
    monkeypatch.setattr(evaluate, "open_model", lambda _name, _device, _dtype, _quantize: model)
    return CliRunner()


@pytest.fixture
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("out") / "run"


def test_retrieval_prints_a_table_and_writes_what_it_measured(command: CliRunner, folder: Path, out: Path) -> None:
    page = out.with_name("page.html")
    words = ["retrieval", str(folder), "--rerank", "2", "--limit", "3", "--out", str(out), "--report", str(page)]
    done = command.invoke(evaluate.app, words)
    assert done.exit_code == 0, done.output
    assert "text to image R@10 (ITM)" in done.stdout
    found = json.loads((out / "numbers.json").read_text())
    assert (found["images"], found["data"], found["top"]) == (3, str(folder), 2)
    assert set(found["numbers"]["image to text R@5 (ITC)"]) == {"value", "low", "high"}
    rows = json.loads((out / "predictions.json").read_text())
    assert [row["image"] for row in rows if "image" in row] == ["blue", "green", "red"]
    assert "captions that find their picture last" in page.read_text()
    again = command.invoke(evaluate.app, [*words, "--itm-weight", "0.5"])
    assert "a run with weight 1.0, this one has 0.5" in str(again.exception)


def test_captions_are_scored_written_and_shown(command: CliRunner, folder: Path, out: Path) -> None:
    page = out.with_name("page.html")
    words = ["caption", str(folder), "--no-java", "--num-beams", "3", "--out", str(out), "--report", str(page)]
    done = command.invoke(evaluate.app, words)
    assert done.exit_code == 0, done.output
    assert "CIDEr" in done.stdout
    assert {"image_id": "blue", "caption": "a blue square"} in json.loads((out / "predictions.json").read_text())
    found = json.loads((out / "numbers.json").read_text())
    assert (found["protocol"], found["num_beams"], found["tokenizer"]) == ("own", 3, "our own")
    assert "the worst" in page.read_text()
    chosen = [*words[:3], "--best-of", "4", "--by", "itc", "--out", str(out.with_name("best"))]
    assert command.invoke(evaluate.app, chosen).exit_code == 0
    found = json.loads((out.with_name("best") / "numbers.json").read_text())
    assert (found["best_of"], found["by"]) == (4, "itc")
    journal = (out / "journal.jsonl").read_bytes()
    assert command.invoke(evaluate.app, words).exit_code == 0
    assert (out / "journal.jsonl").read_bytes() == journal


def test_captions_that_are_kept_back_give_predictions_as_coco_and_nocaps_take_them(
    command: CliRunner, folder: Path, out: Path
) -> None:
    images = [{"id": number, "file_name": f"{name}.png"} for number, name in enumerate(("red", "green"))]
    (folder / "test.json").write_text(json.dumps({"images": images}))
    words = ["caption", str(folder / "test.json"), "--protocol", "paper"]
    assert "neither captions nor questions" in str(command.invoke(evaluate.app, words).exception)
    done = command.invoke(evaluate.app, [*words, "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "kept back" in done.stderr
    some = {"images": images, "annotations": [{"image_id": 0, "caption": "a red square"}]}
    (folder / "some.json").write_text(json.dumps(some))
    mixed = command.invoke(evaluate.app, ["caption", str(folder / "some.json"), "--out", str(out)])
    assert "'1' has no caption to compare with, though others have" in str(mixed.exception)
    rows = json.loads((out / "predictions.json").read_text())
    assert rows == [{"image_id": 0, "caption": "a red square"}, {"image_id": 1, "caption": "a green square"}]


def test_an_unreadable_picture_is_told_scored_as_empty_and_ends_with_1(
    command: CliRunner, folder: Path, out: Path
) -> None:
    (folder / "red.png").write_bytes(b"no picture")
    done = command.invoke(evaluate.app, ["caption", str(folder), "--no-java", "--out", str(out)])
    assert done.exit_code == 1
    assert "red.png" in done.stderr
    assert "1 pictures could not be read" in done.stderr
    assert {"image_id": "red", "caption": ""} in json.loads((out / "predictions.json").read_text())


def test_own_questions_are_answered_beside_their_floor(command: CliRunner, folder: Path, out: Path) -> None:
    questions = folder / "questions.jsonl"
    questions.write_text(json.dumps({"id": "red", "questions": [["what color?", "red"]]}))
    done = command.invoke(evaluate.app, ["vqa", str(folder), "--questions", str(questions), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert 'always "red"' in done.stdout
    assert json.loads((out / "predictions.json").read_text()) == [{"question_id": "red#0", "answer": "red"}]
    found = json.loads((out / "numbers.json").read_text())
    assert found["numbers"]["overall"]["value"] == 1.0
    assert found["lowest"]["overall"] == {"accuracy": 1.0, "answer": "red"}


def test_the_official_files_of_vqa_and_gqa_give_the_official_results(
    command: CliRunner, folder: Path, out: Path
) -> None:
    Image.new("RGB", (8, 8), (0, 250, 0)).save(folder / "COCO_val2014_000000000042.jpg")
    asked = [{"image_id": 42, "question": "what color?", "question_id": 1}]
    (folder / "q.json").write_text(json.dumps({"data_subtype": "val2014", "questions": asked}))
    answers = [{"answer": "green", "answer_id": number} for number in range(10)]
    truth = [{"question_id": 1, "answers": answers, "answer_type": "other", "question_type": "what color"}]
    (folder / "a.json").write_text(json.dumps({"annotations": truth}))
    page = out.with_name("page.html")
    words = ["vqa", str(folder / "q.json"), "--annotations", str(folder / "a.json"), "--report", str(page)]
    done = command.invoke(evaluate.app, [*words, "--out", str(out / "vqa")])
    assert done.exit_code == 0, done.output
    assert "answer type: other" in done.stdout
    assert "question type" not in done.stdout
    assert "question type: what color" in json.loads((out / "vqa" / "numbers.json").read_text())["numbers"]
    assert json.loads((out / "vqa" / "predictions.json").read_text()) == [{"question_id": 1, "answer": "green"}]
    assert "what color?" in page.read_text()

    types = {"structural": "query", "semantic": "attr"}
    row = {"question": "what color?", "imageId": "7", "answer": "green", "types": types, "groups": {"global": "color"}}
    (folder / "gqa.json").write_text(json.dumps({"077": row}))
    Image.new("RGB", (8, 8), (0, 250, 0)).save(folder / "7.jpg")
    done = command.invoke(evaluate.app, ["gqa", str(folder / "gqa.json"), "--out", str(out / "gqa")])
    assert done.exit_code == 0, done.output
    assert "distribution (0 is best)" in done.stdout
    assert json.loads((out / "gqa" / "predictions.json").read_text()) == [{"questionId": "077", "prediction": "green"}]


def test_what_does_not_go_together_is_said_before_a_model_is_loaded(
    command: CliRunner, folder: Path, out: Path
) -> None:
    (out.parent / "000000000001.jpg").touch()
    asked = [{"image_id": 1, "question": "what?", "question_id": 1}]
    official = out.parent / "q.json"
    official.write_text(json.dumps({"questions": asked}))
    for words, message in (
        (["vqa", str(official)], "kept back: give --out FOLDER"),
        (["vqa", str(official), "--split", "val"], "are for data of your own"),
        (["vqa", str(folder), "--annotations", "a.json"], "--annotations goes with"),
        (["vqa", str(folder)], "has no questions"),
        (["caption", str(folder), "--report", str(folder / "none" / "x.html")], "does not exist"),
    ):
        assert message in str(command.invoke(evaluate.app, words).exception)
