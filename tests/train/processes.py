"""Runs of the tiny parts in processes of their own, which may be killed. A server that has torch already forks them."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blip2.train.parts import Parts

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tiny", "blip2.train.loop", "torch.utils.tensorboard"])


def start(target: Callable[..., None], *args: Any, **environment: str) -> ForkServerProcess:
    """A process that runs `target` with these environment variables."""
    process = _context.Process(target=_enter, args=(target, args, environment))
    process.start()
    return process


def finish(process: ForkServerProcess, seconds: float = 120) -> int | None:
    """Wait for the end; the exit code."""
    process.join(seconds)
    assert not process.is_alive(), "the process hangs"
    return process.exitcode


def run_tiny(values: dict[str, Any]) -> None:
    """One run of the tiny parts, see `_run`."""
    import tiny

    _run(values, tiny.parts())


def run_start(values: dict[str, Any]) -> None:
    """One run of the model that the recipe starts from, see `_run`."""
    _run(values, None)


def _run(values: dict[str, Any], parts: Parts | None) -> None:
    """As the command line makes it: an interruption is exit code 130. What it says goes into `said`."""
    from blip2.errors import Blip2Error
    from blip2.train.loop import Interrupted, train
    from blip2.train.recipe import parse

    with said(values).open("a") as file:
        os.dup2(file.fileno(), 2)
    try:
        train(parse(values), parts)
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        sys.exit(130)
    except Blip2Error as error:
        print(error, file=sys.stderr)
        sys.exit(1)


def said(values: dict[str, Any]) -> Path:
    """The file that a run's standard error goes into."""
    return Path(f"{values['output']}.said")


def run_ranks(
    values: dict[str, Any], ranks: int, target: Callable[[dict[str, Any]], None] = run_tiny
) -> list[int | None]:
    """The same run on several ranks of this machine, as `torchrun` starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [start(target, values, **common, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(ranks)]
    return [finish(process) for process in processes]


def wait_for_lines(path: Path, count: int, process: ForkServerProcess) -> None:
    """Until a log has so many lines."""
    while len(path.read_text().splitlines() if path.is_file() else ()) < count:
        assert process.is_alive(), "the run ended too early"
        time.sleep(0.005)


def _enter(target: Callable[..., None], args: tuple[Any, ...], environment: dict[str, str]) -> None:
    os.environ.update(environment)
    target(*args)
