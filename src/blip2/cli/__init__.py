"""The command line `blip2`: one file a command group, each a thin face over the verbs of `Blip2`."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

import blip2
from blip2.cli import (
    ask,
    bench,
    calibrate,
    caption,
    classify,
    convert,
    dedupe,
    embed,
    evaluate,
    explain,
    filter,
    index,
    info,
    match,
    search,
    train,
    verify,
)
from blip2.cli.console import fail

app = typer.Typer(
    name="blip2",
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"blip2 {blip2.__version__}")
        raise typer.Exit


@app.callback(no_args_is_help=True)
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Captions, answers, matches and search for images, by BLIP-2.

    Results go to stdout, everything else to stderr. Exit codes: 0 done, 1 something failed, 2 the command was not
    understood, 130 stopped with Ctrl-C, which loses nothing that was finished.

    ```
    blip2 caption photo.jpg
    blip2 ask photo.jpg "what is the dog doing?"
    blip2 search holiday/ "a dog on a beach"
    ```
    """
    del version


app.command()(caption.caption)
app.command()(ask.ask)
app.command()(ask.chat)
app.command()(match.match)
app.command()(explain.explain)
app.command()(classify.classify)
app.command()(calibrate.calibrate)
app.command()(filter.filter)
app.command()(embed.embed)
app.command()(index.index)
app.command()(search.search)
app.command()(dedupe.dedupe)
app.command()(info.info)
app.command()(convert.convert)
app.command()(verify.verify)
app.command(short_help="Train a bridge on your own data.")(train.train)
app.command()(bench.bench)
app.add_typer(evaluate.app, name="evaluate")


def main() -> None:
    """The entry point of the `blip2` command: errors become one line on stderr and an exit code."""
    try:
        app(prog_name="blip2")
    except Exception as error:  # of any kind: a person at a terminal gets a line, not a traceback
        sys.exit(fail(error))
    finally:
        _flush()


def _flush() -> None:
    """What is left in stdout goes out now; a reader that has left is no fault."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at the very end
