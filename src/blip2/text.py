"""Tokenizers: text to ids and back. The prompt templates are data, in `config.PromptConfig`."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from torch import Tensor

from blip2.errors import CheckpointError, PromptError
from blip2.model.prefix import SLOT

if TYPE_CHECKING:
    import tokenizers

_REMOVED = re.compile(r'[.!"()*#:;~]')  # punctuation that the published models' texts lost
WORDS = 50  # of a text, as published
_DAMAGED = "the tokenizer gives up: its tokenizer.json is damaged; get the model's files again"

IMAGE = "<image>"  # in a prompt, where an image stands


class Spelling:
    """How tokens are spelled, without what cuts a text into them: read in a twentieth of the time, when first asked.

    Args:
        path: a file that `write` wrote.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    @staticmethod
    def write(rust: tokenizers.Tokenizer, path: Path) -> None:
        """The spelling of a tokenizer's tokens, in a file."""
        words: list[str | None] = [None] * rust.get_vocab_size()
        for word, number in rust.get_vocab().items():
            words[number] = word
        special = [number for number, token in rust.get_added_tokens_decoder().items() if token.special]
        none = {"type": "WordLevel", "vocab": dict[str, int](), "unk_token": ""}
        rest = {**json.loads(rust.to_str()), "added_tokens": [], "model": none}
        path.write_text(json.dumps({"words": words, "special": special, "rest": rest}), encoding="utf-8")

    def decode(self, ids: Sequence[int]) -> str:
        """As the tokenizer's own: special tokens, and ids that there are not, are left out."""
        words, special, decoder = self._content
        known = (words[number] for number in ids if 0 <= number < len(words) and number not in special)
        return decoder.decode([word for word in known if word is not None])

    @functools.cached_property
    def _content(self) -> tuple[list[str | None], frozenset[int], Any]:
        import tokenizers

        content = json.loads(self._path.read_bytes())
        decoder = tokenizers.Tokenizer.from_str(json.dumps(content["rest"])).decoder
        return content["words"], frozenset(content["special"]), decoder


class _Deferred:
    """A `tokenizers.Tokenizer` that is read from its file when something is first asked of it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @functools.cached_property
    def _rust(self) -> tokenizers.Tokenizer:
        return _read(self._path)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what copying and pickling look for
            raise AttributeError(name)
        return getattr(self._rust, name)


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
        spelling: what `decode` reads instead of the tokenizer, where it has one.
    """

    rust: tokenizers.Tokenizer
    bos: int | None
    pad: int
    stop_ids: tuple[int, ...]
    end: int | None = None
    frame: tuple[int, int] | None = None
    spelling: Spelling | None = None

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
        return cls(_read(path), bos, pad, stop_ids, end, frame)

    @classmethod
    def deferred(cls, path: Path, spelling: Path, *, bos: int | None, pad: int, stop_ids: tuple[int, ...]) -> Self:
        """As `from_file`, of files that are known to be whole, which are read when a text is first cut or written."""
        return cls(cast("tokenizers.Tokenizer", _Deferred(path)), bos, pad, stop_ids, spelling=Spelling(spelling))

    def encode(self, texts: Sequence[str], max_length: int | None = None) -> list[list[int]]:
        """Ids of each text, cut on the right to `max_length` (the frame included and kept)."""
        if self.frame is None and not any(texts):  # no tokens: what reads many of them need not be there
            return [[] for _ in texts]
        with understood(_DAMAGED, panics_only=True):
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

    def choices(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of answers to choose from, each with its end: "yes" is no start of "yesterday".

        Raises:
            PromptError: fewer than two, or an empty one.
        """
        if isinstance(texts, str) or len(texts) < 2 or not all(text.strip() for text in texts):
            raise PromptError(f"give a list of at least two choices, none of them empty, not {texts!r}")
        return [[*row, self.stop_ids[0]] for row in self.encode([f" {text.strip()}" for text in texts])]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of some ids, special tokens left out."""
        if self.spelling is not None:
            return self.spelling.decode(ids)
        with understood(_DAMAGED, panics_only=True):
            return self.rust.decode(list(ids), skip_special_tokens=True)

    def batch(self, texts: Sequence[str], max_length: int | None = None) -> Tensor:
        """`encode` as int64[B, T], right-padded with `pad`."""
        return pad(self.encode(texts, max_length), self.pad)


def _read(path: Path) -> tokenizers.Tokenizer:
    """A tokenizer.json, its own truncation and padding off."""
    import tokenizers

    with understood(f"{path}: not a readable tokenizer.json"):
        rust = tokenizers.Tokenizer.from_file(str(path))
        rust.no_padding()
        rust.no_truncation()
    return rust


@contextmanager
def understood(problem: str, *, panics_only: bool = False) -> Generator[None]:
    """What the tokenizers library cannot read, as one error: it raises bare Exception, and what is less than that.

    Args:
        panics_only: other errors are the caller's, not the file's.
    Raises:
        CheckpointError: with what the library says of the problem.
    """
    try:
        yield
    except BaseException as error:
        panics = type(error).__name__ == "PanicException"
        if not panics and (panics_only or not isinstance(error, Exception)):  # such as Ctrl-C
            raise
        raise CheckpointError(f"{problem}: {str(error).partition(chr(10))[0]}") from None


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
