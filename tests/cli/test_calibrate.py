"""`blip2 calibrate`, and `match` after it."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

import blip2
import tiny_model
from blip2.cli import app
from blip2.errors import ConfigError, DataError

TEXTS = ("a red dog", "the house on the beach", "how many cat", "what is this")


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory with a model in `tiny/`, and pictures in `data/` with the texts that it finds fit best."""
    monkeypatch.chdir(tmp_path)
    model = tiny_model.build(language=False)
    model.save("tiny")
    Path("data").mkdir()
    pictures = [tiny_model.picture(number) for number in range(24)]
    found = model.match(pictures, TEXTS).itm  # (24, 4)
    best = (found - found.mean(0)).argmax(1).tolist()
    for number, picture in enumerate(pictures):
        Image.fromarray(picture).save(f"data/{number:02}.png")
        Path(f"data/{number:02}.txt").write_text(TEXTS[best[number]])


def run(*words: str) -> Result:
    result = CliRunner().invoke(app, words)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_a_calibration_is_fitted_written_measured_and_used_from_then_on():
    before = json.loads(run("match", "data/00.png", "-t", "a dog", "--json", "-m", "tiny").stdout)["itm"]
    result = run("calibrate", "data", "--model", "tiny", "--plot", "reliability.svg")
    assert "negative log-likelihood, calibrated" in result.stdout
    assert "where 0.5 of the pairs match, from 12 pictures; measured on 24 pairs of 12 pictures" in result.stderr
    assert ElementTree.parse("reliability.svg").getroot().tag.endswith("svg")
    calibration = blip2.load("tiny", device="cpu").calibration
    assert calibration is not None
    after = json.loads(run("match", "data/00.png", "-t", "a dog", "--json", "-m", "tiny").stdout)["itm"]
    assert after != before
    assert run("calibrate", "data", "--model", "tiny", "--out", "other.json", "--base-rate", "0.1").exit_code == 0
    moved = ("match", "data/00.png", "-t", "a dog", "--json", "-m", "tiny", "--calibration", "other.json")
    assert json.loads(run(*moved).stdout)["itm"] < after
    assert blip2.load("tiny", device="cpu").calibration == calibration


def test_a_calibration_of_another_model_is_written_anew():
    run("calibrate", "data", "--model", "tiny")
    path = Path("tiny/calibration.json")
    path.write_text(path.read_text().replace('"model": "', '"model": "0'))
    run("calibrate", "data", "--model", "tiny")
    assert blip2.load("tiny", device="cpu").calibration is not None


def test_what_cannot_be_is_said_before_a_model_is_loaded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("blip2.cli.calibrate.open_model", lambda *_: pytest.fail("the model was loaded"))
    for words, error, message in (
        (["data", "--model", "Salesforce/blip2-itm-vit-g"], ConfigError, "no folder to write into; name a file"),
        (["data", "--model", "tiny", "--out", "none/c.json"], ConfigError, "does not exist"),
        (["data", "--model", "tiny", "--base-rate", "1"], ConfigError, "a base rate is a share"),
        (["data", "--model", "tiny", "--test", "data"], DataError, "pictures of the fit"),
        (["data", "--model", "tiny", "--limit", "3"], DataError, "half of 3 pictures is too few"),
    ):
        with pytest.raises(error, match=message):
            run("calibrate", *words)
