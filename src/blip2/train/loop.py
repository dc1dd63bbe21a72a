"""The training loop. Data, objective, parallelism, folder and log are values that it is handed.

Every random draw is a function of (seed, step, rank): a run that was killed goes on from its last checkpoint with the
same numbers, bit for bit on a CPU, as if it had never stopped.
"""

from __future__ import annotations

import gc
import math
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from types import FrameType

import torch

from blip2.train import checkpoint, distributed, optimizer, report
from blip2.train.checkpoint import Average, State
from blip2.train.distributed import World
from blip2.train.draws import draw_seed
from blip2.train.folder import Folder, open_folder
from blip2.train.log import Log, say
from blip2.train.objectives import Batch
from blip2.train.parts import Job, Parts, assemble
from blip2.train.recipe import Recipe
from blip2.train.report import Report
from blip2.train.update import Precision, Update

_PATIENCE = 2.0  # seconds in which a second signal is taken for an echo of the first (torchrun sends one)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM came; the step was finished and saved. The message says how to go on."""


def train(recipe: Recipe, parts: Parts | None = None) -> Report:
    """Train as the recipe says, or go on where its output folder stands.

    Args:
        parts: the frozen parts; None for those that the recipe's model names.
    Returns:
        What the run came to; it is in the folder too, with the model.
    Raises:
        ConfigError: a key that does not fit the model or the data, or a folder of another run.
        DataError: training data that cannot be read.
        CheckpointError: a checkpoint that does not fit, or cannot be written (a full disk).
        Blip2Error: the loss or the gradient is no number any more.
        Interrupted: Ctrl-C or SIGTERM.
    Source: BLIP-2, section 3.
    """
    with distributed.world(recipe.device) as world, open_folder(recipe, world) as folder:
        device = distributed.rank_device(recipe.device, world.local_rank, world.size)
        precision = Precision.choose(recipe.precision, device)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(draw_seed(recipe.seed, "initial weights"))
            job = assemble(recipe, parts, world, device, precision.half)
            return fit(recipe, job, world, folder, device, precision)


def fit(recipe: Recipe, job: Job, world: World, folder: Folder, device: torch.device, precision: Precision) -> Report:
    """The loop itself: from the folder's last checkpoint to the last step, the model and the report."""
    parameters = optimizer.choose(job.trained, recipe)
    adamw = optimizer.adamw(parameters, recipe)
    shares = optimizer.start_shares(parameters, recipe)
    average = Average(parameters, recipe.ema, shares) if recipe.ema or shares else None
    state = State(job.trained, adamw, precision.scaler(), average)
    if last := checkpoint.latest(folder.checkpoints):
        state.restore(last)
        if world.rank == 0:
            say(f"goes on from {last}")
    world.wait()  # nobody writes before all have read
    update = Update(recipe, world.wrap(job.objective), job.epoch_steps, state, world, device, precision)
    parts = range(state.step * recipe.accumulate, recipe.steps * recipe.accumulate)
    with (
        _unsearched(),
        _open_log(recipe, world, folder, state.step) as log,
        stop_signals() as stop,
        read_ahead(job.batches, parts, recipe.workers) as batches,
    ):
        while state.step < recipe.steps:
            made = update(batches, stop.asked)
            if log:
                log.step(state.step, made.rate, made.losses, made.norm)
            last_one = state.step == recipe.steps
            if recipe.validate_ and (last_one or state.step % recipe.validate_.every == 0):
                validate(job, state, world, folder, precision, log)
            if world.rank == 0 and (last_one or made.stop or state.step % recipe.save_every == 0):
                checkpoint.save(folder.checkpoints, state)
            if made.stop and not last_one:
                raise Interrupted(
                    f"stopped after step {state.step} of {recipe.steps}, which is saved in {folder.path}; "
                    "the same command goes on from there"
                )
    return finish(recipe, job, state, world, folder, device, sum(p.numel() for p in parameters.values()))


@contextmanager
def _unsearched() -> Generator[None]:
    """Garbage is looked for among new objects only: pictures and words by the million took a tenth of a step."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def validate(job: Job, state: State, world: World, folder: Folder, precision: Precision, log: Log | None) -> None:
    """Look at held-out data, and keep the weights if none were better."""
    assert job.validate is not None  # the recipe has the key
    with state.average.applied() if state.average else nullcontext():
        job.trained.eval()
        with precision.autocast():
            metrics, score = job.validate()
        if state.best is None or better(score, state.best[1]):
            state.best = (state.step, score)
            if world.rank == 0:
                checkpoint.write(folder.best, {"step": state.step, "bridge": job.trained.state_dict()})
    if log:
        log.validation(state.step, metrics)


def better(score: float, best: float) -> bool:
    """Whether a score beats the best so far; any number beats one that is none."""
    return score > best or (math.isnan(best) and not math.isnan(score))


def finish(
    recipe: Recipe, job: Job, state: State, world: World, folder: Folder, device: torch.device, parameters: int
) -> Report:
    """Save the model, of the best or the last weights, and the report."""
    world.wait()  # for rank 0 to have written its last file
    selected = state.step
    if recipe.validate_ and recipe.validate_.select == "best":
        best = checkpoint.read(folder.best)
        job.trained.load_state_dict(best["bridge"])
        selected = best["step"]
    elif state.average:
        state.average.apply()
    if world.rank == 0:
        job.save(folder.model)  # before the report, which is worth less
    made = report.make(folder, recipe, seconds=state.seconds, selected=selected, parameters=parameters, device=device)
    if world.rank == 0:
        report.write(made, folder)
    world.wait()  # the model is there when any rank returns
    return made


@contextmanager
def read_ahead(
    batches: Callable[[int], Batch], numbers: Sequence[int], workers: int
) -> Generator[Iterator[Batch], None, None]:
    """The batches in order, prepared by threads while the model computes (opening pictures frees the interpreter)."""
    if workers == 0:
        yield map(batches, numbers)
        return
    with ThreadPoolExecutor(workers) as pool:
        rest = iter(numbers)
        waiting: deque[Future[Batch]] = deque()

        def in_order() -> Iterator[Batch]:
            waiting.extend(pool.submit(batches, number) for number in islice(rest, 2 * workers))
            while waiting:
                batch = waiting.popleft().result()
                waiting.extend(pool.submit(batches, number) for number in islice(rest, 1))
                yield batch

        try:
            yield in_order()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


@dataclass
class Stop:
    """Whether somebody asked the run to stop, and when."""

    asked: bool = False
    when: float = 0.0


@contextmanager
def stop_signals() -> Generator[Stop, None, None]:
    """Ctrl-C and SIGTERM ask for a clean stop; a second one stops at once. Only the main thread can listen."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        if not stop.asked:
            stop.asked, stop.when = True, time.monotonic()
            say("stopping: finishes this step and saves it first; once more to stop at once")
        elif time.monotonic() - stop.when > _PATIENCE:
            raise KeyboardInterrupt

    earlier = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def _open_log(recipe: Recipe, world: World, folder: Folder, done: int) -> AbstractContextManager[Log | None]:
    return Log(folder, recipe.steps, done, recipe.log_every) if world.rank == 0 else nullcontext()
