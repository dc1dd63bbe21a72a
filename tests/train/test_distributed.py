"""Two ranks on gloo against one process on the same global batches."""

import json
from pathlib import Path
from typing import Any

import fine
import pytest
import tiny
import torch
from processes import finish, run_ranks, run_start, run_tiny, said, start
from safetensors.torch import load_file

from blip2.errors import ConfigError
from blip2.train import checkpoint
from blip2.train.distributed import World, _Gather, join_world, rank_device  # pyright: ignore[reportPrivateUsage]
from blip2.train.log import say

CLOSE = 1e-5  # of losses and gradients: float32 sums in another order; the worst measured is 4e-8 for a gradient
CLOSE_WEIGHTS = 5e-4  # AdamW makes a step of rounding where a gradient is almost nothing; the worst measured is 1.6e-4


def metrics(output: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line | line.pop("validation", {}) for line in lines]


def weights(output: Path) -> dict[str, torch.Tensor]:
    """Trained weights; a key's bias has no gradient but rounding, which AdamW makes a step of: softmax ignores it."""
    files = (output / "model").rglob("*.safetensors")
    state = {f"{file.stem}.{name}": tensor for file in files for name, tensor in load_file(file).items()}
    return {name: tensor for name, tensor in state.items() if not name.endswith("key.bias")}


def same(one: Path, two: Path) -> None:
    """Two runs had the same losses and gradients, and came to the same weights."""
    for alone, shared in zip(metrics(one), metrics(two), strict=True):
        assert shared == pytest.approx(alone, rel=CLOSE, abs=CLOSE)
    expected, found = weights(one), weights(two)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=CLOSE_WEIGHTS, msg=name)
    for alone, shared in zip(mean_gradients(one), mean_gradients(two), strict=True):
        torch.testing.assert_close(shared, alone, rtol=0, atol=CLOSE)


def mean_gradients(output: Path) -> list[torch.Tensor]:
    """AdamW's first moments: a running mean of the gradients."""
    saved = checkpoint.latest(output / "checkpoints")
    assert saved is not None
    return [state["exp_avg"] for state in checkpoint.read(saved)["optimizer"]["state"].values()]


@pytest.mark.parametrize(
    "changes",
    [
        {"stage": 1},
        {"stage": 1, "accumulate": 2},
        {"stage": 1, "likeness": 0.4, "model": tiny.model() | {"text": {"name": "tiny-text", "width": 96}}},
        {"stage": 2, "keep": 0.5},
        {"stage": 2, "vocabulary": "used"},
    ],
    ids=lambda changes: " ".join(f"{key} {value}" for key, value in changes.items() if key != "model"),
)
def test_two_ranks_give_the_losses_gradients_and_weights_of_one(changes: dict[str, Any], shapes: Path, tmp_path: Path):
    values = changes | {"steps": 6, "validate": {"data": str(shapes), "every": 3, "limit": 16}}
    assert finish(start(run_tiny, tiny.recipe(shapes, tmp_path / "one", **values))) == 0
    assert run_ranks(tiny.recipe(shapes, tmp_path / "two", **values), 2) == [0, 0]
    same(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize(
    ("changes", "file"),
    [
        ({"train": ["*"], "vision": {"train": True, "layer_decay": 0.8}}, "vision.safetensors"),
        ({"train": ["*"], "vision": {"train": True, "recompute": True}, "accumulate": 2}, "vision.safetensors"),
        ({"lora": {"rank": 2}}, "adapter/adapter_model.safetensors"),
    ],
    ids=["an encoder by depth", "a recomputed encoder in parts", "an adapter"],
)
def test_two_ranks_train_the_image_encoder_and_an_adapter_as_one_does(
    changes: dict[str, Any], file: str, data: Path, opt: Path, tmp_path: Path
):
    still = {"qformer": {"dropout": 0.0}}  # every rank draws its own
    values = changes | {"steps": 5, "clip": 0.5, "model": still}
    assert finish(start(run_start, fine.recipe(data, opt, tmp_path / "one", **values))) == 0
    assert run_ranks(fine.recipe(data, opt, tmp_path / "two", **values), 2, run_start) == [0, 0]
    same(tmp_path / "one", tmp_path / "two")
    before = fine.load(opt)
    after = fine.load(tmp_path / "two" / "model")
    assert (tmp_path / "two" / "model" / file).is_file()
    part = "encoder" if "vision" in file else "language"
    assert fine.changed(fine.weights(getattr(before, part)), fine.weights(getattr(after, part))), "it has learned"


def test_two_ranks_find_the_queries_as_diverse_as_one_does(shapes: Path, tmp_path: Path):
    values = {"steps": 3, "losses": {"diversity": 0.5}}
    assert finish(start(run_tiny, tiny.recipe(shapes, tmp_path / "one", **values))) == 0
    assert run_ranks(tiny.recipe(shapes, tmp_path / "two", **values), 2) == [0, 0]
    one, two = ([line["diversity"] for line in metrics(tmp_path / name)] for name in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-3)  # of what images differ in, which is little in three steps


def test_ranks_resume_from_the_checkpoint_that_the_first_of_them_wrote(shapes: Path, tmp_path: Path):
    values = tiny.recipe(shapes, tmp_path / "run", steps=8)
    whole = tiny.recipe(shapes, tmp_path / "whole", steps=8)
    assert run_ranks(whole, 2) == [0, 0]
    assert run_ranks(values, 2) == [0, 0]
    (tmp_path / "run" / "checkpoints" / "step-00000008.pt").unlink()
    assert run_ranks(values, 2) == [0, 0]
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")


def test_a_batch_that_ranks_cannot_share_is_refused(shapes: Path, tmp_path: Path):
    values = tiny.recipe(shapes, tmp_path / "run", batch_size=15)
    assert run_ranks(values, 2) == [1, 1]
    assert "batch_size: parts of 15 rows cannot be shared by 2 ranks" in said(values).read_text()


@pytest.mark.parametrize(
    ("device", "calls"),
    [
        ("auto", [("device", torch.device("cuda", 1)), ("backend", "cpu:gloo,cuda:nccl")]),
        ("cuda", [("device", torch.device("cuda", 1)), ("backend", "cpu:gloo,cuda:nccl")]),
        ("cpu", [("backend", "gloo")]),
    ],
)
def test_a_rank_has_its_device_before_it_meets_the_others_and_a_backend_that_fits(
    device: str, calls: list[Any], monkeypatch: pytest.MonkeyPatch
):
    made: list[Any] = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda chosen: made.append(("device", chosen)))
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend: made.append(("backend", backend)))
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    assert join_world(device) == World(1, 2, 1)
    assert made == calls


def test_one_device_is_not_for_several_ranks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    assert rank_device("cuda:0", 1, 1) == torch.device("cuda", 0)
    with pytest.raises(ConfigError, match="'cuda:0' is one device and there are 2 ranks"):
        rank_device("cuda:0", 1, 2)


def test_gathering_leaves_autograd_s_own_gradient_alone(monkeypatch: pytest.MonkeyPatch):
    def everyone_has_the_same(parts: list[torch.Tensor], rows: torch.Tensor) -> None:
        for part in parts:
            part.copy_(rows)

    monkeypatch.setattr(torch.distributed, "all_gather", everyone_has_the_same)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda total: total.mul_(2))
    rows = torch.ones(2, 3, requires_grad=True)
    gradient = torch.ones(4, 3)
    _Gather.apply(rows, World(0, 2)).backward(gradient)  # type: ignore[union-attr]
    assert rows.grad is not None
    assert rows.grad.eq(2).all()
    assert gradient.eq(1).all()


def test_only_the_first_rank_speaks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        say(f"rank {rank}")
    assert capsys.readouterr().err == "rank 0\n"


def test_a_process_alone_calls_nothing_distributed():
    rows = torch.arange(3.0, requires_grad=True)
    world = World()
    assert world.gather(rows, gradient=True) is rows
    assert world.own(rows, 3).tolist() == [0, 1, 2]
    assert world.mean(rows).tolist() == [0, 1, 2]
    module = torch.nn.Linear(2, 2)
    assert world.wrap(module) is module
    world.wait()
    assert not torch.distributed.is_initialized()
