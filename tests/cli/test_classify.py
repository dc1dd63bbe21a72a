"""`blip2 classify`: labels from the command line or a file, for one picture or many."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from blip2.blip2 import Blip2
from blip2.cli import app
from blip2.errors import DataError, PromptError

pytestmark = pytest.mark.usefixtures("model", "photos")
NAMES = ("dog", "red house", "beach")


def run(*words: str) -> Result:
    result = CliRunner().invoke(app, ["classify", *words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_one_picture_prints_its_labels_best_first(model: Blip2):
    words = [word for name in NAMES for word in ("--label", name)]
    best = model.classify("photo.jpg", NAMES, details=True).top(2)
    assert run("photo.jpg", *words, "--top", "2").stdout == "".join(f"{name}\t{score:.3f}\n" for name, score in best)
    by_itm = model.classify("photo.jpg", NAMES, templates=["a {}"], by="itm", details=True).top(5)
    found = json.loads(run("photo.jpg", *words, "--by", "itm", "-t", "a {}", "--json").stdout)
    assert found["image"] == "photo.jpg"
    assert [each["label"] for each in found["labels"]] == [name for name, _ in by_itm]
    assert found["labels"][0]["score"] == pytest.approx(by_itm[0][1], abs=1e-5)


def test_a_folder_prints_paths_and_names_what_it_cannot_read(model: Blip2):
    Path("labels.txt").write_text("\n".join(NAMES))
    Path("holiday/b.jpg").write_bytes(b"no picture")
    result = run("holiday", "--labels", "labels.txt", "--top", "1", "--batch-size", "2")
    expected = [f"holiday/{name}.jpg\t{model.classify(f'holiday/{name}.jpg', NAMES)}" for name in "ac"]
    assert [line.rpartition("\t")[0] for line in result.stdout.splitlines()] == expected
    assert result.exit_code == 1
    assert "holiday/b.jpg" in result.stderr


def test_labels_longer_than_the_model_reads_are_told():
    result = run("photo.jpg", "-l", "dog", "-l", "red house " * 40)
    assert "1 labels are too long to be read to their end: red house" in result.stderr


def test_what_is_wrong_with_labels_is_said_before_a_model_is_loaded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("blip2.cli.classify.open_model", lambda *_: pytest.fail("the model was loaded"))
    for words, error, message in (
        ([], PromptError, "no labels to choose from: name each with --label"),
        (["-l", "dog"], PromptError, "at least two"),
        (["-l", "dog", "-l", "dog"], PromptError, "comes twice"),
        (["-l", "dog", "-l", "cat", "-t", "a photo"], PromptError, "has no {}"),
        (["--labels", "none.txt"], DataError, "none.txt"),
    ):
        with pytest.raises(error, match=message):
            run("photo.jpg", *words)
