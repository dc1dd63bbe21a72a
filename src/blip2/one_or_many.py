"""What verbs are given as one or as many, and give back alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

from blip2 import image
from blip2.errors import ConfigError, PromptError
from blip2.generate import Tokens
from blip2.results import Generation, ImageFeatures
from blip2.text import Tokenizer

Images = image.Source | Sequence[image.Source] | ImageFeatures
"""One image or many: whatever `image.open` takes, or a list of it, or what `encode` gave."""

Shown = Images | Sequence[Sequence[image.Source] | ImageFeatures]
"""As `Images`; a list within the list is several images for one prompt, each at an `<image>` in it."""


def is_list(images: Shown) -> bool:
    """Whether a verb was given many images: a list, a tuple, features, or a stacked array."""
    if isinstance(images, list | tuple | ImageFeatures):
        return True
    return getattr(images, "ndim", 0) == 4


def grouped(encode: Callable[[Images], ImageFeatures], images: Shown) -> tuple[ImageFeatures, list[int]]:
    """All images encoded, and how many of them each prompt has."""
    if isinstance(images, list | tuple) and any(isinstance(item, list | tuple | ImageFeatures) for item in images):
        parts = [encode(item) for item in images]
        return ImageFeatures.concatenate(parts), [len(part) for part in parts]
    features = encode(cast("Images", images))
    return features, [1] * len(features)


def pair(
    features: ImageFeatures, counts: list[int], questions: list[str]
) -> tuple[ImageFeatures, list[int], list[str]]:
    """One image (or several together) with each question, one question with each, or one to one.

    Args:
        counts: images of each prompt.
    Raises:
        PromptError: no question, or neither one of either nor as many of both.
    """
    if not questions:
        raise PromptError("no question was given")
    if len(counts) == len(questions):
        return features, counts, questions
    if len(counts) == 1:
        times = len(questions)
        return features[list(range(len(features))) * times], counts * times, questions
    if len(questions) == 1:
        return features, counts, questions * len(counts)
    raise PromptError(f"{len(counts)} images and {len(questions)} questions: give one of either, or as many of both")


def positive(batch_size: int) -> int:
    """How many go through together.

    Raises:
        ConfigError: none would.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, not {batch_size}")
    return batch_size


def sentence(question: str) -> str:
    """A question without the space around it.

    Raises:
        PromptError: nothing is left.
    """
    if not question.strip():
        raise PromptError("the question is empty")
    return question.strip()


def generation(tokens: Tokens, tokenizer: Tokenizer) -> Generation:
    """Tokens as a text."""
    text = tokenizer.decode(tokens.ids).strip()
    return Generation(text, tokens.ids, tokens.log_probs, tokens.score, tokens.finish)


def present(rows: list[list[Generation]], details: bool, count: int) -> list[Any]:
    """Rows of at most `count` texts, or of `Generation`s; where one was asked for without their inner list, or None."""
    shown: list[list[Any]] = [[found if details else found.text for found in row] for row in rows]
    return shown if count > 1 else [row[0] if row else None for row in shown]


def unwrap(rows: list[Any], single: bool) -> Any:
    """The only row where one image was given."""
    return rows[0] if single else rows
