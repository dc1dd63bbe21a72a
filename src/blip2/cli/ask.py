"""`blip2 ask` and `blip2 chat`: questions about one image."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from blip2.cli.console import note, one_line, open_model, result, result_json
from blip2.cli.options import Chosen, Details, Device, Dtype, Image, Json, Model, Quantize, check_texts, writes
from blip2.errors import PromptError

if TYPE_CHECKING:
    from blip2.blip2 import Blip2
    from blip2.chat import Chat
    from blip2.results import ImageFeatures

HELP = "/new starts over, /quit (or Ctrl-D) ends."


@writes
def ask(
    image: Image,
    questions: Annotated[list[str], typer.Argument(metavar="QUESTION", help="Each in quotes.", show_default=False)],
    *,
    choices: Annotated[
        str | None, typer.Option(help="Take the likeliest of these, separated by commas.", show_default=False)
    ] = None,
    json: Json = False,
    details: Details = False,
    model: Model = "mini",
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantize: Quantize = None,
    options: Chosen,
) -> None:
    """Answer questions about an image.

    One question prints its answer, several print `question<TAB>answer`. The image is encoded once.

    ```
    blip2 ask photo.jpg "what is the dog doing?"
    blip2 ask photo.jpg "is there a dog in the picture?" --choices yes,no
    blip2 ask photo.jpg "how many dogs are there?" "what color is the dog?" --json
    ```
    """
    from blip2.image import open as open_image

    given = _choices(choices, options)
    check_texts("a question", *questions)
    picture = open_image(image)  # what is wrong is said before a model is loaded
    opened = open_model(model, device, dtype, quantize)
    features = opened.encode(picture)
    for question in questions:
        text, found = _answer(opened, features, question, given, options)
        if json or details:
            shown = found if details or given else {}
            result_json({"image": str(image), "question": question, "answer": text, **shown})
        else:
            answer = one_line(text)
            result(answer if len(questions) == 1 else f"{question}\t{answer}")


def _answer(
    model: Blip2, image: ImageFeatures, question: str, choices: list[str], options: Chosen
) -> tuple[str, dict[str, Any]]:
    """The answer, and what else is known about it."""
    if choices:
        ranking = model.ask(image, [question], choices=choices, details=True)[0]
        return ranking.best, {"probabilities": dict(zip(ranking.choices, ranking.probabilities, strict=True))}
    found = asdict(model.ask(image, [question], details=True, **options)[0])
    return found.pop("text"), found


def _choices(given: str | None, options: Chosen) -> list[str]:
    if given is None:
        return []
    if options:
        raise PromptError(f"--choices ranks given answers, it does not write: leave out {', '.join(options)}")
    return [choice.strip() for choice in given.split(",")]


@writes
def chat(
    image: Image,
    *,
    model: Model = "mini",
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantize: Quantize = None,
    options: Chosen,
) -> None:
    """Talk about an image.

    Each answer sees the conversation so far. Questions come from the keyboard or, line by line, from a pipe; answers
    go to stdout. `/new` starts over, `/quit` ends. When the conversation outgrows the model's context, the oldest
    turns leave, and a note says so. A question that cannot be asked is named on stderr, and the conversation goes on.

    ```
    blip2 chat photo.jpg
    printf 'what is the man doing?\\nwhere is the man?\\n' | blip2 chat photo.jpg
    ```
    """
    from blip2.image import open as open_image

    picture = open_image(image)  # what is wrong is said before a model is loaded
    opened = open_model(model, device, dtype, quantize)
    talk = opened.chat(picture)
    if sys.stdin.isatty():
        note(f"Ask about {image.name}. {HELP}")
    failed = False
    for line in _lines():
        if line == "/quit":
            break
        if line == "/new":
            talk = opened.chat(talk.features)
            note("A new conversation.")
        elif line.startswith("/"):
            note(f"No command {line}. {HELP}")
        elif not _say(talk, line, options):
            failed = True
    if failed and not sys.stdin.isatty():
        raise typer.Exit(1)


def _say(talk: Chat, question: str, options: Chosen) -> bool:
    """One turn, with a note where older ones had to leave; whether the question could be asked."""
    before = talk.forgotten
    try:
        result(one_line(talk.say(question, **options)))
    except PromptError as error:
        note(f"error: {error}")
        return False
    finally:
        if talk.forgotten > before:
            note(f"(The context is full: {talk.forgotten} of the oldest turns have left the conversation.)")
    return True


def _lines() -> Iterator[str]:
    """What is typed or piped in, without empty lines."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()
