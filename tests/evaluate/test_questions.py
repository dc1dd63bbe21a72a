"""The official files of VQAv2, OK-VQA and GQA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from blip2.errors import DataError
from blip2.evaluate import gqa
from blip2.evaluate import questions as official
from blip2.evaluate.writing import score_answers


def write(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def vqa(tmp_path: Path) -> tuple[Path, Path]:
    (tmp_path / "val2014").mkdir()
    (tmp_path / "val2014" / "COCO_val2014_000000000042.jpg").write_bytes(b"picture")
    questions = {
        "data_subtype": "val2014",
        "questions": [
            {"image_id": 42, "question": "How many dogs?", "question_id": 42000},
            {"image_id": 42, "question": "Is it red?", "question_id": 42001},
        ],
    }
    answers = [
        {
            "question_id": key,
            "image_id": 42,
            "question_type": kind,
            "answer_type": answer_type,
            "answers": [{"answer": answer, "answer_id": number} for number, answer in enumerate(given)],
        }
        for key, kind, answer_type, given in (
            (42000, "how many", "number", ["2"] * 7 + ["two"] * 3),
            (42001, "is it", "yes/no", ["yes"] * 10),
        )
    ]
    return write(tmp_path / "questions.json", questions), write(tmp_path / "answers.json", {"annotations": answers})


def test_vqa_questions_know_their_picture_answers_and_kinds(vqa: tuple[Path, Path]) -> None:
    first, second = official.vqa(*vqa, vqa[0].parent)
    assert (first.id, first.picture, first.text) == (42000, "42", "How many dogs?")
    assert first.image.read() == b"picture"
    assert first.answers == ("2",) * 7 + ("two",) * 3
    assert second.kinds == {"answer type": "yes/no", "question type": "is it"}
    found = score_answers([first, second], ["two", "no"])
    assert found["overall"].accuracy.value == 0.5
    assert found["answer type: number"].accuracy.value == 1.0
    assert found["question type: is it"].accuracy.value == 0.0


def test_ok_vqas_kinds_go_by_their_full_names(vqa: tuple[Path, Path]) -> None:
    content = json.loads(vqa[1].read_text())
    content["question_types"] = {"how many": "Plants and Animals"}
    first, second = official.vqa(vqa[0], write(vqa[1], content), vqa[0].parent)
    assert first.kinds["question type"] == "Plants and Animals"
    assert second.kinds["question type"] == "is it"


def test_a_test_set_keeps_its_answers_back(vqa: tuple[Path, Path]) -> None:
    assert [question.answers for question in official.vqa(vqa[0], None, vqa[0].parent)] == [(), ()]


def test_what_is_no_vqa_file_is_an_error_that_names_it(vqa: tuple[Path, Path]) -> None:
    questions, answers = vqa
    root = questions.parent
    with pytest.raises(DataError, match="not a VQA questions file"):
        official.vqa(answers, None, root)
    with pytest.raises(DataError, match=r"question 42000: the picture .* is not there"):
        official.vqa(questions, answers, root / "elsewhere")
    kept = json.loads(answers.read_text())
    write(answers, {"annotations": kept["annotations"][1:]})
    with pytest.raises(DataError, match="question 42000: has no answers"):
        official.vqa(questions, answers, root)
    write(answers, {"annotations": [{"question_id": 42000, "answers": []}]})
    with pytest.raises(DataError, match="an annotation with"):
        official.vqa(questions, answers, root)
    write(questions, {"questions": [{"question_id": "x"}]})
    with pytest.raises(DataError, match="`question_id`, `image_id` and words"):
        official.vqa(questions, None, root)


def gqa_row(question: str, answer: str, structural: str = "verify", **more: Any) -> dict[str, Any]:
    types = {"structural": structural, "semantic": "attr", "detailed": "x"}
    return {"question": question, "imageId": "7", "answer": answer, "isBalanced": True, "types": types, **more}


@pytest.fixture
def all_gqa(tmp_path: Path) -> list[official.Question]:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "7.jpg").write_bytes(b"picture")
    rows = {
        "1": gqa_row("is it red?", "yes", entailed=["2", "3", "1"], groups={"global": None}),
        "2": gqa_row("what color?", "red", "query", groups={"global": "color"}, isBalanced=False),
        "3": gqa_row("is it blue?", "no"),
        "4": gqa_row("what color is the car?", "red", "query", groups={"global": "color"}),
        "5": gqa_row("what color is the bus?", "blue", "query", groups={"global": "color"}),
    }
    return official.gqa(write(tmp_path / "gqa.json", rows), tmp_path)


def test_gqa_accuracy_counts_balanced_questions_by_type(all_gqa: list[official.Question]) -> None:
    found = score_answers(all_gqa, ["Yes.", "red", "yes", "the red", "red"])
    values = {name: result.accuracy.value for name, result in found.items()}
    assert values == {
        "overall": 0.5,
        "answer type: binary": 0.5,
        "answer type: open": 0.5,
        "structural type: verify": 0.5,
        "structural type: query": 0.5,
        "semantic type: attr": 0.5,
    }


def test_gqa_consistency_is_the_share_of_right_answers_to_what_right_ones_entail(
    all_gqa: list[official.Question],
) -> None:
    keys = [question.key for question in all_gqa]
    found = gqa.consistency(all_gqa, dict(zip(keys, ["yes", "red", "yes", "", ""], strict=True)))
    assert found is not None
    assert found.value == 0.5  # 1 is right and entails 2, right, and 3, wrong
    assert gqa.consistency(all_gqa, dict.fromkeys(keys, "red")) is None  # 1 is wrong
    balanced = [question for question in all_gqa if question.balanced]
    assert gqa.consistency(balanced, dict.fromkeys(keys, "yes")) is None  # 2 is not in the file


def test_gqa_distribution_is_chi_square_within_each_group(all_gqa: list[official.Question]) -> None:
    keys = [question.key for question in all_gqa]
    # One group of two balanced questions, true red and blue; answered red and red: (2 - 1)^2 / 1 + (0 - 1)^2 / 1.
    assert gqa.distribution(all_gqa, dict.fromkeys(keys, "red")) == 2.0
    assert gqa.distribution(all_gqa, {**dict.fromkeys(keys, "red"), "4": "blue"}) == 0.0
    assert gqa.distribution(all_gqa[:1], {"1": "yes"}) is None


def test_what_is_no_gqa_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    for content, message in (([], "not a GQA questions file"), ({"1": {"question": ""}}, "question 1: "), ({}, "no q")):
        with pytest.raises(DataError, match=message):
            official.gqa(write(tmp_path / "gqa.json", content), tmp_path)
    with pytest.raises(DataError, match="no name of a picture within"):
        official.gqa(write(tmp_path / "gqa.json", {"1": gqa_row("?", "x", imageId="../../etc/passwd")}), tmp_path)
