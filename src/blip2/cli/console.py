"""The terminal: results on stdout, everything else on stderr, and errors as one line that tells the way out."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Collection, Generator, Iterable, Sequence
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich.console
import rich.progress
import rich.table
import rich.text

import blip2
from blip2.errors import Blip2Error

if TYPE_CHECKING:
    from blip2 import bulk, image
    from blip2.batching import BatchSize
    from blip2.blip2 import Blip2


def stderr() -> rich.console.Console:
    """For everything that is not a result."""
    return rich.console.Console(stderr=True, highlight=False, soft_wrap=True)


def note(text: str) -> None:
    """One line for a person, on stderr."""
    print(text, file=sys.stderr, flush=True)


def result(text: str) -> None:
    """One line of the result, on stdout at once: what is finished is not lost when the command is stopped."""
    print(text, flush=True)


def one_line(text: str) -> str:
    """A generated text without its line breaks, so that a line stays a line."""
    return " ".join(text.split())


def result_json(value: dict[str, Any]) -> None:
    """One JSON object on one line of stdout."""
    result(json.dumps(value, ensure_ascii=False))


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], right: Collection[str] = ()) -> None:
    """A table for people on stdout; the columns named in `right` hold numbers."""
    drawn = rich.table.Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        drawn.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*(rich.text.Text(cell) for cell in row))
    wide = None if sys.stdout.isatty() else 1000  # a file has no edge to fold at
    rich.console.Console(highlight=False, width=wide).print(drawn)


def listing(columns: Sequence[str], rows: Iterable[Sequence[str]], right: Collection[str] = ()) -> None:
    """A table on a terminal, tab-separated lines without a head elsewhere."""
    if sys.stdout.isatty():
        table(columns, rows, right)
        return
    for row in rows:
        result("\t".join(row))


class _Pace(rich.progress.ProgressColumn):
    """How many a second, over the last of them."""

    def render(self, task: rich.progress.Task) -> rich.text.Text:
        return rich.text.Text("" if task.speed is None else f"{task.speed:.1f}/s")


@contextmanager
def progress(what: str, total: int | None) -> Generator[rich.progress.Progress]:
    """A bar with one task on stderr, if that is a terminal; `advance(TASK)` moves it."""
    columns = (
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        _Pace(),
        rich.progress.TimeRemainingColumn(),
    )
    bars = rich.progress.Progress(
        *columns,
        console=stderr(),
        transient=True,
        redirect_stdout=sys.stdout.isatty(),  # or results would leave the pipe for the bar's terminal
        disable=not sys.stderr.isatty(),
    )
    with bars:
        bars.add_task(what, total=total)
        yield bars


TASK = rich.progress.TaskID(0)


def of_readable(
    verb: Callable[[Any], Iterable[Any]],
    files: Sequence[Path],
    transform: image.Transform,
    size: BatchSize,
    failed: list[bulk.Failure],
) -> Generator[tuple[Path, Any]]:
    """What a verb gives for each image that can be read, in order, as it comes, with a bar; see `bulk.each`.

    Args:
        failed: takes the others as they come, which are named on stderr. Close the generator: it holds the bar.
    """
    from blip2 import bulk

    with progress("images", len(files)) as bars, closing(bulk.each(verb, files, transform, size)) as stream:
        for batch in stream:
            for path, row in batch:
                if isinstance(row, bulk.Failure):
                    failed.append(row)
                    note(f"error: {row.error}")
                else:
                    yield path, row
            bars.advance(TASK, len(batch))


def open_model(
    name: str, device: str, dtype: str, quantize: str | None = None, calibration: Path | bool = True
) -> Blip2:
    """`blip2.load`, with a word about it on a terminal; from then on this process keeps the memory it computes in."""
    from blip2 import pages

    with stderr().status(f"loading {name}") if sys.stderr.isatty() else nullcontext():
        model = blip2.load(name, device=device, dtype=dtype, quantize=quantize, calibration=calibration)
    pages.keep()
    return model


def fail(error: Exception) -> int:
    """Show an error that ends the command, in one line; `BLIP2_DEBUG=1` shows where it came from. The exit code."""
    if os.environ.get("BLIP2_DEBUG"):
        traceback.print_exception(error)
    if isinstance(error, Blip2Error | OSError):
        note(f"error: {error}")
    else:
        name = type(error).__name__
        note(f"error: {name}: {error} (a fault of blip2: please report it, with what BLIP2_DEBUG=1 shows)")
    return 1
