"""Training from a model as transformers writes it: what is trained is saved, the rest stays where it was."""

import json
import shutil
from pathlib import Path
from typing import Any

import fine
import pytest
import torch

from blip2.errors import CheckpointError, ConfigError
from blip2.train.recipe import parse
from blip2.train.start import model_config
from blip2.weights import load
from blip2.weights.base import digest

STILL: dict[str, Any] = {"steps": 1, "lr": 1e-30, "clip": None}
NEAR = 1e-6  # one step at that rate is no step


def test_a_model_of_transformers_is_a_start_and_what_did_not_change_is_not_saved_again(
    data: Path, start: Path, tmp_path: Path
):
    report = fine.run(data, start, tmp_path / "run", **STILL)
    assert {path.name for path in report.model.iterdir()} == {"README.md", "bridge.safetensors", "config.json"}
    before, after = fine.load(start), fine.load(report.model)
    for found, expected in zip(fine.said(after), fine.said(before), strict=True):
        assert found == pytest.approx(expected, abs=NEAR)
    assert fine.changed(fine.weights(before.encoder), fine.weights(after.encoder)) == set()
    assert fine.changed(fine.weights(before.language), fine.weights(after.language)) == set()


def test_it_learns_and_a_second_run_goes_on_from_the_first(data: Path, start: Path, tmp_path: Path):
    first = fine.run(data, start, tmp_path / "one", steps=30, lr=1e-2)
    assert first.last["lm"] < first.first["lm"] - 0.3
    second = fine.run(data, tmp_path / "one", tmp_path / "two", steps=2)
    assert second.first["lm"] < first.first["lm"] - 0.3
    assert load(second.model).config.base == load(first.model).config.base, "both stand on the published model"
    assert fine.said(fine.load(second.model))


def test_a_prompt_that_the_recipe_gives_is_the_model_s_afterwards(data: Path, opt: Path, tmp_path: Path):
    report = fine.run(data, opt, tmp_path / "run", model={"prompts": {"caption": "w7 w8"}})
    config = load(report.model).config
    assert config.prompts.caption == "w7 w8"
    assert config.language == model_config(parse(fine.recipe(data, opt, tmp_path / "run"))).language


def test_a_base_that_is_gone_or_another_is_an_error_that_tells_the_way_out(data: Path, opt: Path, tmp_path: Path):
    base = tmp_path / "base"
    shutil.copytree(opt, base)
    report = fine.run(data, base, tmp_path / "run", steps=1)
    config = json.loads((report.model / "config.json").read_text())
    base.rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match=r"was made from .*base, which is not there; .*base\.name"):
        fine.load(report.model)
    config["base"]["name"] = str(tmp_path / "moved")
    (report.model / "config.json").write_text(json.dumps(config))
    fine.load(report.model)
    fine.model("t5", base)
    config["base"]["name"] = str(base)
    (report.model / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="was made from another model than lies in"):
        fine.load(report.model)


def test_a_digest_tells_models_of_one_shape_apart_and_copies_not(opt: Path, tmp_path: Path):
    shutil.copytree(opt, tmp_path / "copy")
    assert digest(tmp_path / "copy") == digest(opt)
    file = tmp_path / "copy" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert digest(tmp_path / "copy") != digest(opt)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no weights"):
        digest(tmp_path / "empty")


def test_a_model_saved_whole_needs_its_base_no_more(data: Path, opt: Path, tmp_path: Path):
    report = fine.run(data, opt, tmp_path / "run")
    model = fine.load(report.model)
    model.save(tmp_path / "whole")
    assert load(tmp_path / "whole").config.base is None
    assert fine.said(fine.load(tmp_path / "whole")) == fine.said(model)
    again = fine.run(data, tmp_path / "whole", tmp_path / "again", **STILL)
    for found, expected in zip(fine.said(fine.load(again.model)), fine.said(model), strict=True):
        assert found == pytest.approx(expected, abs=NEAR)


def test_words_in_use_are_what_the_model_writes_afterwards_with_those_of_its_start(
    data: Path, opt: Path, tmp_path: Path
):
    first = fine.run(data, opt, tmp_path / "one", steps=1, vocabulary="used")
    words = load(first.model).vocabulary
    assert words is not None
    more = fine.pictures(tmp_path / "more", 4).read_text().replace("w9", "w20")
    (tmp_path / "more" / "captions.csv").write_text(more)
    second = fine.run(tmp_path / "more" / "captions.csv", tmp_path / "one", tmp_path / "two", vocabulary="used")
    both = load(second.model).vocabulary
    assert both is not None
    assert set(both.tolist()) - set(words.tolist()) == {fine.load(opt).tokenizer.encode(["w20"])[0][0]}
    assert set(words.tolist()) < set(both.tolist())
    captions = fine.load(second.model).caption(fine.published.pictures(2), max_new_tokens=4)
    assert {word for caption in captions for word in caption.split()} <= {"w9", "w20", *fine.COLOURS}
    fine.load(second.model).save(tmp_path / "whole")
    assert torch.equal(load(tmp_path / "whole").vocabulary, both)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"vision": {"layers": 3}}}, "model.vision: is another than that of"),
        ({"model": {"language": {"layers": 3}}}, "model.language: is another than that of"),
        ({"model": {"question_aware": True}}, "question_aware: this Q-Former has no text side"),
        ({"stage": 1}, "model.heads: false"),
    ],
)
def test_what_does_not_go_with_the_start_is_refused(
    changes: dict[str, Any], message: str, data: Path, opt: Path, tmp_path: Path
):
    with pytest.raises(ConfigError, match=message):
        fine.run(data, opt, tmp_path / "run", **changes)


def test_a_file_of_lavis_is_no_start_and_the_error_says_what_makes_one_of_it(data: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"there/is/none\.pth is a LAVIS file.* `blip2 convert .* --to transformers`"):
        fine.run(data, Path("there/is/none.pth"), tmp_path / "run")


def test_a_name_on_the_hub_is_a_start_and_stays_a_name(
    data: Path, opt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    asked: list[bool] = []

    def download(name: str, *, offline: bool = False) -> Path:
        assert name == "owner/model"
        asked.append(offline)
        return opt

    monkeypatch.setattr("blip2.weights.hub.download", download)
    report = fine.run(data, Path("owner/model"), tmp_path / "run")
    assert load(report.model).config.base.name == "owner/model"
    asked.clear()
    assert fine.said(fine.load(report.model))
    assert asked == [True], "the hub is not asked for what its cache holds"
