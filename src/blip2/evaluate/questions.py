"""Questions to be answered and scored: the official files of VQAv2, OK-VQA and GQA, and samples of one's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from blip2.data import official
from blip2.data.sources import ImageRef, Prototype, Sample
from blip2.errors import DataError

Place = Callable[[str, Sequence[str]], Path]  # of a picture: where it is named, and the names that it may have


@dataclass(frozen=True)
class Question:
    """One question about one picture.

    Attributes:
        key: unlike every other's in the set.
        id: as the official results name it.
        picture: the picture's id.
        answers: the true ones: one, or one an annotator; empty where they are kept back.
        kinds: what it is measured apart by, such as {"answer type": "yes/no"}.
        balanced: whether it counts towards accuracy; GQA has others, which only judge consistency.
        entailed: keys of the questions whose answers follow from this one's (GQA).
        group: of questions whose answers should be distributed alike (GQA), empty for none.
    """

    key: str
    id: int | str
    picture: str
    image: ImageRef | Prototype
    text: str
    answers: tuple[str, ...]
    kinds: Mapping[str, str] = field(default_factory=dict[str, str])
    balanced: bool = True
    entailed: tuple[str, ...] = ()
    group: str = ""


def of_samples(samples: Sequence[Sample], kind: Callable[[str, str], str]) -> list[Question]:
    """The questions of one's own data, in the order of samples and their questions.

    Args:
        kind: of a question and its true answer.
    """
    return [
        Question(
            f"{sample.id}#{number}", f"{sample.id}#{number}", sample.id, sample.image, text, (answer,),
            {"kind": kind(text, answer)},
        )
        for sample in samples
        for number, (text, answer) in enumerate(sample.questions)
    ]  # fmt: skip


def vqa(questions: Path, annotations: Path | None, images: Path) -> list[Question]:
    """VQAv2's or OK-VQA's questions, in the order of the file.

    Args:
        annotations: the file of the true answers; None for a test set that keeps them back.
        images: the folder of the pictures, or one above it: `COCO_val2014_000000000042.jpg` or `000000000042.jpg`.
    Raises:
        DataError: not such a file, a question without its picture, text or answers, an id twice.
    """
    data = _table(questions, "questions")
    truth = {} if annotations is None else _truth(annotations)
    subset = str(data.get("data_subtype", "")).replace("test-dev", "test")
    folders = [images / name for name in dict.fromkeys((subset, f"images/{subset}", *official.FOLDERS))]
    found: dict[str, Question] = {}
    for row in data["questions"]:
        match row:
            case {"question_id": int() as key, "image_id": int() as picture, "question": str() as text} if text.strip():
                place = f"{questions}: question {key}"
                if str(key) in found:
                    raise DataError(f"{place}: comes twice")
                if annotations is not None and key not in truth:
                    raise DataError(f"{place}: has no answers in {annotations}; are they of the same split?")
                answers, kinds = truth.get(key, ((), {}))
                names = [f"COCO_{subset}_{picture:012d}.jpg", f"{picture:012d}.jpg"]
                image = ImageRef(official.picture(place, folders, names))
                found[str(key)] = Question(str(key), key, str(picture), image, text.strip(), answers, kinds)
            case _:
                raise DataError(
                    f"{questions}: a question with `question_id`, `image_id` and words is expected: {row!r}"
                )
    return _some(questions, found)


def _truth(path: Path) -> dict[int, tuple[tuple[str, ...], dict[str, str]]]:
    """Answers and kinds of each question."""
    data = _table(path, "annotations")
    names = data.get("question_types")  # OK-VQA's categories, by their short names
    found: dict[int, tuple[tuple[str, ...], dict[str, str]]] = {}
    for row in data["annotations"]:
        match row:
            case {"question_id": int() as key, "answers": [_, *_] as answers} if all(
                isinstance(answer, dict) and isinstance(answer.get("answer"), str) for answer in answers
            ):
                kinds = {"answer type": row.get("answer_type"), "question type": row.get("question_type")}
                if isinstance(names, dict):
                    kinds["question type"] = names.get(kinds["question type"], kinds["question type"])
                texts = tuple(cast("str", answer["answer"]) for answer in answers)
                found[key] = (texts, {name: str(kind) for name, kind in kinds.items() if kind})
            case _:
                raise DataError(f"{path}: an annotation with `question_id` and `answers` is expected: {str(row)[:200]}")
    return found


def gqa(questions: Path, images: Path) -> list[Question]:
    """GQA's questions, in the order of the file.

    Args:
        images: the folder of the pictures, or one above it: `2354786.jpg`.
    Raises:
        DataError: not such a file, or a question without its picture or words.
    """
    data = official.read_json(questions)
    if not isinstance(data, dict):
        raise DataError(f"{questions}: not a GQA questions file: an object of questions by their id is expected")
    folders = [images / name for name in official.FOLDERS]
    found: dict[str, Question] = {}
    for key, row in cast("dict[str, Any]", data).items():
        match row:
            case {"question": str() as text, "imageId": str() | int() as picture} if text.strip():
                place = f"{questions}: question {key}"
                image = ImageRef(official.picture(place, folders, [f"{picture}.jpg"]))
                found[key] = Question(
                    key, key, str(picture), image, text.strip(), _gqa_answer(row), _gqa_kinds(row),
                    bool(row.get("isBalanced", True)), tuple(map(str, row.get("entailed") or ())), _gqa_group(row),
                )  # fmt: skip
            case _:
                raise DataError(f"{questions}: question {key}: `question` and `imageId` are expected: {str(row)[:200]}")
    return _some(questions, found)


def _gqa_answer(row: Mapping[str, Any]) -> tuple[str, ...]:
    answer = row.get("answer")
    return (answer,) if isinstance(answer, str) else ()


def _gqa_kinds(row: Mapping[str, Any]) -> dict[str, str]:
    """What the official evaluation parts accuracy by; a question that is no query has few answers (`binary`)."""
    types = row.get("types")
    match types:
        case {"structural": str() as structural, "semantic": str() as semantic}:
            kind = "open" if structural == "query" else "binary"
            return {"answer type": kind, "structural type": structural, "semantic type": semantic}
        case _:
            return {}


def _gqa_group(row: Mapping[str, Any]) -> str:
    match row.get("groups"):
        case {"global": str() as group}:
            return group
        case _:
            return ""


def _table(path: Path, name: str) -> dict[str, Any]:
    data = official.read_json(path)
    if not isinstance(data, dict) or not isinstance(data.get(name), list):
        raise DataError(f"{path}: not a VQA {name} file: an object with a list {name!r} is expected")
    return cast("dict[str, Any]", data)


def _some(path: Path, found: Mapping[str, Question]) -> list[Question]:
    if not found:
        raise DataError(f"{path}: no questions found")
    return list(found.values())
