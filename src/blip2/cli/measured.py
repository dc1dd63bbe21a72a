"""What the commands of `blip2 evaluate` share: bars, tables, and the folder that results are kept in."""

from __future__ import annotations

import dataclasses
import hashlib
import shlex
import sys
import time
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich.progress
import typer

from blip2.cli.console import note, stderr, table
from blip2.cli.options import check_out
from blip2.errors import ConfigError, MissingExtraError

if TYPE_CHECKING:
    from blip2.blip2 import Blip2
    from blip2.evaluate.estimate import Estimate
    from blip2.evaluate.kept import Kept
    from blip2.evaluate.run import NamedProgress
    from blip2.evaluate.writing import Written

QUIET = "question type: "  # VQAv2 has 65 of them: in the files, not on the screen


@dataclass(frozen=True)
class Measurement:
    """One run of a command.

    Attributes:
        task: the command.
        about: what the results depend on: data, model, protocol.
        out: the folder that keeps them, if any.
        report: the page to write, if any.
    """

    task: str
    out: Path | None
    report: Path | None
    about: Mapping[str, Any]
    started: float = field(default_factory=time.monotonic)

    @classmethod
    def of(
        cls, task: str, data: str, model: str, quantize: str | None, out: Path | None, report: Path | None
    ) -> Measurement:
        """What is known before anything is read.

        Raises:
            ConfigError: the report cannot be written there.
        """
        if report is not None:
            check_out(report)
        return cls(task, out, report, {"data": data, "model": model, "quantize": quantize})

    def with_model(self, model: Blip2, samples: Iterable[str], **settings: Any) -> Measurement:
        """With what is known once the model is there.

        Args:
            samples: ids and words of the whole set.
            settings: of the protocol.
        """
        from blip2.evaluate.kept import identity

        kind = str(model.dtype).removeprefix("torch.")
        read = {"samples": digest(samples), "identity": identity(model), "dtype": kind}
        return dataclasses.replace(self, about={**self.about, **read, **settings})

    @contextmanager
    def kept(self) -> Generator[Kept]:
        """What the folder has of this run already."""
        from blip2.evaluate.kept import keeping

        with keeping(self.out, {"task": self.task, **self.about}) as kept:
            if kept.rows:
                note(f"{len(kept.rows)} are there already")
            yield kept

    def settings(self) -> dict[str, Any]:
        """What a page says of how the numbers were made."""
        return {**self.about, "command": command(), "seconds": self.seconds}

    @property
    def seconds(self) -> float:
        """Since the command began, to a tenth."""
        return round(time.monotonic() - self.started, 1)

    def finish(
        self,
        numbers: Mapping[str, Estimate | float],
        predictions: Iterable[Any] | None = None,
        *,
        floors: Mapping[str, str] | None = None,
        **more: Any,
    ) -> None:
        """Show the numbers, and put them into the folder.

        Args:
            predictions: what the official evaluation reads.
            floors: beside each number, what it has to beat.
            more: what else to write into `numbers.json`.
        """
        show({name: found for name, found in numbers.items() if not name.startswith(QUIET)}, floors)
        if self.out is None:
            return
        from blip2.evaluate.kept import write_json, write_rows

        if predictions is not None:
            write_rows(self.out / "predictions.json", predictions)
        values = {name: found if isinstance(found, float | int) else asdict(found) for name, found in numbers.items()}
        content = {"task": self.task, "numbers": values, **self.about, "command": command(), "seconds": self.seconds}
        write_json(self.out / "numbers.json", {**content, **more})


def command() -> str:
    """What was typed."""
    return shlex.join(["blip2", *sys.argv[1:]])


def digest(texts: Iterable[str]) -> str:
    """A short name of some data: of its ids and words, in order."""
    found = hashlib.sha256()
    for text in texts:
        found.update(f"{len(text)} {text}".encode("utf-8", "replace"))
    return found.hexdigest()[:16]


def show(numbers: Mapping[str, Estimate | float], floors: Mapping[str, str] | None = None) -> None:
    """A table on stdout."""
    columns = ["measure", "value", "95% interval", *(["floor"] if floors else [])]
    rows = [
        [name, *_cells(found), *([floors.get(name, "")] if floors else [])]
        for name, found in numbers.items()
    ]  # fmt: skip
    if rows:
        table(columns, rows, right=columns[1:])


def _cells(found: Estimate | float) -> list[str]:
    if isinstance(found, float | int):
        return [f"{found:.3f}", ""]
    return [f"{found.value:.3f}", f"{found.low:.3f} to {found.high:.3f}"]


@contextmanager
def bars() -> Generator[NamedProgress]:
    """A bar on stderr for each thing that is done, if that is a terminal."""
    shown = rich.progress.Progress(console=stderr(), disable=not sys.stderr.isatty())
    tasks: dict[str, rich.progress.TaskID] = {}

    def show(what: str, done: int, total: int) -> None:
        if what not in tasks:
            tasks[what] = shown.add_task(what, total=total)
        shown.update(tasks[what], completed=done)

    with shown:
        yield show


def java_splits(asked: bool | None, spice: bool) -> bool:
    """Whether Java splits the captions: it has to where it was asked for by name, else where one works.

    Raises:
        MissingExtraError, ConfigError: what was asked for cannot be had; said before the first caption is written.
    """
    from blip2.evaluate.captioning import check_tools

    wanted = spice if asked is None else asked
    check_tools(java=wanted, spice=spice)
    if wanted or asked is not None:
        return wanted
    try:
        check_tools()
    except (MissingExtraError, ConfigError) as error:
        note(f"no METEOR, and captions are split by our own rules: {error}")
        return False
    return True


def tell_failed(failed: Mapping[str, str], written: Sequence[Written], java: bool | None) -> None:
    """Say what Java failed at, and why, and what `tell_unread` says; end with 1 where it was asked for by name.

    Args:
        java: whether it was; SPICE always is.
    """
    from blip2.evaluate.captioning import TOKENIZER

    for name, why in failed.items():
        without = "Java's tokenizer failed, without which there is no METEOR" if name == TOKENIZER else f"no {name}"
        note(f"error: {without}: {why}")
    tell_unread(written)
    if failed and (java or "SPICE" in failed):
        raise typer.Exit(1)


def tell_unread(written: Sequence[Written]) -> None:
    """Name pictures that could not be read, and end with 1: their texts are empty, and count so."""
    errors = list(dict.fromkeys(found.error for found in written if found.error))
    for error in errors:
        note(f"error: {error}")
    if errors:
        note(f"{len(errors)} pictures could not be read: their texts are empty, and are scored so")
        raise typer.Exit(1)
