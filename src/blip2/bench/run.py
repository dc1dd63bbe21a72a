"""The rows of `blip2 bench`: what a model takes for the work that people give it, beside what the machine allows."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from blip2 import bulk
from blip2.bench import work
from blip2.bench.clock import Timing, resident_peak, timed
from blip2.bench.machine import PRECISIONS, Rates
from blip2.blip2 import Blip2
from blip2.decoding import BEAMS
from blip2.errors import ConfigError

TOKENS, ANSWER_TOKENS = 20, 10
REPEATS, BUDGET = 3, 6.0  # runs of a row at most, and the seconds after which no further one begins
BATCHES = (1, 2, 4, 8, 16)
BULK_BUDGET = 60.0  # seconds after which no larger batch is tried
PICTURES = 32  # of a folder at most
MATCHED = 8
QUESTIONS = (
    *("what is in the picture?", "how many people are there?", "what color is the sky?", "is it day or night?"),
    *("where was this taken?", "what is the weather like?", "is there an animal?", "what is on the left?"),
    *("is anybody smiling?", "what happens next?"),
)
TEXTS = tuple(
    f"{who} {where}"
    for who in ("a dog", "a child", "two people", "a red car", "a cat", "an old man", "a group of friends", "a bird")
    for where in ("on a beach", "in front of a house", "in the snow", "at night in the city")
)


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        what: was done.
        seconds: of each run, after one that warmed up.
        count, unit: how many of what came out of a run.
        limit: the least seconds that the machine's measured rates allow; None where a part's size is not known.
        bandwidth: bytes of weights a second, each read as often as it must be; operations: a second. None as `limit`.
    """

    what: str
    seconds: tuple[float, ...]
    count: int
    unit: str
    limit: float | None = None
    bandwidth: float | None = None
    operations: float | None = None

    @property
    def median(self) -> float:
        """Seconds of the middle run."""
        return Timing(self.seconds).median

    @property
    def pace(self) -> float:
        """Of `unit` in a second."""
        return self.count / self.median


@dataclass(frozen=True)
class Bench:
    """Rows are measured one by one, as they are asked for.

    Attributes:
        precision: of the frozen parts' weights: a dtype's name, `int8`, `fp8` or `int4`.
        images: picture files; pictures of noise are drawn where there are none.
    """

    model: Blip2
    rates: Rates
    precision: str
    images: Sequence[Path] = ()

    def rows(self) -> Iterator[Row]:
        """Every row that the model can do.

        Raises:
            ImageError: a picture cannot be read.
        """
        with tempfile.TemporaryDirectory() as folder:
            files = list(self.images[:PICTURES]) or _drawn(Path(folder))
            if self.model.language is not None:
                yield from self._writing(files)
            if self.model.bridge.heads is not None:
                yield self._matching(files[:MATCHED])
            if self.model.language is not None:
                yield from self._folder(files, Path(folder))

    def _writing(self, files: list[Path]) -> Iterator[Row]:
        model, photo, config = self.model, files[0], self.model.config
        exactly: Any = {"min_new_tokens": TOKENS, "max_new_tokens": TOKENS}
        for beams in (1, BEAMS):
            passes = work.writing(config, images=1, texts=1, prompt=1, tokens=TOKENS, beams=beams)
            how = "greedy" if beams == 1 else f"{beams} beams"
            yield self._row(
                f"one caption, {TOKENS} tokens, {how}",
                lambda beams=beams: model.caption(photo, num_beams=beams, **exactly),
                (TOKENS, "tokens"),
                passes,
            )
        some: Any = {"num_beams": 1, "min_new_tokens": ANSWER_TOKENS, "max_new_tokens": ANSWER_TOKENS}
        passes = work.writing(config, images=1, texts=len(QUESTIONS), prompt=12, tokens=ANSWER_TOKENS, beams=1)
        yield self._row(
            f"{len(QUESTIONS)} questions about one image, {ANSWER_TOKENS} tokens each, greedy",
            lambda: model.ask(photo, QUESTIONS, **some),
            (len(QUESTIONS), "answers"),
            passes,
        )

    def _matching(self, files: list[Path]) -> Row:
        pairs = len(files) * len(TEXTS)
        length = float(self.model.text_ids(TEXTS).ne(self.model.config.qformer.pad_id).sum()) / len(TEXTS)
        return self._row(
            f"match {len(files)} images with {len(TEXTS)} texts",
            lambda: self.model.match(files, TEXTS),
            (pairs, "pairs"),
            work.matching(self.model.config, images=len(files), texts=len(TEXTS), length=length),
        )

    def _folder(self, files: list[Path], folder: Path) -> Iterator[Row]:
        """Captions of a folder, as `blip2 caption FOLDER --out FILE` writes them, at some batch sizes."""
        spent = 0.0
        for size in BATCHES:
            some = files[: max(2 * size, 4)]
            if len(some) < size or spent > BULK_BUDGET:
                return
            out = folder / f"{size}.jsonl"
            found = timed(lambda: bulk.caption_files(self.model, some, out, batch_size=size), self.model.device, 1)  # noqa: B023
            spent += found.median
            yield Row(f"captions of a folder, {BEAMS} beams, batches of {size}", found.seconds, len(some), "captions")

    def _row(self, what: str, call: Callable[[], Any], made: tuple[int, str], passes: work.Passes | None) -> Row:
        call()  # to warm up
        found = timed(call, self.model.device, REPEATS, BUDGET)
        if passes is None:
            return Row(what, found.seconds, *made)
        total, size = passes.total, PRECISIONS[self.precision]
        return Row(
            what, found.seconds, *made, passes.seconds(self.rates, self.precision),
            total.weights * size / found.median, total.operations / found.median,
        )  # fmt: skip


def precision(model: Blip2, quantize: str | None) -> str:
    """What the frozen parts' weights are held in."""
    name = quantize or str(model.dtype).removeprefix("torch.")
    if name not in PRECISIONS:
        raise ConfigError(f"{name}: there is no limit for weights of this kind; known are {', '.join(PRECISIONS)}")
    return name


def peak_memory(device: torch.device) -> int:
    """The most bytes so far: of the device, or of this process where it is the CPU; 0 where the system is silent."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident_peak()


def _drawn(folder: Path) -> list[Path]:
    """Different pictures of coloured noise, 640 by 480."""
    place = folder / "pictures"
    place.mkdir()
    draw = np.random.default_rng(0)
    made: list[Path] = []
    for number in range(PICTURES):
        noise = draw.integers(0, 256, (12 + number, 16, 3), dtype=np.uint8)
        made.append(place / f"{number:02}.jpg")
        Image.fromarray(noise).resize((640, 480)).save(made[-1])
    return made
