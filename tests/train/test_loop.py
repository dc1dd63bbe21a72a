"""The loop on tiny parts: it learns, and it stops cleanly at whatever goes wrong."""

import json
import math
import resource
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import filelock
import pytest
import tiny
import torch
import typer
from tiny import bridge, run

import blip2
from blip2.cli import train as command
from blip2.errors import Blip2Error, CheckpointError, ConfigError, DataError
from blip2.train import checkpoint, loop, optimizer, parts, report
from blip2.train.distributed import World, rank_device
from blip2.train.folder import Folder, open_folder
from blip2.train.log import Log
from blip2.train.loop import read_ahead
from blip2.train.recipe import parse
from blip2.train.report import Report
from blip2.train.update import Precision

CHANCE = 5 / 72  # of R@5 among as many pictures with different captions


def metrics(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_both_stages_learn_and_held_out_pictures_are_found_by_their_captions(tmp_path: Path):
    data = tiny.draw_shapes(tmp_path / "train", 576, seed=0)
    held_out = {"data": str(tiny.draw_shapes(tmp_path / "val", 72, seed=1)), "every": 100}
    common = {"features": {"cache": str(tmp_path / "features")}, "validate": held_out, "vocabulary": "used"}
    common |= {"batch_size": 24, "save_every": 1000}
    first = run(data, tmp_path / "one", steps=200, **common)
    assert first.last["itc"] < first.first["itc"] - 0.5
    assert first.last["itg"] < first.first["itg"] - 0.5
    best = dict(first.validations)[first.selected]
    assert best["text to image R@5"] > 4 * CHANCE
    assert best["image to text R@5"] > 4 * CHANCE

    second = run(data, tmp_path / "two", stage=2, start=str(tmp_path / "one"), steps=50, lr=5e-3, keep=0.1, **common)
    assert second.last["lm"] < second.first["lm"]
    assert dict(second.validations)[50]["text to image R@5"] > 1.5 * CHANCE, "what is kept of stage 1 stays"
    text = (tmp_path / "two" / "report.md").read_text()
    assert "| lm |" in text
    assert json.loads((tmp_path / "two" / "report.json").read_text())["selected"] == second.selected
    assert (tmp_path / "two" / "losses.svg").read_text().count("<polyline") == len(second.last)


def test_a_finished_run_is_reported_again_without_a_step(shapes: Path, tmp_path: Path):
    first = run(shapes, tmp_path / "run", steps=3)
    log = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    again = run(shapes, tmp_path / "run", steps=3)
    assert again.seconds == first.seconds
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == log


def test_another_recipe_in_the_folder_is_an_error_that_names_the_key(shapes: Path, tmp_path: Path):
    run(shapes, tmp_path / "run", steps=2)
    with pytest.raises(ConfigError, match=r"lr: 0\.001, now 0\.5.*resume=false"):
        run(shapes, tmp_path / "run", steps=2, lr=0.5)
    again = run(shapes, tmp_path / "run", steps=2, lr=0.5, resume=False)
    assert again.recipe["lr"] == 0.5
    assert len(metrics(tmp_path / "run")) == 2


def test_checkpoints_without_their_recipe_are_not_gone_on_from(shapes: Path, tmp_path: Path):
    run(shapes, tmp_path / "out", steps=2)
    (tmp_path / "out" / "recipe.yaml").unlink()
    with pytest.raises(ConfigError, match="holds checkpoints without the recipe"):
        run(shapes, tmp_path / "out", steps=2)
    run(shapes, tmp_path / "out", steps=2, resume=False)


def test_a_second_run_in_the_folder_is_refused_while_the_first_is_there(shapes: Path, tmp_path: Path):
    (tmp_path / "run").mkdir()
    with (
        filelock.FileLock(tmp_path / "run" / ".lock"),
        pytest.raises(ConfigError, match="another run writes here now"),
    ):
        run(shapes, tmp_path / "run")


def test_an_output_that_is_a_file_is_refused(shapes: Path, tmp_path: Path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(ConfigError, match="cannot be a folder"):
        run(shapes, tmp_path / "run")
    assert (tmp_path / "run").read_text() == "mine"


def test_what_a_run_cannot_read_is_not_blamed_on_its_output(shapes: Path, tmp_path: Path):
    with pytest.raises(PermissionError), open_folder(parse(tiny.recipe(shapes, tmp_path / "run")), World()):
        raise PermissionError(13, "Permission denied", "shard.tar")
    with open_folder(parse(tiny.recipe(shapes, tmp_path / "run")), World()):
        pass  # the lock was given back


def test_the_model_is_saved_even_if_its_report_fails(shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object, **__: object) -> Report:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report, "make", fail)
    with pytest.raises(OSError, match="No space left"):
        run(shapes, tmp_path / "run", steps=1)
    assert bridge(tmp_path / "run")


def test_a_package_that_is_used_without_being_installed_is_reported(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    find = metadata.Distribution.from_name

    def missing(name: str) -> metadata.Distribution:
        if name == "blip2":
            raise metadata.PackageNotFoundError(name)
        return find(name)

    monkeypatch.setattr(metadata.Distribution, "from_name", missing)
    assert run(shapes, tmp_path / "run", steps=1).versions["blip2"] == blip2.__version__


def test_an_overflow_of_half_precision_is_null_in_the_log(tmp_path: Path):
    with Log(Folder(tmp_path), steps=2, done=0, every=1) as log:
        log.step(1, 0.1, {"itc": 1.0}, math.inf)
        log.step(2, 0.1, {"itc": 1.0}, 2.5)
    assert "Infinity" not in (tmp_path / "metrics.jsonl").read_text()
    assert [line["norm"] for line in metrics(tmp_path)] == [None, 2.5]


def test_a_loss_that_is_no_number_stops_the_run_and_saves_nothing_of_it(shapes: Path, tmp_path: Path):
    with pytest.raises(Blip2Error, match=r"step \d+: the (loss|gradient) is no number any more"):
        run(shapes, tmp_path / "run", lr=1e30, clip=None, warmup=0, save_every=1)
    lines = metrics(tmp_path / "run")
    assert all(math.isfinite(value) for line in lines for value in line.values())
    saved = checkpoint.latest(tmp_path / "run" / "checkpoints")
    assert saved is not None
    assert checkpoint.read(saved)["step"] == len(lines)
    assert all(tensor.isfinite().all() for tensor in checkpoint.read(saved)["bridge"].values())


def test_a_full_disk_stops_the_run_and_the_same_command_finishes_it(shapes: Path, tmp_path: Path):
    run(shapes, tmp_path / "whole")
    original = checkpoint.save

    def nearly_full(directory: Path, state: checkpoint.State) -> Path:
        if state.step != 8:
            return original(directory, state)
        with largest_file(100_000):
            return original(directory, state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", nearly_full)
        with pytest.raises(CheckpointError, match=r"step-00000008\.pt: cannot be written .*step-00000004\.pt"):
            run(shapes, tmp_path / "run")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000004.pt"]
    run(shapes, tmp_path / "run")
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")


class largest_file:  # noqa: N801 (reads as a context)
    """The kernel refuses to let a file grow beyond so many bytes: a real write that really fails."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __enter__(self) -> None:
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.before[1]))

    def __exit__(self, *error: object) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


def test_a_checkpoint_of_another_shape_is_refused_by_the_tensor_s_name(shapes: Path, tmp_path: Path):
    run(shapes, tmp_path / "run", steps=4)
    last = checkpoint.latest(tmp_path / "run" / "checkpoints")
    assert last is not None
    content = checkpoint.read(last)
    content["bridge"]["qformer.query_tokens"] = torch.zeros(1, 3, 96)
    checkpoint.write(last, content)
    with pytest.raises(CheckpointError, match=r"qformer\.query_tokens is \[1, 3, 96\]"):
        run(shapes, tmp_path / "run", steps=4)


def test_a_damaged_checkpoint_is_named_and_without_it_the_run_goes_on_from_the_one_before(shapes: Path, tmp_path: Path):
    run(shapes, tmp_path / "run")
    log = metrics(tmp_path / "run")
    last = checkpoint.latest(tmp_path / "run" / "checkpoints")
    assert last is not None
    last.write_bytes(last.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=rf"{last.name}: damaged .* delete it"):
        run(shapes, tmp_path / "run")
    last.unlink()
    run(shapes, tmp_path / "run")
    assert metrics(tmp_path / "run") == log


def test_class_names_train_beside_pictures_and_need_an_encoder_with_classes(shapes: Path, tmp_path: Path):
    names = tmp_path / "classes.jsonl"
    names.write_text("".join(json.dumps({"class": n, "names": [c]}) + "\n" for n, c in enumerate(tiny.COLOURS)))
    both = [{"path": str(shapes), "weight": 0.75}, {"path": str(names), "format": "classes", "weight": 0.25}]
    features = {"features": {"cache": str(tmp_path / "features")}}
    report = run(both, tmp_path / "run", steps=2, **features)
    assert report.steps == 2
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(tiny.TinyEncoder, "prototypes")
        with pytest.raises(ConfigError, match="need an image encoder with a classifier"):
            run(both, tmp_path / "other", steps=2, **features)


def test_an_unreadable_picture_stops_the_run_or_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    data = tiny.draw_shapes(tmp_path / "pictures", 24, seed=0)
    (tmp_path / "pictures" / "0003.png").write_bytes(b"no picture")
    features = {"cache": str(tmp_path / "features"), "unreadable": "error"}
    with pytest.raises(DataError, match=r"0003\.png"):
        run(data, tmp_path / "run", steps=1, features=features)
    run(data, tmp_path / "run", steps=1, features=features | {"unreadable": "drop"})
    assert "1 pictures cannot be opened and are left out: ['0003.png']" in capsys.readouterr().err


def test_only_what_the_recipe_trains_changes(shapes: Path, tmp_path: Path):
    run(shapes, tmp_path / "start", steps=1)
    report = run(shapes, tmp_path / "run", steps=2, start=str(tmp_path / "start"), train=["heads.*", "*.query_tokens"])
    before, after = bridge(tmp_path / "start"), bridge(tmp_path / "run")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert "qformer.query_tokens" in changed
    assert all(name.startswith("heads.") or name == "qformer.query_tokens" for name in changed)
    assert report.parameters == sum(t.numel() for n, t in before.items() if n.startswith("heads.") or "query_tok" in n)
    with pytest.raises(ConfigError, match=r"train: 'hads\.\*' fits no trainable parameter"):
        run(shapes, tmp_path / "other", train=["hads.*"])


def test_groups_have_their_own_rate_and_only_matrices_decay():
    module = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 2), "b": torch.nn.Linear(2, 2)})
    module.register_parameter("temperature", torch.nn.Parameter(torch.tensor(0.07)))
    values = tiny.recipe(Path("data"), Path("out"), lr_scale={"a.*": 0.1}, lr=1.0)
    for preset, decays in (("paper", False), ("reference", True)):
        recipe = parse(values | {"preset": preset})
        parameters = optimizer.choose(module, recipe)
        adamw = optimizer.adamw(parameters, recipe)
        optimizer.set_rate(adamw, 0.5)
        found = {
            name: (group["lr"], group["weight_decay"] > 0)
            for group in adamw.param_groups
            for name, parameter in parameters.items()
            if any(parameter is member for member in group["params"])
        }
        assert found == {
            "a.weight": (0.05, True),
            "a.bias": (0.05, False),
            "b.weight": (0.5, True),
            "b.bias": (0.5, False),
            "temperature": (0.5, decays),
        }


def test_half_precision_stays_near_the_full_one(shapes: Path, tmp_path: Path):
    validate = {"data": str(shapes), "every": 4, "limit": 16}
    full = run(shapes, tmp_path / "full", steps=4, validate=validate)
    half = run(shapes, tmp_path / "half", steps=4, validate=validate, precision="bf16")
    assert half.last != full.last
    assert half.last == pytest.approx(full.last, rel=0.05)


def test_half_precision_is_what_auto_takes_where_the_cpu_computes_it(monkeypatch: pytest.MonkeyPatch):
    for able, compute in (({"avx512_bf16": True}, torch.bfloat16), ({"avx2": True}, None)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda able=able: able)
        chosen = Precision.choose("auto", torch.device("cpu"))
        assert (chosen.compute, chosen.half) == (compute, compute or torch.float32)
        assert Precision.choose("bf16", torch.device("cpu")).compute is torch.bfloat16


def test_precision_and_device_that_are_not_there_are_refused():
    with pytest.raises(ConfigError, match="fp16 needs CUDA"):
        Precision.choose("fp16", torch.device("cpu"))
    with pytest.raises(ConfigError, match="'gpu' is none"):
        rank_device("gpu")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="sees no CUDA device"):
            rank_device("cuda:0")


def test_a_batch_that_ranks_and_parts_cannot_share_is_refused(shapes: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="accumulate"):
        run(shapes, tmp_path / "run", batch_size=16, accumulate=3)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_batches_come_in_order_and_an_error_in_one_comes_through(workers: int):
    with read_ahead(lambda number: number * 10, range(3, 20), workers) as batches:  # type: ignore[arg-type]
        assert list(batches) == [number * 10 for number in range(3, 20)]

    def broken(number: int) -> int:
        return 1 // (5 - number)

    with read_ahead(broken, range(20), workers) as batches, pytest.raises(ZeroDivisionError):  # type: ignore[arg-type]
        list(batches)


def test_training_leaves_the_caller_s_random_numbers_alone(shapes: Path, tmp_path: Path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    run(shapes, tmp_path / "run", steps=1)
    assert torch.equal(torch.rand(3), expected)


def test_the_command_prints_the_model_s_folder_and_a_stop_is_exit_code_130(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(tiny.recipe(shapes, tmp_path / "run")))  # JSON is YAML
    monkeypatch.setattr(parts, "named_parts", lambda *_: tiny.parts())
    command.train(str(recipe), ["steps=1"])
    assert capsys.readouterr().out.strip() == str(tmp_path / "run" / "model")

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train", lambda _: SimpleNamespace(model=tmp_path))
        command.train(str(recipe), ["steps=1"])
    assert capsys.readouterr().out == "", "only the first rank prints it"

    def stopped(_: object) -> None:
        raise loop.Interrupted("stopped after step 7")

    monkeypatch.setattr(loop, "train", stopped)
    with pytest.raises(typer.Exit) as end:
        command.train(str(recipe), ["steps=1"])
    assert end.value.exit_code == 130
    assert "stopped after step 7" in capsys.readouterr().err


def test_without_tensorboard_one_line_says_so_and_the_log_is_the_same(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    run(shapes, tmp_path / "with", steps=2)
    assert list((tmp_path / "with" / "tensorboard").glob("events*"))
    assert "TensorBoard" not in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    run(shapes, tmp_path / "without", steps=2)
    assert capsys.readouterr().err.count('pip install "blip2[train]"') == 1
    assert metrics(tmp_path / "without") == metrics(tmp_path / "with")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("precision", ["auto", "fp16", "fp32"])
def test_cuda_trains_like_the_cpu(shapes: Path, tmp_path: Path, precision: str):
    for stage in (1, 2):
        cpu = run(shapes, tmp_path / f"cpu{stage}", stage=stage, steps=4)
        cuda = run(shapes, tmp_path / f"cuda{stage}", stage=stage, steps=4, device="cuda", precision=precision)
        assert cuda.last == pytest.approx(cpu.last, rel=1e-3 if precision == "fp32" else 0.05)
