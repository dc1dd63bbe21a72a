"""Tokens and text as they come. What was given out is never taken back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from torch import Tensor

from blip2.errors import ConfigError
from blip2.generate.batch import Prefixes, Prompts
from blip2.generate.engine import already_said, check_context, row_seeds, run
from blip2.generate.methods import Beam, Limits, Method
from blip2.generate.schedule import Independent
from blip2.generate.words import Words
from blip2.protocols import LanguageModel

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a decoder writes for bytes that are no whole character yet


def stream(
    language: LanguageModel,
    prefix: Tensor,
    lengths: Tensor,
    method: Method,
    limits: Limits,
    stop_ids: tuple[int, ...],
    seed: int | Sequence[int] | None = None,
) -> Iterator[list[int | None]]:
    """The tokens of `generate` as they come: at each step one a row, None where the row has ended.

    Raises:
        ConfigError: the method has beams, which may change what was said before; or there are several captions a row.
        PromptError: as in `generate`.
    """
    return follow(language, Prefixes(language, prefix, lengths), method, limits, stop_ids, seed)


def follow(
    language: LanguageModel,
    prompts: Prompts,
    method: Method,
    limits: Limits,
    stop_ids: tuple[int, ...],
    seed: int | Sequence[int] | None = None,
) -> Iterator[list[int | None]]:
    """As `stream`, of prompts that are read when they are asked for."""
    if isinstance(method, Beam):
        raise ConfigError("beam search cannot stream: it may change what it has said; use greedy decoding or sampling")
    if limits.captions != 1:
        raise ConfigError(f"a stream has one caption an image, not {limits.captions}")
    check_context(language, prompts.lengths, limits)
    count = len(prompts.lengths)
    before = already_said(language, count, prompts.device)
    words = Words(language, before)
    search = Independent(method, limits, words.places(stop_ids), row_seeds(method, seed, count), before)
    steps = run(language, prompts, words, lambda _: search, 1)
    return ([words.token(each) for each in search.latest] for _ in steps if search.latest != [None] * count)


def pieces(tokens: Iterable[int], decode: Callable[[Sequence[int]], str]) -> Iterator[str]:
    """The text of a stream of tokens, piece by piece; together they are the decoded text.

    A character of several tokens is held back until it is whole. Where it never becomes whole, replacement characters
    stand in its place.

    Args:
        tokens: of one text.
        decode: of all tokens so far to their text; later tokens may add to it, or complete its last character.
    """
    ids: list[int] = []
    said = 0  # characters
    text = ""
    for token in tokens:
        ids.append(token)
        text = decode(ids)
        if len(text) > said and not text.endswith(UNFINISHED):
            yield text[said:]
            said = len(text)
    if len(text) > said:
        yield text[said:]
