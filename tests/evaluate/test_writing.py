"""Captions and answers for a whole set: in order, kept, scored; a picture that cannot be read takes none with it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from blip2.blip2 import Blip2
from blip2.data import sources
from blip2.data.sources import ImageRef, Sample
from blip2.evaluate.protocols import Writing
from blip2.evaluate.questions import Question, of_samples
from blip2.evaluate.writing import (
    evaluate_answers,
    score_answers,
    score_captions,
    vqa_kind,
    write_answers,
    write_captions,
)

NAMES = ("white", "red", "green", "blue")


@pytest.fixture
def asked(folder: Path) -> list[Question]:
    questions = folder / "questions.jsonl"
    rows = [{"id": name, "questions": [["What color is it?", name], ["is it square?", "yes"]]} for name in NAMES]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return of_samples(sources.read(folder, questions=questions), vqa_kind)


def test_answers_are_asked_in_the_order_of_samples_whatever_the_batch(model: Blip2, asked: list[Question]) -> None:
    for batch_size in (1, 3, 100):
        found, given = evaluate_answers(model, asked, batch_size=batch_size)
        assert [answer.text for answer in given] == [question.picture for question in asked]
        assert found["other"].accuracy.value == 1.0
        assert (found["yes/no"].accuracy.value, found["yes/no"].floor) == (0.0, 1.0)
        assert found["overall"].accuracy.value == 0.5


def test_a_protocol_asks_with_its_own_prompt_words_and_options(model: Blip2, asked: list[Question]) -> None:
    seen: list[tuple[str, str, dict[str, Any]]] = []

    class Listening(type(model)):
        def ask(self, images: Any, questions: Any, **options: Any) -> Any:
            seen.append((self.config.prompts.question, questions[0], options))
            return super().ask(images, questions, **options)

    values = {field.name: getattr(model, field.name) for field in dataclasses.fields(model)}
    how = Writing("paper", "Question: {} Short answer:", {"length_penalty": -1.0}, published=True)
    write_answers(Listening(**values), asked[:1], how)
    assert seen == [("Question: {} Short answer:", "what color is it?", {"details": True, "length_penalty": -1.0})]
    write_answers(Listening(**values), asked[:1])
    assert seen[-1] == (model.config.prompts.question, "What color is it?", {"details": True})


def test_a_picture_that_cannot_be_read_has_an_empty_text_and_says_why(model: Blip2, folder: Path) -> None:
    (folder / "green.png").write_bytes(b"no picture")
    written = write_captions(model, sources.read(folder), batch_size=3)
    assert [found.text for found in written] == ["a blue square", "", "a red square", "a white square"]
    assert "green.png" in written[1].error
    assert not written[0].error


def test_nocaps_domains_are_scored_apart_and_together() -> None:
    image = ImageRef(Path("x.jpg"))
    samples = [
        Sample("1", image, ("a dog runs in the snow",), domain="in-domain"),
        Sample("2", image, ("a red hat on a table",), domain="out-domain"),
    ]
    found = score_captions(samples, ["a dog runs in the snow", "a cat"], java=False)
    assert found["in-domain BLEU-4"].value == pytest.approx(1.0)
    assert found["out-domain BLEU-4"].value < found["BLEU-4"].value < 1
    alone = score_captions([dataclasses.replace(samples[1], domain="")], ["a cat"], java=False)
    assert found["out-domain CIDEr"] == alone["CIDEr"]


def test_only_balanced_questions_count_and_every_kind_has_its_row() -> None:
    image = ImageRef(Path("x.jpg"))

    def question(key: str, answer: str, kind: str, balanced: bool = True) -> Question:
        return Question(key, key, "p" + key, image, "?", (answer,), {"answer type": kind}, balanced)

    questions = [question("1", "yes", "binary"), question("2", "red", "open"), question("3", "blue", "open", False)]
    found = score_answers(questions, ["yes", "green", "blue"])
    assert {name: result.accuracy.value for name, result in found.items()} == {
        "overall": 0.5,
        "answer type: binary": 1.0,
        "answer type: open": 0.0,
    }
