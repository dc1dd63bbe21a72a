"""The floors and the judging of `examples/mini`, on made-up vectors and a made-up WordNet."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "mini"))

import baselines
import measuring
from baselines import Line, Pairs, best_penalty, best_sentence, cross_validated, unit
from naming import Naming
from wordnet import WordNet

import evaluate as mini_evaluate
import tiny_model
from blip2.data.sources import ImageRef, Sample
from blip2.errors import DataError
from blip2.evaluate import Estimate, Written

SYNSETS = (
    "dog", "toy", "cherry", "snow", "cutting_board", "board", "metal", "apple", "man", "people", "grass", "picture",
    "photograph", "pair", "shoe", "shoes", "red", "black", "white", "building", "brick", "school_bus", "bus", "school",
    "polar_bear", "bear", "close-up", "truck", "fire", "engine", "train", "run", "play", "bike", "airplane plane",
    "fire_truck fire_engine", "car automobile", "lion", "sea_lion",
)  # fmt: skip
VERBS = {"run": 268, "play": 246, "train": 37, "board": 2, "build": 139, "ride": 88, "stand": 308, "cut": 99}
NOUNS = {"run": 29, "play": 61, "train": 25, "board": 60}


KIND_OF = {
    "polar_bear": "bear", "school_bus": "bus", "cutting_board": "board", "fire_truck fire_engine": "truck"
}  # fmt: skip


@pytest.fixture(scope="module")
def naming(tmp_path_factory: pytest.TempPathFactory) -> Naming:
    """A WordNet of one file each, in which a synset is named by where its line starts."""
    root = tmp_path_factory.mktemp("wordnet")
    width = 120
    offsets = {synset: place * (width + 1) for place, synset in enumerate(SYNSETS)}
    senses: dict[str, list[int]] = {}
    data: list[str] = []
    for synset, offset in offsets.items():
        words = synset.split()
        above = f"001 @ {offsets[KIND_OF[synset]]:08d} n 0000" if synset in KIND_OF else "000"
        line = f"{offset:08d} 06 n {len(words):02x} {' '.join(f'{word} 0' for word in words)} {above} | gloss"
        data.append(line.ljust(width) + "\n")
        for word in words:
            senses.setdefault(word, []).append(offset)
    lines = [f"{w} n {len(o)} 0 {len(o)} 0 {' '.join(f'{x:08d}' for x in o)}" for w, o in sorted(senses.items())]
    (root / "data.noun").write_text("".join(data))
    (root / "index.noun").write_text("  the licence\n" + "\n".join(lines) + "\n")
    (root / "noun.exc").write_text("men man\n")
    counts = [f"{w}%2:38:00:: 1 {n}" for w, n in VERBS.items()] + [f"{w}%1:06:00:: 1 {n}" for w, n in NOUNS.items()]
    (root / "cntlist.rev").write_text("\n".join(counts) + "\n")
    return Naming(WordNet(root))


@pytest.mark.parametrize(
    ("text", "nouns"),
    [
        ("a dog runs in the snow", ("dog",)),
        ("two dogs play in the grass", ("dog",)),
        ("a dog running", ("dog",)),
        ("men ride bikes", ("man",)),
        ("a toy train on a track", ("train",)),
        ("a brick building", ("building",)),
        ("a metal cutting board", ("board", "cutting board")),
        ("A black and white dog.", ("dog",)),
        ("a picture of two cherries", ("cherry",)),
        ("a close up of a polar bear", ("bear", "polar bear")),
        ("there is a school bus parked", ("bus", "school bus")),
        ("a sea lion on a rock", ("sea lion",)),
        ("a pair of shoes", ("shoe",)),
        ("people standing by a car", ("people",)),
        ("with a red apple", ("apple",)),
        ("running", ()),
        ("", ()),
    ],
)
def test_the_head_noun_is_the_last_of_the_first_noun_phrase(naming: Naming, text: str, nouns: tuple[str, ...]) -> None:
    assert naming.head_nouns(text) == nouns


@pytest.mark.parametrize(
    ("caption", "thing", "same"),
    [
        ("a plane in the sky", "airplane", True),
        ("two automobiles", "car", True),
        ("a fire engine", "fire truck", True),
        ("an engine", "fire truck", False),
        ("a polar bear", "bear", True),
        ("a sea lion", "lion", False),
        ("a dog next to a cherry", "cherry", False),
        ("", "dog", False),
    ],
)
def test_a_caption_names_a_thing_by_its_head_noun_or_a_synonym(
    naming: Naming, caption: str, thing: str, same: bool
) -> None:
    assert naming.same_thing(caption, thing) is same


def linear_pairs(random: np.random.Generator, count: int, noise: float) -> Pairs:
    """Texts that are a fixed linear map of their images; two texts an image."""
    images = unit(random.normal(size=(count, 12)))
    texts = images @ np.random.default_rng(7).normal(size=(12, 6))
    both = np.concatenate([texts, texts]) + noise * random.normal(size=(2 * count, 6))
    return Pairs(images, both, np.concatenate([np.eye(count, dtype=bool)] * 2, axis=1))


def test_a_straight_line_finds_what_is_linear() -> None:
    random = np.random.default_rng(0)
    train, test = linear_pairs(random, 200, 0.01), linear_pairs(random, 50, 0.01)
    found = test.recall(Line.fit(train.images, train.targets, 0.01))
    assert found.text_to_image[1].value > 0.9
    assert found.image_to_text[1].value > 0.9


def test_the_penalty_is_the_one_that_ranks_the_validation_set_best() -> None:
    random = np.random.default_rng(1)
    train, val = linear_pairs(random, 14, 0.8), linear_pairs(random, 60, 0.8)
    quality = {p: val.quality(Line.fit(train.images, train.targets, p)) for p in baselines.PENALTIES}
    assert quality[best_penalty(train, val)] == max(quality.values()) > min(quality.values())


def test_folds_of_concepts_are_measured_by_lines_that_never_saw_them(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = linear_pairs(np.random.default_rng(2), 20, 0.1)
    folds, plain = np.arange(20) // 2 % 5, np.arange(20) % 2 == 0
    fitted: list[int] = []
    measured: list[int] = []
    fit, quality = Line.fit, Pairs.quality

    def counting_fit(images: Any, texts: Any, penalty: float) -> Line:
        fitted.append(len(images))
        return fit(images, texts, penalty)

    def counting_quality(self: Pairs, line: Line) -> float:
        measured.append(len(self.images))
        return quality(self, line)

    monkeypatch.setattr(Line, "fit", counting_fit)
    monkeypatch.setattr(Pairs, "quality", counting_quality)
    penalty, value = cross_validated(pairs, folds, plain, [linear_pairs(np.random.default_rng(3), 7, 0.1)])
    assert set(fitted) == {16 + 7}
    assert set(measured) == {2}
    assert penalty in baselines.PENALTIES
    assert 0 <= value <= 1


def test_only_some_pictures_keep_only_their_texts() -> None:
    pairs = linear_pairs(np.random.default_rng(4), 5, 0.0)
    part = pairs.only(np.array([True, False, False, True, False]))
    assert part.texts.shape == (4, 6)
    np.testing.assert_allclose(part.targets, pairs.targets[[0, 3]])


def test_the_best_sentence_is_the_one_that_most_references_share() -> None:
    pytest.importorskip("pycocoevalcap")
    references = [["a dog runs in the snow", "a dog in the snow"], ["a dog runs on grass"], ["two men ride bikes"]]
    candidates = ["a cat sleeps", "a dog runs in the snow", "two men", "people"]
    assert best_sentence(candidates, references) == "a dog runs in the snow"


@pytest.fixture
def made(tmp_path: Path) -> Path:
    rows = [{"id": "a", "questions": [["what is it?", "a dog"], ["is it red?", "no"]], "kinds": ["what", "yes/no"]}]
    for split in ("train", "test"):
        (tmp_path / f"questions-{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_a_question_knows_its_kind_and_must_have_only_one(made: Path) -> None:
    data = measuring.Data(made, made)
    assert data.kind("is it red?", "no") == "yes/no"
    (made / "questions-test.jsonl").write_text(
        json.dumps({"id": "b", "questions": [["what is it?", "red"]], "kinds": ["color"]}) + "\n"
    )
    with pytest.raises(DataError, match="of two kinds: color and what"):
        measuring.Data(made, made).kind("is it red?", "no")


def test_numbers_are_written_as_a_table_and_as_json(tmp_path: Path) -> None:
    numbers: measuring.Numbers = {"test": {"R@1": Estimate(0.25, 0.2, 0.3), "floor": 0.125}, "other": {"x": 1.0}}
    measuring.write(tmp_path / "deep" / "found", numbers, ["run.py", "--fast"], 1.26, model="mini")
    assert (tmp_path / "deep" / "found.md").read_text().splitlines()[2:] == [
        "| test | R@1 | 0.250 (0.200 to 0.300) |",
        "|  | floor | 0.125 |",
        "| other | x | 1.000 |",
    ]
    report: dict[str, Any] = json.loads((tmp_path / "deep" / "found.json").read_text())
    assert report["numbers"]["test"]["R@1"] == {"value": 0.25, "low": 0.2, "high": 0.3}
    assert (report["command"], report["seconds"], report["model"]) == ("run.py --fast", 1.3, "mini")


def test_stamps_are_told_by_their_names_bare_in_templates_and_by_matching(
    monkeypatch: pytest.MonkeyPatch, made: Path, tmp_path: Path
) -> None:
    samples: list[Sample] = []
    for number in range(6):
        path = tmp_path / f"{number}.png"
        Image.fromarray(tiny_model.picture(number)).save(path)
        samples.append(Sample(f"{number}", ImageRef(path), ("a dog",)))
    names = {sample.id: ("dog", "cat", "beach")[number % 3] for number, sample in enumerate(samples)}
    monkeypatch.setattr(measuring.Data, "stamps", lambda _self, _name: samples)
    monkeypatch.setattr(measuring.Data, "things", lambda _self, _name: names)
    model = tiny_model.build(language=False)
    numbers, _ = mini_evaluate.measure(model, measuring.Data(made, made), ["classes"], tmp_path)
    assert list(numbers) == ["unseen stamps, 3 names", "held-out stamps, 3 names"]
    found = numbers["unseen stamps, 3 names"]
    right = [
        model.classify(str(each.image), ["beach", "cat", "dog"], templates=["{}"]) == names[each.id] for each in samples
    ]
    assert value(found["bare, ITC, top-1"]) == pytest.approx(sum(right) / 6)
    assert value(found["bare, ITM, top-5"]) == 1
    gained = value(found["templates, ITC, top-1"]) - value(found["bare, ITC, top-1"])
    assert value(found["templates beyond bare, ITC, top-1"]) == pytest.approx(gained)


def value(number: Estimate | float) -> float:
    return number.value if isinstance(number, Estimate) else number


def test_sections_can_be_chosen_and_keep_what_was_written(
    naming: Naming, monkeypatch: pytest.MonkeyPatch, made: Path
) -> None:
    samples = [type("Stamp", (), {"id": key})() for key in ("plane", "dog")]
    monkeypatch.setattr(measuring.Data, "stamps", lambda _self, _name: samples)
    monkeypatch.setattr(measuring.Data, "things", lambda _self, _name: {"plane": "airplane", "dog": "dog"})
    monkeypatch.setattr(
        mini_evaluate, "write_captions", lambda *_args, **_options: [Written("a plane flying"), Written("a red car")]
    )
    model: Any = None
    numbers, texts = mini_evaluate.measure(model, measuring.Data(made, made), ["named"], naming.wordnet.root)
    assert list(numbers) == ["held-out stamps, captions"]
    assert numbers["held-out stamps, captions"]["named"] == Estimate(0.5, 0.0, 1.0)
    assert [row["right"] for row in texts["named"]] == [True, False]
