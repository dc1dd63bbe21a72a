"""`calibration.json`: found beside the model it was fitted for, refused beside any other."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

import blip2
import lavis_files
import tiny_model
from blip2 import weights
from blip2.calibration import Calibration
from blip2.config import Blip2Config
from blip2.errors import CheckpointError
from blip2.weights import calibrated, lavis
from blip2.weights.convert import convert
from blip2.weights.save import NOT_SEEN, identity_of

FITTED = Calibration(2.0, -1.0, 0.25)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A model that matches, without a calibration."""
    tiny_model.build(language=False).save(tmp_path)
    return tmp_path


def load(place: Path, **options: object) -> blip2.Blip2:
    return blip2.load(place, device="cpu", dtype="float32", **options)


def test_match_uses_what_lies_beside_the_model_and_only_that(place: Path):
    plain = load(place)
    assert plain.calibration is None
    calibrated.write(place / calibrated.NAME, FITTED, plain.identity)
    found = load(place)
    assert found.calibration == FITTED
    assert found.identity == plain.identity  # indexes stay those of this model
    assert load(place, calibration=False).calibration is None
    picture, texts = tiny_model.picture(0), ["a dog", "a red house"]
    raw, right = plain.match(picture, texts), found.match(picture, texts)
    torch.testing.assert_close(right.itm.logit(), raw.itm.logit() / 2 - 1, atol=1e-4, rtol=1e-4)  # float32's logit
    torch.testing.assert_close(right.itc, raw.itc, rtol=0, atol=0)
    torch.testing.assert_close(right.odds, raw.odds, rtol=0, atol=0)
    torch.testing.assert_close(raw.odds.sigmoid(), raw.itm, rtol=1e-5, atol=1e-6)  # a softmax of two is a sigmoid


def test_how_captions_are_written_makes_no_other_model_of_it(place: Path):
    plain = load(place)
    calibrated.write(place / calibrated.NAME, FITTED, plain.identity)
    config = json.loads((place / "config.json").read_text())
    config["captions"]["length_penalty"] = 0.25
    (place / "config.json").write_text(json.dumps(config))
    assert load(place).calibration == FITTED
    config["vision_norm_eps"] = 1e-3
    (place / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="another model"):
        load(place)


def test_what_a_model_s_identity_leaves_out_are_keys_that_there_are(place: Path):
    assert {field.name for field in dataclasses.fields(Blip2Config)} > NOT_SEEN
    own = load(place).identity
    values = json.loads((place / "config.json").read_text())
    values["base"] = {"name": "elsewhere", "sha256": "1" * 64, "vision": False}
    (place / "config.json").write_text(json.dumps(values))
    based = identity_of(place)
    assert based != own
    values["base"]["name"] = "moved"
    (place / "config.json").write_text(json.dumps(values))
    assert identity_of(place) == based
    values["base"]["sha256"] = "2" * 64
    (place / "config.json").write_text(json.dumps(values))
    assert identity_of(place) != based


def test_a_calibration_elsewhere_is_taken_by_name(place: Path, tmp_path_factory: pytest.TempPathFactory):
    file = tmp_path_factory.mktemp("other") / "fitted.json"
    calibrated.write(file, FITTED, load(place).identity)
    assert load(place, calibration=file).calibration == FITTED
    with pytest.raises(CheckpointError, match=r"none\.json: cannot be read"):
        load(place, calibration=file.with_name("none.json"))


def test_saving_carries_it_and_never_leaves_that_of_another_model(
    place: Path, tmp_path_factory: pytest.TempPathFactory
):
    model = dataclasses.replace(load(place), calibration=FITTED)
    copy = tmp_path_factory.mktemp("copy")
    model.save(copy, torch.float16)
    assert load(copy).calibration == FITTED
    dataclasses.replace(model, calibration=None).save(copy)
    assert load(copy).calibration is None
    model.save(copy)
    weights.save(copy, model.config, model.bridge, vision=model.encoder)  # as training writes
    assert not (copy / calibrated.NAME).exists()


def test_converting_carries_it_and_leaves_none_of_another_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = lavis_files.CONFIGS["stage 1"]
    lavis_files.write(config, tmp_path)
    monkeypatch.setattr(lavis, "published", lambda *_: config)
    source = tmp_path / "blip2.pth"
    convert(source, tmp_path / "plain", "transformers")
    assert load(tmp_path / "plain").calibration is None
    calibrated.write(calibrated.place(source), FITTED, load(source).identity)
    assert load(source).calibration == FITTED
    convert(source, tmp_path / "theirs", "transformers")
    assert load(tmp_path / "theirs").calibration == FITTED
    convert(tmp_path / "theirs", tmp_path / "again" / "blip2.pth", "lavis")
    assert calibrated.beside(tmp_path / "again" / "blip2.pth", load(source).identity) == FITTED
    convert(tmp_path / "plain", tmp_path / "again" / "blip2.pth", "lavis")
    assert not calibrated.place(tmp_path / "again" / "blip2.pth").exists()
    calibrated.write(tmp_path / "theirs" / calibrated.NAME, FITTED, "another")
    with pytest.raises(CheckpointError, match="fitted for another model"):
        convert(tmp_path / "theirs", tmp_path / "refused", "transformers")
    assert not (tmp_path / "refused").exists()
    convert(tmp_path / "plain", tmp_path / "theirs", "transformers")
    assert load(tmp_path / "theirs").calibration is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "another"}, "fitted for another model.*blip2 calibrate"),
        ({"format": 2}, "format 2 is newer than this blip2 reads"),
        ({"calibration": {"temperature": -1}}, "a temperature is above 0"),
        ({"calibration": {"temperature": "hot"}}, "calibration.temperature: Input should be a valid number"),
        ({"calibration": {"bias": 1}}, "calibration.temperature: Field required"),
        ({"more": 1}, "more: Unexpected keyword"),
    ],
)
def test_a_wrong_file_is_an_error_that_names_it(place: Path, change: dict[str, object], message: str):
    path = place / calibrated.NAME
    calibrated.write(path, FITTED, load(place).identity)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CheckpointError, match=rf"calibration\.json: .*{message}"):
        load(place)
    assert load(place, calibration=False).calibration is None


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[" * 100_000, b"{}", b"null"])
def test_a_damaged_file_is_an_error_that_names_it(place: Path, content: bytes):
    (place / calibrated.NAME).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"calibration\.json: .*or delete it"):
        load(place)
