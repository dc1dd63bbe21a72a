"""`blip2 caption` on one image, on many, and into files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_verbs import run
from typer.testing import CliRunner

from blip2 import bulk
from blip2.blip2 import Blip2
from blip2.cli import app
from blip2.errors import ConfigError

pytestmark = pytest.mark.usefixtures("model", "photos")


def test_one_image_prints_its_caption_alone(model: Blip2):
    assert run("caption", "photo.jpg").stdout == f"{model.caption('photo.jpg')}\n"


def test_several_images_print_beside_their_captions(model: Blip2):
    lines = run("caption", "holiday", "photo.jpg", "--batch-size", "2").stdout.splitlines()
    files = ["holiday/a.jpg", "holiday/b.jpg", "holiday/c.jpg", "photo.jpg"]
    assert lines == [f"{file}\t{model.caption(file)}" for file in files]


def test_several_captions_come_best_first(model: Blip2):
    expected = model.caption("photo.jpg", num_captions=3)
    assert run("caption", "photo.jpg", "--num", "3").stdout.splitlines() == expected
    line = json.loads(run("caption", "photo.jpg", "--num", "3", "--json").stdout)
    assert (line["image"], line["captions"]) == ("photo.jpg", expected)
    whole = model.caption("photo.jpg", num_captions=3, details=True)
    assert line["confidence"] == pytest.approx([text.confidence for text in whole], rel=1e-4)  # one image or a batch
    assert line["match"] == pytest.approx([text.match for text in whole], abs=1e-5)
    alone = json.loads(run("caption", "photo.jpg", "--json").stdout)
    assert set(alone) == {"image", "caption", "confidence", "match"}


def test_a_prompt_reaches_the_model(model: Blip2):
    prompted = model.caption("photo.jpg", prompt="a red", num_beams=1)
    assert prompted != model.caption("photo.jpg", num_beams=1)
    assert run("caption", "photo.jpg", "--prompt", "a red", "--num-beams", "1").stdout == f"{prompted}\n"


def test_details_tell_tokens_and_why_a_caption_ended(model: Blip2):
    line = json.loads(run("caption", "photo.jpg", "--details").stdout)
    whole = model.caption("photo.jpg", details=True)
    assert line["captions"][0]["text"] == whole.text
    assert line["captions"][0]["ids"] == list(whole.ids)
    assert line["captions"][0]["finish"] == whole.finish
    assert line["captions"][0]["confidence"] == pytest.approx(whole.confidence)


def test_the_best_of_several_is_kept_and_nothing_below_the_threshold(model: Blip2):
    best = model.caption("photo.jpg", best_of=6, by="itc")
    assert run("caption", "photo.jpg", "--best-of", "6", "--by", "itc").stdout == f"{best}\n"
    result = run("caption", "holiday", "photo.jpg", "--threshold", "2")
    assert (result.stdout, result.exit_code) == ("", 0)
    assert "photo.jpg: no caption reaches the threshold" in result.stderr
    told = json.loads(run("caption", "photo.jpg", "--threshold", "2", "--json").stdout)
    assert told == {"image": "photo.jpg", "captions": [], "confidence": [], "match": []}
    run("caption", "holiday", "--threshold", "2", "--out", "none.jsonl")
    rows = [json.loads(line) for line in Path("none.jsonl").read_text().splitlines()]
    assert [row["captions"] for row in rows] == [[], [], []]
    assert "0 captioned, 3 were there" in run("caption", "holiday", "--threshold", "2", "--out", "none.jsonl").stderr
    run("caption", "holiday", "--threshold", "2", "--txt")
    assert not list(Path("holiday").glob("*.txt"))


def test_a_stream_ends_up_as_the_greedy_caption(model: Blip2):
    assert run("caption", "photo.jpg", "--stream").stdout.strip() == model.caption("photo.jpg", num_beams=1)


def test_json_lines_are_written_and_a_second_run_adds_only_what_is_new(model: Blip2):
    first = run("caption", "holiday", "--out", "captions.jsonl")
    assert first.stdout == ""
    run("caption", "holiday", "photo.jpg", "--out", "captions.jsonl")
    rows = [json.loads(line) for line in Path("captions.jsonl").read_text().splitlines()]
    assert [row["image"] for row in rows] == ["holiday/a.jpg", "holiday/b.jpg", "holiday/c.jpg", "photo.jpg"]
    assert [row["caption"] for row in rows] == [model.caption(row["image"]) for row in rows]


def test_a_training_set_gets_a_text_beside_each_picture(model: Blip2):
    text = model.caption("holiday/a.jpg")
    run("caption", "holiday", "--txt", "--trigger", "myword", "--prefix", "photo of ")
    assert Path("holiday/a.txt").read_text() == f"myword, photo of {text}\n"
    run("caption", "holiday", "--txt", "--existing", "append")
    assert Path("holiday/a.txt").read_text() == f"myword, photo of {text}\n{text}\n"


@pytest.mark.parametrize("where", [[], ["--json"], ["--out", "captions.jsonl"]])
def test_a_broken_picture_is_named_the_others_are_captioned_and_the_exit_code_is_1(model: Blip2, where: list[str]):
    Path("holiday/b.jpg").write_bytes(b"no picture")
    result = run("caption", "holiday", *where)
    assert result.exit_code == 1
    assert "holiday/b.jpg" in result.stderr
    written = Path("captions.jsonl").read_text() if "--out" in where else result.stdout
    assert model.caption("holiday/a.jpg") in written
    assert model.caption("holiday/c.jpg") in written


def test_an_interrupt_keeps_what_was_finished_and_exits_with_130(monkeypatch: pytest.MonkeyPatch):
    whole = Blip2.caption
    seen: list[int] = []

    def stopped_at_the_second(self: Blip2, *args: object, **options: object) -> object:
        seen.append(1)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return whole(self, *args, **options)

    monkeypatch.setattr(Blip2, "caption", stopped_at_the_second)
    result = CliRunner().invoke(app, ["caption", "holiday", "--out", "captions.jsonl", "--batch-size", "1"])
    assert result.exit_code == 130
    assert [json.loads(line)["image"] for line in Path("captions.jsonl").read_text().splitlines()] == ["holiday/a.jpg"]


def test_options_that_do_not_fit_are_refused_before_the_model_is_loaded(monkeypatch: pytest.MonkeyPatch):
    cases = {
        "--json does not go with": ["--json", "--out", "c.jsonl"],
        "--stream does not go with": ["--stream", "--json"],
        "choose one": ["--txt", "--out", "c.jsonl"],
        "for captions in files": ["--trigger", "word"],
        "one caption of one image": ["--stream", "holiday"],
        "of one image, as it comes": ["--stream", "--best-of", "2"],
        "the folder nowhere does not exist": ["--out", "nowhere/c.jsonl"],
        "holiday: is a folder": ["--out", "holiday"],
        "call it .jsonl": ["--out", "captions.txt"],
    }
    monkeypatch.setattr("blip2.cli.caption.open_model", lambda *_: pytest.fail("the model was loaded"))
    for message, words in cases.items():
        with pytest.raises(ConfigError, match=message):
            run("caption", "photo.jpg", *words)


def test_existing_takes_what_bulk_takes():
    from typing import get_args

    from blip2.cli.caption import Existing

    assert {choice.value for choice in Existing} == set(get_args(bulk.Existing))
