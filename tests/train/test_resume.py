"""A run that is killed, stopped or cut off goes on as if nothing had happened, bit for bit on a CPU."""

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
from processes import finish, run_tiny, said, start, wait_for_lines

from blip2.train import checkpoint
from blip2.train.recipe import parse


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.draw_shapes(tmp_path_factory.mktemp("shapes"), 32, seed=0)


def long_recipe(data: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """Everything that has state: dropout, drawn negatives, an average, validation and the best of it, threads."""
    parts = {"model": tiny.model(dropout=0.2), "ema": 0.9, "workers": 2, "features": {"augment": True}}
    values = {"steps": 24, "save_every": 3, "validate": {"data": str(data), "every": 7, "limit": 16}, "accumulate": 2}
    return tiny.recipe(data, output, **(parts | values | changes))


def outcome(output: Path) -> tuple[bytes, bytes]:
    return (output / "metrics.jsonl").read_bytes(), (output / "model" / "bridge.safetensors").read_bytes()


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[tuple[bytes, bytes], float]:
    """What the run comes to when left alone, and the seconds it takes."""
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    run_time = time.monotonic()
    assert finish(start(run_tiny, long_recipe(data, output))) == 0
    return outcome(output), time.monotonic() - run_time


@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_any_moments_it_gives_the_same_numbers_and_the_same_model(
    kills: int, data: Path, tmp_path: Path, undisturbed: tuple[tuple[bytes, bytes], float]
):
    expected, seconds = undisturbed
    moments = random.Random(kills)
    ends: list[int | None] = []
    for _ in range(kills):
        process = start(run_tiny, long_recipe(data, tmp_path / "run"))
        process.join(moments.uniform(0, seconds))
        process.kill()
        ends.append(finish(process))
    assert -signal.SIGKILL in ends, "no run was killed before its end"
    assert finish(start(run_tiny, long_recipe(data, tmp_path / "run"))) == 0
    assert outcome(tmp_path / "run") == expected


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_by_a_signal_it_saves_the_step_says_how_to_go_on_and_does(
    number: int,
    data: Path,
    tmp_path: Path,
    undisturbed: tuple[tuple[bytes, bytes], float],
):
    process = start(run_tiny, long_recipe(data, tmp_path / "run"))
    wait_for_lines(tmp_path / "run" / "metrics.jsonl", 5, process)
    assert process.pid is not None
    os.kill(process.pid, number)
    assert finish(process) == 130
    saved = checkpoint.latest(tmp_path / "run" / "checkpoints")
    assert saved is not None
    steps = [line for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines() if "validation" not in line]
    assert checkpoint.read(saved)["step"] == len(steps), "the step that was under way is finished and saved"
    assert f"stopped after step {len(steps)} of 24" in said(long_recipe(data, tmp_path / "run")).read_text()
    assert finish(start(run_tiny, long_recipe(data, tmp_path / "run"))) == 0
    assert outcome(tmp_path / "run") == undisturbed[0]


def test_a_second_run_in_the_folder_ends_with_an_error_and_the_first_goes_on(
    data: Path, tmp_path: Path, undisturbed: tuple[tuple[bytes, bytes], float]
):
    first = start(run_tiny, long_recipe(data, tmp_path / "run"))
    wait_for_lines(tmp_path / "run" / "metrics.jsonl", 1, first)
    assert finish(start(run_tiny, long_recipe(data, tmp_path / "run"))) == 1
    assert "another run writes here now" in said(long_recipe(data, tmp_path / "run")).read_text()
    assert finish(first) == 0
    assert outcome(tmp_path / "run") == undisturbed[0]


def test_what_a_kill_left_half_written_is_no_checkpoint_and_goes(data: Path, tmp_path: Path):
    recipe = parse(tiny.recipe(data, tmp_path / "run", steps=4))
    assert finish(start(run_tiny, recipe.values())) == 0
    whole = outcome(tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    (folder / "step-00000008.pt.partial").write_bytes(b"half")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as log:
        log.write('{"step": 5, "lr": 0.0')
    assert finish(start(run_tiny, recipe.values())) == 0
    assert outcome(tmp_path / "run") == whole
    assert not list(folder.glob("*.partial"))
