"""Generation: schedule, run, sample, collect. The model reads a prefix once, then a token a step.

Letters: B prefixes, S prefix positions, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from blip2.errors import ConfigError, PromptError
from blip2.generate.beam import BeamSearch
from blip2.generate.methods import Beam, Limits, Method, Sample, Tokens, check
from blip2.generate.schedule import Independent, Search
from blip2.protocols import LanguageModel


def generate(
    language: LanguageModel,
    prefix: Tensor,
    lengths: Tensor,
    method: Method,
    limits: Limits,
    stop_ids: tuple[int, ...],
    seed: int | Sequence[int] | None = None,
    said: Tensor | None = None,
) -> list[list[Tokens]]:
    """Texts after each prefix; the captions and beams of one share its prefill, and finished ones leave the batch.

    Args:
        prefix: float[B, S, D], right-padded.
        lengths: int64[B].
        stop_ids: tokens that end a text.
        seed: instead of the method's: one for all rows, or one a row where the rows are separate requests.
        said: int64[B, H], tokens of each prompt that may not be repeated either; None where only written ones count.
    Returns:
        B lists of `limits.captions` sequences: best first with beams, as drawn with sampling.
    Raises:
        ConfigError: method, limits and seed do not fit together.
        PromptError: a prefix and `max_new_tokens` do not fit into the model's context.
    """
    check(method, limits)
    check_context(language, lengths, limits)
    seeds, said = row_seeds(method, seed, len(prefix)), already_said(language, prefix, said)
    search: Search
    if isinstance(method, Beam):
        search = BeamSearch(method, limits, stop_ids, seeds, said)
    else:
        search = Independent(method, limits, stop_ids, seeds, said)
    for _ in run(language, prefix, lengths, search):
        pass
    return search.results()


@torch.no_grad()
def run(language: LanguageModel, prefix: Tensor, lengths: Tensor, search: Search) -> Iterator[None]:
    """The loop; gives the word back after each step."""
    if not len(prefix):
        return
    logits, cache = language.prefill(prefix, lengths)
    while True:
        rows, ids = search.advance(logits)
        yield
        if not len(ids):
            return
        if not torch.equal(rows, torch.arange(len(logits), device=rows.device)):
            cache = cache.select(rows)
        logits = language.step(ids, cache)


def already_said(language: LanguageModel, prefix: Tensor, said: Tensor | None = None) -> Tensor:
    """What counts as said before each text, int64[B, H]: an encoder-decoder's first token too, as in transformers."""
    start: int | None = getattr(language, "start_id", None)
    shape = len(prefix), 0 if start is None else 1
    first = torch.full(shape, start or 0, dtype=torch.long, device=prefix.device)
    return first if said is None else torch.cat([said, first], 1)


def check_context(language: LanguageModel, lengths: Tensor, limits: Limits) -> None:
    """Raises PromptError where a prefix and what may follow it are longer than the model's context."""
    longest = int(lengths.max()) if len(lengths) else 0
    if longest + limits.max_new_tokens > language.context:
        raise PromptError(
            f"the prompt fills {longest} positions and max_new_tokens is {limits.max_new_tokens}, "
            f"but the language model holds {language.context}: shorten the prompt or lower max_new_tokens"
        )


def row_seeds(method: Method, seed: int | Sequence[int] | None, rows: int) -> list[int]:
    """One seed a row: the argument, else the method's, else fresh ones that follow `torch.manual_seed`."""
    if seed is None and isinstance(method, Sample):
        seed = method.seed
    if seed is None:
        return torch.randint(2**62, (rows,)).tolist() if isinstance(method, Sample) else [0] * rows
    if isinstance(seed, int):
        return [seed] * rows
    if len(seed) != rows:
        raise ConfigError(f"{len(seed)} seeds for {rows} rows: give one a row, or one for all")
    return list(seed)
