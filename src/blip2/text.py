"""Tokenizers: text to ids and back. The prompt templates are data, in `config.PromptConfig`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from blip2.errors import CheckpointError
from blip2.model.prefix import SLOT

if TYPE_CHECKING:
    import tokenizers

_REMOVED = re.compile(r'[.!"()*#:;~]')  # punctuation that the published models' texts lost
WORDS = 50  # of a text, as published

IMAGE = "<image>"  # in a prompt, where an image stands


@dataclass(frozen=True)
class Tokenizer:
    """A `tokenizers.Tokenizer` and the special ids that blip2 needs of it.

    Attributes:
        rust: the tokenizer itself, its own truncation and padding off.
        bos: id that begins a sequence, None where the model has none. `encode` never adds it.
        pad: id that fills rows; never read.
        stop_ids: ids that end a generated text; the first ends a training text.
        end: id that ends what an encoder-decoder reads, None elsewhere. `encode` never adds it.
        frame: ids put before and after every text by `encode`, such as ([CLS], [SEP]); None for language models.
    """

    rust: tokenizers.Tokenizer
    bos: int | None
    pad: int
    stop_ids: tuple[int, ...]
    end: int | None = None
    frame: tuple[int, int] | None = None

    @classmethod
    def from_file(
        cls,
        path: Path,
        *,
        bos: int | None,
        pad: int,
        stop_ids: tuple[int, ...],
        end: int | None = None,
        frame: tuple[int, int] | None = None,
    ) -> Self:
        """A tokenizer from a `tokenizer.json`.

        Raises:
            CheckpointError: the file is missing or is no tokenizer.
        """
        import tokenizers

        try:
            rust = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{path}: not a readable tokenizer.json: {error}") from None
        rust.no_padding()
        rust.no_truncation()
        return cls(rust, bos, pad, stop_ids, end, frame)

    def encode(self, texts: Sequence[str], max_length: int | None = None) -> list[list[int]]:
        """Ids of each text, cut on the right to `max_length` (the frame included and kept)."""
        encodings = self.rust.encode_batch(list(texts), add_special_tokens=False)
        if self.frame is None:
            return [encoding.ids[:max_length] for encoding in encodings]
        room = None if max_length is None else max_length - 2
        first, last = self.frame
        return [[first, *encoding.ids[:room], last] for encoding in encodings]

    def prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """What a language model reads with its images: `encode`, and the id that ends it where there is one.

        `<image>` in a text is no word but an image's place: `SLOT` among the ids.
        """
        end = [] if self.end is None else [self.end]
        pieces = [text.split(IMAGE) for text in texts]
        words = iter(self.encode([piece for row in pieces for piece in row]))
        found: list[list[int]] = []
        for row in pieces:
            ids = next(words)
            for _ in row[1:]:
                ids = [*ids, SLOT, *next(words)]
            found.append([*ids, *end])
        return found

    def decode(self, ids: Sequence[int]) -> str:
        """Text of some ids, special tokens left out."""
        return self.rust.decode(list(ids), skip_special_tokens=True)

    def batch(self, texts: Sequence[str], max_length: int | None = None) -> Tensor:
        """`encode` as int64[B, T], right-padded with `pad`."""
        return pad(self.encode(texts, max_length), self.pad)


def plain(text: str) -> str:
    """As training reads captions, in lower case, single spaces, no final dot: `A dog runs .` is `a dog runs`."""
    text = re.sub(r"\s+", " ", text.lower()).strip()
    text = re.sub(r" +([.,;:!?'])", r"\1", text)
    return re.sub(r"[\s.]+$", "", text) or text


def published_caption(caption: str, words: int = WORDS) -> str:
    """As the published models read captions: `A dog (brown) runs!` is `a dog brown runs`.

    Source: LAVIS, its processor `blip_caption`.
    """
    spaced = re.sub(r"\s{2,}", " ", _REMOVED.sub(" ", caption.lower()))
    return _first(spaced.rstrip("\n").strip(" "), words)


def published_question(question: str, words: int = WORDS) -> str:
    """As the published models read questions: `What's (roughly) this?` is `what's roughly this?`.

    Source: LAVIS, its processor `blip_question`.
    """
    return _first(_REMOVED.sub("", question.lower()).rstrip(" "), words)


def _first(text: str, count: int) -> str:
    return " ".join(text.split(" ")[:count])


def pad(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Ragged rows as int64[B, T], filled on the right."""
    width = max((len(row) for row in rows), default=0)
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows], dtype=torch.int64).reshape(-1, width)
