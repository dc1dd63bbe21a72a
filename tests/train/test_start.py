"""What a run starts from: an earlier run, another model, or the one of the package."""

import re
from pathlib import Path
from typing import cast

import pytest
import tiny
import torch
import yaml
from tiny import bridge, run

import blip2
from blip2.adapters import EXTENDS
from blip2.errors import CheckpointError, ConfigError
from blip2.weights import load


def test_a_start_of_another_shape_is_refused(shapes: Path, tmp_path: Path):
    run(shapes, tmp_path / "one", steps=1)
    with pytest.raises(CheckpointError, match=r"query_tokens"):
        run(shapes, tmp_path / "two", steps=1, start=str(tmp_path / "one"), model=tiny.model(queries=5))
    with pytest.raises(ConfigError, match="holds no model"):
        run(shapes, tmp_path / "two", steps=1, start=str(tmp_path / "nowhere"), model=None)


def test_a_bridge_is_not_shown_another_encoder_s_patches(shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of the same width, so that no shape would tell; unless they are its own encoder's, and more beside them."""
    run(shapes, tmp_path / "one", steps=1)
    other = tiny.model() | {"vision": {"name": "another-encoder", "width": 32}}
    said = r"model\.vision: another-encoder, but .* was trained on tiny-encoder; .*'model\.vision=(.*)'"
    with pytest.raises(ConfigError, match=said) as error:
        run(shapes, tmp_path / "two", steps=1, start=str(tmp_path / "one"), model=other)
    wayout = yaml.safe_load(re.search(said, str(error.value))[1])
    run(shapes, tmp_path / "two", steps=1, start=str(tmp_path / "one"), model=other | {"vision": wayout})
    monkeypatch.setitem(cast("dict[str, str]", EXTENDS), "another-encoder", "tiny-encoder")
    with pytest.raises(ConfigError, match="another-encoder has the SHA-256"):
        run(shapes, tmp_path / "three", steps=1, start=str(tmp_path / "one"), model=other)
    made_of = tmp_path / "one/model/config.json"
    made_of.write_text(made_of.read_text().replace('"tiny-encoder of the tests"', '""'))
    run(shapes, tmp_path / "three", steps=1, start=str(tmp_path / "one"), model=other)


def test_stage_two_goes_on_from_a_stage_one_without_language_model(shapes: Path, tmp_path: Path):
    run(shapes, tmp_path / "one", steps=2, model=tiny.model() | {"language": None})
    with pytest.raises(ConfigError, match="stage 2 needs a language model"):
        run(shapes, tmp_path / "two", steps=2, stage=2, start=str(tmp_path / "one"), model=None)
    run(shapes, tmp_path / "two", steps=2, stage=2, start=str(tmp_path / "one"))
    one, two = bridge(tmp_path / "one"), bridge(tmp_path / "two")
    assert torch.equal(one["qformer.words.weight"], two["qformer.words.weight"]), "stage 2 reads no text"
    assert "language_projection.weight" in two.keys() - one.keys()


def test_stage_two_with_another_language_model_than_stage_one_named_begins_its_projection_anew(
    shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    other = tiny.model() | {"language": {"name": "tiny-language", "width": tiny.LANGUAGE_WIDTH + 8}}
    run(shapes, tmp_path / "one", steps=2, model=other)
    capsys.readouterr()
    run(shapes, tmp_path / "two", steps=2, stage=2, start=str(tmp_path / "one"))
    assert capsys.readouterr().err.count("the language projection begins anew") == 1
    run(shapes, tmp_path / "three", steps=2, stage=2, start=str(tmp_path / "two"))
    assert "begins anew" not in capsys.readouterr().err


def test_a_projection_that_learned_nothing_starts_from_the_mean_of_the_words_and_one_that_did_stays(
    shapes: Path, tmp_path: Path
):
    run(shapes, tmp_path / "one", steps=2)
    assert not bridge(tmp_path / "one")["language_projection.weight"].any()
    still = {"stage": 2, "steps": 1, "lr": 1e-30, "min_lr": 0}
    run(shapes, tmp_path / "two", start=str(tmp_path / "one"), **still)
    begun, words = bridge(tmp_path / "two"), tiny.TinyLanguage().words.weight.detach()
    torch.testing.assert_close(begun["language_projection.bias"], words.mean(0))
    assert begun["language_projection.weight"].abs().max() < 1e-20  # one step at that rate
    run(shapes, tmp_path / "three", stage=2, steps=2, start=str(tmp_path / "two"))
    run(shapes, tmp_path / "four", start=str(tmp_path / "three"), **still)
    learned, kept = bridge(tmp_path / "three"), bridge(tmp_path / "four")
    assert learned["language_projection.weight"].abs().max() > 1e-4
    torch.testing.assert_close(kept["language_projection.weight"], learned["language_projection.weight"])


def test_the_model_of_the_package_is_a_start_by_its_name(shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made = run(shapes, tmp_path / "one", steps=1)
    (tmp_path / "package").mkdir()
    made.model.rename(tmp_path / "package" / "mini")
    monkeypatch.setattr(blip2, "__file__", str(tmp_path / "package" / "__init__.py"))
    run(shapes, tmp_path / "two", steps=1, start="mini", model=None, lr=1e-30, min_lr=0)
    one, two = load(tmp_path / "package" / "mini").bridge, load(tmp_path / "two" / "model").bridge
    assert torch.allclose(one.qformer.query_tokens, two.qformer.query_tokens)
