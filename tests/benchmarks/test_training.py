"""The step that ours is timed against computes the same losses, and the benchmark's table comes out."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import plain_step, training
from blip2.config import Blip2Config
from blip2.model.bridge import Bridge
from blip2.model.opt import OPT
from blip2.train.objectives import Stage1, Stage2

SMALL = {"width": 32, "layers": 3, "heads": 2, "mlp_width": 48, "queries": 5, "encoder_width": 24}
LANGUAGE = dataclasses.replace(training._OPT, width=32, layers=2, heads=2, mlp_width=48)
CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # both float32, sums in another order; the worst seen is 2e-6


@pytest.fixture(autouse=True)
def rows(monkeypatch: pytest.MonkeyPatch):
    """The table's rows with parts small enough for a test."""
    for name, (config, _, _) in training.ROWS.items():
        qformer = dataclasses.replace(config.qformer, **SMALL)
        small = config.replace(
            vision=dataclasses.replace(Blip2Config().vision, width=24),
            qformer=qformer,
            language=LANGUAGE if config.language else None,
            text=None,
        )
        monkeypatch.setitem(training.ROWS, name, (small, 5, 7))
    monkeypatch.setattr(training, "_OPT", LANGUAGE)


@pytest.mark.parametrize("row", ["stage1", "mini"])
def test_the_plain_step_of_stage_1_has_our_losses_and_gradients(row: str):
    config = training.ROWS[row][0]
    torch.manual_seed(0)
    bridge = Bridge(config)
    batch = training.batches(row, 1)[0]
    objective = Stage1(bridge)
    ours = objective(batch, 3)
    theirs = plain_step.stage1(bridge, batch, training.LONGEST, 3, objective._draw_negatives)
    assert list(ours) == list(theirs) == ["itc", "itm", "itg"]
    for name, loss in ours.items():
        torch.testing.assert_close(loss, theirs[name], **CLOSE)
    gradients = [torch.autograd.grad(sum(each.values()), bridge.qformer.query_tokens)[0] for each in (ours, theirs)]
    torch.testing.assert_close(*gradients, **CLOSE)


def test_the_plain_step_of_stage_2_has_our_loss():
    config = training.ROWS["stage2"][0]
    torch.manual_seed(0)
    bridge, language = Bridge(config), OPT(LANGUAGE)
    batch = training.batches("stage2", 1)[0]
    ours = Stage2(bridge, language, bos=training.BOS)(batch, 0)["lm"]
    theirs = plain_step.stage2(bridge, language, batch, training.LONGEST, training.BOS)["lm"]
    torch.testing.assert_close(ours, theirs, **CLOSE)


def test_the_command_times_both_steps_and_says_where_the_time_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(sys, "argv", ["training", "--steps", "1", "--threads", "1", "--json", str(tmp_path / "t.json")])
    training.main()
    report = json.loads((tmp_path / "t.json").read_text())
    assert [(row["row"], row["precision"]) for row in report["rows"]] == [
        (row, precision) for row in training.ROWS for precision in ("fp32", "bf16")
    ]
    assert all(row["shares"]["matrix products"] > 0 and row["ratio"] > 0 for row in report["rows"])
    assert "| stage2 | bf16 |" in capsys.readouterr().out
