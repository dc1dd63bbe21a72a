"""The three fine-tunings of the paper on tiny parts: captions after a prompt, questions, retrieval."""

import json
from pathlib import Path

import fine
import pytest
import tiny
import torch
import transformers
from tiny import run

import blip2
import published
from blip2.errors import ConfigError
from blip2.weights import load


def asked(root: Path, count: int) -> dict[str, str]:
    """Pictures of two shapes' worth of words, with a question each whose answer is in the picture: colour or shape."""
    table = tiny.draw_shapes(root, count, seed=0)
    lines: list[str] = []
    for row in table.read_text().splitlines()[1:]:
        name, caption = row.split(",")
        words = caption.removeprefix("a ").removeprefix("small ").split()
        pairs = [["the circle", words[0]], ["the top", words[1]]]  # questions in the words that there are
        lines.append(json.dumps({"id": name, "questions": pairs}) + "\n")
    (root / "questions.jsonl").write_text("".join(lines))
    return {"path": str(table), "questions": str(root / "questions.jsonl")}


def test_questions_to_the_qformer_are_learned_from_and_the_model_remembers_it(tmp_path: Path):
    data = [asked(tmp_path / "pictures", 96)]
    common = {"stage": 2, "steps": 40, "lr": 1e-2, "questions": 1.0, "texts": 2, "batch_size": 16}
    aware = {"model": tiny.model() | {"question_aware": True}}
    held_out = {"validate": {"data": data, "every": 20, "limit": 16}}
    report = run(data, tmp_path / "aware", **common, **aware, **held_out)
    assert report.last["lm"] < report.first["lm"] - 1
    assert "lm of questions" in dict(report.validations)[40]
    assert load(report.model).config.question_aware
    blind = run(data, tmp_path / "blind", **common)
    assert not load(blind.model).config.question_aware
    words = "qformer.words.weight"
    began = run(data, tmp_path / "began", **(common | {"steps": 1, "lr": 1e-30, "min_lr": 0}))
    before, after = (load(each.model).bridge.state_dict() for each in (began, report))
    assert not torch.equal(before[words], after[words]), "the text side learns to ask"
    assert torch.equal(before[words], load(blind.model).bridge.state_dict()[words]), (
        "where it is asked nothing it stays"
    )


def test_questions_longer_than_the_qformer_reads_are_refused(tmp_path: Path):
    data = [asked(tmp_path / "pictures", 8)]
    with pytest.raises(ConfigError, match=r"text_length: 17 is more than .* positions, 16"):
        run(data, tmp_path / "run", stage=2, text_length=17, model=tiny.model() | {"question_aware": True})


def retrieval(place: Path) -> Path:
    """A retrieval model as transformers writes it: no language model, no word head."""
    whole = published.config(
        published.opt(), qformer={**published.QFORMER, "use_qformer_text_input": True, "vocab_size": 120}
    )
    theirs = transformers.Blip2ForImageTextRetrieval(whole).eval()
    published.scramble(theirs)
    published.save(theirs, place, published.BERT)
    return place


def test_a_published_retrieval_model_goes_on_with_contrast_and_matching(tmp_path: Path):
    data, start = fine.pictures(tmp_path / "pictures"), retrieval(tmp_path / "start")
    recipe = {"stage": 1, "prefix_lm": None, "batch_size": 8}
    with pytest.raises(ConfigError, match=r"losses\.itg: this model has no word head; write losses\.itg=0"):
        fine.run(data, start, tmp_path / "run", **recipe)
    held_out = {"validate": {"data": str(data), "every": 2, "limit": 8}}
    report = fine.run(data, start, tmp_path / "run", losses={"itg": 0}, **recipe, **held_out)
    assert set(report.last) == {"itc", "itm"}
    before, after = (blip2.load(place, device="cpu", dtype="float32") for place in (start, report.model))
    photos = published.pictures(2)
    expected, found = before.match(photos, ["w9 w1", "w2"]), after.match(photos, ["w9 w1", "w2"])
    assert found.itm.shape == (2, 2)
    assert not torch.equal(found.itm, expected.itm)
    assert (after.encode(photos).patches == before.encode(photos).patches).all()
    headed = fine.run(data, start, tmp_path / "headed", model={"word_head": True}, **recipe)
    assert "itg" in headed.last, "a new word head begins"
