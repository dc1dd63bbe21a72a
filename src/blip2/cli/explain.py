"""`blip2 explain`: what in a picture a model looks at, and why."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from blip2.cli.console import listing, note, open_model, result, result_json
from blip2.cli.options import Device, Dtype, Image, Json, Model, Quantize, check_out, check_texts
from blip2.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from blip2.blip2 import Blip2
    from blip2.explain import Explanation


def explain(
    image: Image,
    text: Annotated[
        str | None, typer.Argument(metavar="TEXT", help="What is held against the picture.", show_default=False)
    ] = None,
    *,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Draw the maps into this picture.", show_default=False)
    ] = None,
    caption: Annotated[bool, typer.Option("--caption", help="Write a caption and explain it.")] = False,
    question: Annotated[
        str | None, typer.Option("--question", "-q", help="Answer this and explain the answer.", show_default=False)
    ] = None,
    attention: Annotated[
        bool, typer.Option("--attention", help="Draw where the words look, not what speaks for them.")
    ] = False,
    layer: Annotated[
        int | None,
        typer.Option(
            help="Of the Q-Former, from 0. [default: the mean of all that look at the image]", show_default=False
        ),
    ] = None,
    json: Json = False,
    model: Model = "mini",
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantize: Quantize = None,
) -> None:
    """Show what in a picture speaks for a text.

    Prints the probability that they match, then each word and by how much the log-odds of the match fall without it;
    --out draws where in the picture that comes from. With --caption or --question the model writes the text itself;
    without any text, the queries' attention is shown. --json gives all maps as numbers.

    ```
    blip2 explain photo.jpg "a dog on a beach" --out map.png
    blip2 explain photo.jpg --caption --out caption.png
    blip2 explain photo.jpg --out queries.png
    ```
    """
    _check(text, caption, question, attention)
    if out is not None:
        check_out(out)
        _check_format(out)
    from blip2 import explain as why
    from blip2.image import open as open_image

    picture = open_image(image)
    found = _found(open_model(model, device, dtype, quantize), picture, text, question, caption, layer)
    if found.unread:
        note(f"the text is longer than what the model reads: its last {found.unread} tokens are left out")
    if out is not None:
        why.draw(picture, found, "attention" if attention else "evidence").save(out)
    if json:
        result_json({"image": str(image), **_numbers(found)})
    else:
        _print(found)


def _check(text: str | None, caption: bool, question: str | None, attention: bool) -> None:
    if sum([text is not None, caption, question is not None]) > 1:
        raise ConfigError("a text, --caption and --question do not go together: explain one at a time")
    check_texts("the text", *([] if text is None else [text]))
    check_texts("the question", *([] if question is None else [question]))
    if attention and text is None:
        raise ConfigError("--attention is of the words of a text: give one, or leave it out")


def _found(
    model: Blip2, picture: Any, text: str | None, question: str | None, caption: bool, layer: int | None
) -> Explanation:
    from blip2 import explain as why

    if text is not None:
        return why.match(model, picture, text, layer)
    if question is not None:
        return why.answer(model, picture, question, layer)
    return why.caption(model, picture, layer=layer) if caption else why.queries(model, picture, layer)


def _check_format(out: Path) -> None:
    """Refuse a picture's name that says no format, before a model works for it."""
    if out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise ConfigError(f"{out}: pictures are written as .png, .jpg or .webp; name the file so")


def _print(found: Explanation) -> None:
    """The text and its words, or how much each query looks at what lies on no place of the picture."""
    if found.words:
        result(f"{found.text}\t{found.probability:.3g}")
        score = "log-odds from it" if found.kind == "matched" else "log-probability"
        listing(("word", score), [(word.text, f"{word.score:+.3f}") for word in found.words], right=(score,))
        return
    rest = found.places.rest(found.attention).sum(-1).tolist()
    rows = [(f"query {number}", f"{1 - share:.3f}") for number, share in enumerate(rest)]
    listing(("query", "on the grid"), rows, right=("on the grid",))


def _numbers(found: Explanation) -> dict[str, Any]:
    """All of an explanation, for programs."""

    def maps(values: Tensor | None) -> dict[str, Any] | None:
        if values is None:
            return None
        rest = zip(found.places.beside, _plain(found.places.rest(values)), strict=True)
        return {
            "grid": _plain(found.places.grid(values)),
            "beside": [{"name": name, "value": value} for name, value in rest],
        }

    words = [
        {"word": word.text, "score": word.score, "evidence": maps(word.evidence), "attention": maps(word.attention)}
        for word in found.words
    ]
    return {
        "kind": found.kind,
        "text": found.text,
        "probability": found.probability,
        "layers": list(found.layers),
        "evidence": maps(found.evidence),
        "words": words,
        "queries": [maps(values) for values in found.attention],
        "unread": found.unread,
    }


def _plain(values: Tensor) -> Any:
    """Numbers of five digits, which is more than they mean."""
    if values.ndim:
        return [_plain(value) for value in values]
    return float(f"{values.item():.5g}")
