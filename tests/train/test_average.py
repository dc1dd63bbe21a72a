"""The weights that are validated and saved: the last ones, their running average, or with a share of the start's."""

import shutil
from pathlib import Path

import pytest
import torch
from tiny import bridge, run

from blip2.errors import ConfigError
from blip2.train import checkpoint


def test_the_average_is_what_is_saved_and_the_weights_go_on_untouched(shapes: Path, tmp_path: Path):
    plain = run(shapes, tmp_path / "plain", steps=6)
    averaged = run(shapes, tmp_path / "averaged", steps=6, ema=0.9)
    assert plain.last == averaged.last
    ours, theirs = bridge(tmp_path / "plain"), bridge(tmp_path / "averaged")
    assert not torch.equal(ours["qformer.query_tokens"], theirs["qformer.query_tokens"])
    saved = checkpoint.latest(tmp_path / "averaged" / "checkpoints")
    assert saved is not None
    assert torch.equal(checkpoint.read(saved)["bridge"]["qformer.query_tokens"], ours["qformer.query_tokens"])
    assert torch.equal(
        checkpoint.read(saved)["average"]["weights"]["qformer.query_tokens"], theirs["qformer.query_tokens"]
    )


def test_what_the_start_taught_comes_back_by_its_share_and_training_does_not_notice(shapes: Path, tmp_path: Path):
    started = str(tmp_path / "start")
    run(shapes, tmp_path / "start", steps=1)
    plain = run(shapes, tmp_path / "plain", steps=4, start=started)
    shares = {"heads.*": 1.0, "qformer.*": 0.25, "*": 0.0}
    changes = {"steps": 4, "start": started, "start_share": shares, "save_every": 2}
    shared = run(shapes, tmp_path / "shared", **changes)
    assert shared.last == plain.last
    before, after, mixed = (bridge(tmp_path / name) for name in ("start", "plain", "shared"))
    for name, tensor in mixed.items():
        share = 1.0 if name.startswith("heads.") else 0.25 if name.startswith("qformer.") else 0.0
        assert torch.equal(tensor, after[name].lerp(before[name], share)), name
    (tmp_path / "shared" / "checkpoints" / "step-00000004.pt").unlink()
    shutil.rmtree(tmp_path / "shared" / "model")
    shutil.rmtree(started)
    run(shapes, tmp_path / "start", steps=3)  # another model by the time that the run goes on
    run(shapes, tmp_path / "shared", **changes)
    for name, tensor in bridge(tmp_path / "shared").items():
        assert torch.equal(tensor, mixed[name]), name


def test_validation_sees_the_start_s_share(shapes: Path, tmp_path: Path):
    run(shapes, tmp_path / "start", steps=1)
    validate = {"data": str(shapes), "every": 2, "limit": 16}
    scores: list[float] = []
    for name, changes in (("still", {"lr": 1e-30}), ("shared", {"start_share": {"*": 1.0}})):
        run(shapes, tmp_path / name, steps=2, start=str(tmp_path / "start"), validate=validate, **changes)
        best = checkpoint.read(tmp_path / name / "checkpoints" / checkpoint.BEST)
        scores.append(float(best["bridge"]["qformer.query_tokens"].sum()))
    assert scores[0] == scores[1]


def test_a_share_of_no_start_or_of_no_parameter_is_refused(shapes: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="start_share: there is no `start`"):
        run(shapes, tmp_path / "run", start_share={"*": 0.5})
    run(shapes, tmp_path / "start", steps=1)
    with pytest.raises(ConfigError, match=r"start_share: 'hads\.\*' fits no trainable parameter"):
        run(shapes, tmp_path / "run", start=str(tmp_path / "start"), start_share={"hads.*": 0.5})
    with pytest.raises(ConfigError, match="start_share"):
        run(shapes, tmp_path / "run", start=str(tmp_path / "start"), start_share={"*": 1.5})
