"""What every side of a benchmark shares: the work, what it is done on, and a process of its own for each side."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks import geometry
from benchmarks.exactness import as_published
from blip2.bench.clock import AnonymousMemory, resident_peak, timed
from blip2.config import PRESETS, Blip2Config, VisionConfig
from blip2.device import computes

CPU = torch.device("cpu")
TOKENS, BEAMS = 20, 5  # of a caption
PROMPT = " ".join(f"w{100 + number}" for number in range(12))  # 45 positions with 32 queries and the begin token
QUESTIONS, ANSWER_TOKENS = 10, 10
IMAGES, TEXTS = 8, 32
PHOTOS = 200
WORDS = 10  # tokens that a caption of `mini` has, about: what its limit is reckoned with
PRESET = {"opt2.7b": "pretrain_opt2.7b", "flan-t5-xl": "pretrain_flant5xl", "itm-vit-g": "pretrain"}
MINI = "mini"
HALF = "bfloat16" if computes(torch.bfloat16, CPU) else "float32"
OURS: dict[str, dict[str, Any]] = {  # keywords of `load` for each precision
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": HALF, "quantize": "int8"},
    "int4": {"dtype": HALF, "quantize": "int4"},
}


@dataclass(frozen=True)
class Job:
    """One side of some rows of one model, for a process of its own.

    Attributes:
        side: `ours` or `theirs`.
        rows: that are wanted of it, in order.
        folder: where the models lie.
        photos: the picture files of `mini`'s rows.
        repeats, budget: runs of a call at most, and the seconds after which no further one begins.
    """

    model: str
    side: str
    precision: str
    rows: tuple[str, ...]
    folder: str
    threads: int
    repeats: int = 3
    budget: float = 30.0
    photos: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        return f"{self.model} {self.side} {self.precision}"

    @property
    def directory(self) -> Path:
        return Path(self.folder, self.model)

    def timed(self, call: Callable[[], Any]) -> list[float]:
        """Seconds of the runs of a call."""
        return [round(each, 4) for each in timed(call, CPU, self.repeats, self.budget).seconds]


@dataclass(frozen=True)
class Memory:
    """Most bytes of a process: all of them, and those that no file backs."""

    resident: int
    anonymous: int


class Watch:
    """Memory of this process, from the start of its work."""

    def __init__(self) -> None:
        self._anonymous = AnonymousMemory()

    def stop(self) -> Memory:
        return Memory(resident_peak(), self._anonymous.start + self._anonymous.stop())


def config(name: str, *, layers: int | None = None, tiny: Blip2Config | None = None) -> Blip2Config:
    """The geometry of a row's model."""
    made = tiny or as_published(PRESETS[PRESET[name]])
    if made.language is not None or layers is None:
        return geometry.shortened(made, layers)
    assert isinstance(made.vision, VisionConfig)
    return made.replace(vision=replace(made.vision, layers=layers))


def pictures(count: int = IMAGES) -> list[Image.Image]:
    """Different pictures of coloured noise."""
    noise = (np.random.default_rng(seed).integers(0, 256, (30, 40, 3), dtype=np.uint8) for seed in range(count))
    return [Image.fromarray(each).resize((320, 240)) for each in noise]


def questions() -> list[str]:
    """Questions of 7 to 10 words, in the words of the made-up tokenizer."""
    return [" ".join(f"w{50 + 11 * row + word}" for word in range(7 + row % 4)) + " ?" for row in range(QUESTIONS)]


def texts() -> list[str]:
    """Captions of 6 to 13 words, in the words of the made-up tokenizer."""
    return [" ".join(f"w{200 + 17 * row + word}" for word in range(6 + row % 8)) for row in range(TEXTS)]


def timed_once(call: Callable[[], Any]) -> list[float]:
    """Seconds of one run: where it is many pictures long, it is its own average."""
    return [round(each, 4) for each in timed(call, CPU, 1).seconds]


def emit(row: str, **values: Any) -> None:
    """Hand a row's result to the process that asked for it."""
    print(json.dumps({"row": row, **values}), flush=True)


def job() -> Job:
    """What this process was asked for; threads are set."""
    values: dict[str, Any] = json.loads(sys.argv[1])
    values |= {name: tuple(values[name]) for name in ("rows", "photos")}
    found = Job(**values)
    torch.set_num_threads(found.threads)
    return found


def results(module: str, asked: Job) -> Iterator[dict[str, Any]]:
    """Results of a job as they come; where its process fails, `error` says with what.

    Args:
        module: that does the job when it is run.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(asked.threads), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", module, json.dumps(asdict(asked))]
    with tempfile.TemporaryFile("w+") as stderr:  # a pipe that nobody empties would stop the process
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith('{"row"'):
                    yield json.loads(line)
        if process.returncode:
            stderr.seek(0)
            killed = f"killed by signal {-process.returncode}: out of memory?" if process.returncode < 0 else ""
            yield {"error": killed or last_line(stderr.read())}


def last_line(said: str) -> str:
    """What a process that failed said last."""
    return (said.strip().splitlines() or ["it said nothing"])[-1]
