"""Which tokens make up which word of a text. Letters: T text positions, W words."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from blip2.text import Tokenizer, plain

if TYPE_CHECKING:
    from blip2.blip2 import Blip2


@dataclass(frozen=True)
class Span:
    """A word: what stands between spaces.

    Attributes:
        at: positions of its tokens.
    """

    text: str
    at: tuple[int, ...]


def spans_of_text(model: Blip2, text: str) -> tuple[Tensor, list[Span]]:
    """A text as it is matched: its tokens, int64[T], and the words among them that are read.

    Raises:
        ConfigError: this model has no text side.
        PromptError: the text is empty.
    """
    ids = model.text_ids([text])[0]
    tokenizer = cast("Tokenizer", model.text_tokenizer)  # or there were no ids
    read = plain(text) if model.config.plain_texts else text
    framed = tokenizer.frame is not None
    offsets = tokenizer.rust.encode(read, add_special_tokens=False).offsets[: len(ids) - 2 * framed]
    return ids, _grouped(read, [begin for begin, _ in offsets], int(framed))


def without_each(ids: Tensor, words: Sequence[Span], pad: int) -> Tensor:
    """A text, then the same with each of its words hidden from all others: int64[T] to int64[1 + W, T]."""
    hidden = [ids.index_fill(0, torch.tensor(word.at, device=ids.device), pad) for word in words]
    return torch.stack([ids, *hidden])


def spans_of_ids(tokenizer: Tokenizer, ids: Sequence[int]) -> list[Span]:
    """The words that some tokens write; a token that begins within a word, or with the space before it, is its."""
    lengths = [len(tokenizer.decode(ids[:count])) for count in range(len(ids))]
    return _grouped(tokenizer.decode(ids), lengths, 0)


def _grouped(text: str, begins: Iterable[int], first: int) -> list[Span]:
    """Words of a text, by where in it each token begins; those without a token are left out."""
    words = list(re.finditer(r"\S+", text))
    ends = [word.end() for word in words]
    found: dict[int, list[int]] = {}
    for position, begin in enumerate(begins, first):
        if (number := bisect_right(ends, begin)) < len(words):
            found.setdefault(number, []).append(position)
    return [Span(words[number].group(), tuple(at)) for number, at in found.items()]
