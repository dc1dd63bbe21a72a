"""Options that several commands share, stated once.

The decoding options are the parameters of `decoding`; `writes` gives them to a command, which receives the chosen ones
as one value. What is not chosen is left out, so that the defaults of the verbs stay in one place.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import typer

from blip2.errors import ConfigError, PromptError

Chosen: TypeAlias = dict[str, Any]  # keywords of the verbs, see `decoding.Options`
Model = Annotated[
    str, typer.Option("--model", "-m", help="`mini`, a directory, or OWNER/NAME[@REVISION] on the Hugging Face hub.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...", rich_help_panel="Machine")]
Dtype = Annotated[
    str, typer.Option(help="Of the frozen parts: auto, float32, bfloat16, float16.", rich_help_panel="Machine")
]
Quantize = Annotated[
    str | None,
    typer.Option(
        help="Of the frozen parts' blocks: int8, int4, half (16-bit, for CPUs) or fp8 (for GPUs) weights.",
        rich_help_panel="Machine",
        show_default=False,
    ),
]
Calibrated = Annotated[
    Path | None,
    typer.Option(
        "--calibration",
        help="What `blip2 calibrate` wrote for this model. [default: calibration.json beside it, if any]",
        rich_help_panel="Machine",
        show_default=False,
    ),
]
Batch = Annotated[int, typer.Option(min=1, help="Images in one pass.", rich_help_panel="Machine")]
AutoBatch = Annotated[
    int | None,
    typer.Option(
        "--batch-size",
        min=1,
        help="Images in one pass. [default: as many as prove fastest]",
        rich_help_panel="Machine",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object a line instead of text.")]
Details = Annotated[
    bool, typer.Option("--details", help="JSON with tokens, log-probabilities, score and why the text ended.")
]
Paths = Annotated[
    list[Path], typer.Argument(metavar="PATH", help="Image files, folders or patterns.", show_default=False)
]
Image = Annotated[Path, typer.Argument(metavar="IMAGE", help="An image file.", show_default=False)]

_PANEL = "Decoding"


_CHOICE = "Choosing"


class FitBy(StrEnum):
    """By what a text and its image are judged: matching head or vectors."""

    itm = "itm"
    itc = "itc"


BestOf = Annotated[
    int | None,
    typer.Option(min=1, help="Write so many, keep the best.", show_default=False, rich_help_panel=_CHOICE),
]
By = Annotated[FitBy, typer.Option(help="The matching head (itm) or the vectors (itc).", rich_help_panel=_CHOICE)]
Threshold = Annotated[
    float | None,
    typer.Option(help="Keep only what matches so well.", show_default=False, rich_help_panel=_CHOICE),
]


def chosen_of(best_of: int | None, by: FitBy, threshold: float | None = None) -> Chosen:
    """Keywords of `Blip2.caption` for a choice among captions; none where nothing is chosen."""
    if best_of is None and threshold is None:
        return {}
    return {"best_of": best_of, "by": by.value, **({} if threshold is None else {"threshold": threshold})}


def check_texts(what: str, *texts: str) -> None:
    """Refuse texts of nothing before a model is loaded.

    Raises:
        PromptError: one is empty.
    """
    if not all(text.strip() for text in texts):
        raise PromptError(f"{what} is empty: write it in quotes")


def check_out(file: Path) -> None:
    """Refuse a place that no file can be written to, before a model is loaded and works for it.

    Raises:
        ConfigError: its folder does not exist, or it is a folder itself.
    """
    if not file.parent.is_dir():
        raise ConfigError(f"{file}: the folder {file.parent} does not exist; make it first")
    if file.is_dir():
        raise ConfigError(f"{file}: is a folder; name a file in it")


def _option(help: str, *names: str, **limits: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=_PANEL, show_default=False, **limits)


def decoding(
    num_beams: Annotated[int | None, _option("Beams; 1 is greedy. [default: 5]", min=1)] = None,
    max_new_tokens: Annotated[int | None, _option("Longest text, in tokens.", min=1)] = None,
    min_new_tokens: Annotated[int | None, _option("Shortest text, in tokens.", min=0)] = None,
    do_sample: Annotated[bool | None, _option("Draw words instead of taking the likeliest.", "--sample")] = None,
    temperature: Annotated[float | None, _option("Above 1 more varied, below 1 safer; draws.")] = None,
    top_p: Annotated[float | None, _option("Draw from the likeliest words that hold this probability.")] = None,
    top_k: Annotated[int | None, _option("Draw from the k likeliest words.", min=0)] = None,
    repetition_penalty: Annotated[float | None, _option("Above 1: words already used are less likely.")] = None,
    no_repeat_ngram: Annotated[int | None, _option("No run of so many tokens comes twice.", min=0)] = None,
    length_penalty: Annotated[float | None, _option("Above 0 favours long beams, below 0 short ones.")] = None,
    seed: Annotated[int | None, _option("Of the draws: the same seed, the same text.")] = None,
) -> Chosen:
    """The decoding options that were given, as keywords of the verbs."""
    return {name: value for name, value in locals().items() if value is not None}


def writes(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the parameters of `decoding`; it takes the chosen ones as the keyword `options`."""
    shared = inspect.signature(decoding, eval_str=True).parameters
    own = inspect.signature(command, eval_str=True).parameters

    @functools.wraps(command)
    def call(**values: Any) -> None:
        chosen = {name: values.pop(name) for name in shared}
        command(**values, options=decoding(**chosen))

    parameters = [parameter for name, parameter in own.items() if name != "options"] + list(shared.values())
    keywords = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
    call.__signature__ = inspect.Signature(keywords)  # pyright: ignore[reportAttributeAccessIssue]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in keywords}
    return call
