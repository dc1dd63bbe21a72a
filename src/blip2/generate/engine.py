"""Generation: schedule, run, sample, collect. The model reads a prompt once, then a token a step.

Prompts that began together are a group, with a search of its own. All groups' rows step together; finished rows leave,
and waiting prompts take their place. Letters: N prompts, B rows, S prefix positions, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from blip2.errors import ConfigError, PromptError
from blip2.generate.batch import Batch, Prefixes, Prompts
from blip2.generate.beam import BeamSearch
from blip2.generate.methods import Beam, Limits, Method, Sample, Tokens, check
from blip2.generate.schedule import Independent, Search
from blip2.generate.words import Words
from blip2.protocols import LanguageModel

WORTH = 4  # waiting prompts begin when this part of the capacity is free: a prefill of one costs almost that of several


def generate(
    language: LanguageModel,
    prefix: Tensor,
    lengths: Tensor,
    method: Method,
    limits: Limits,
    stop_ids: tuple[int, ...],
    seed: int | Sequence[int] | None = None,
    said: Tensor | None = None,
    capacity: int | None = None,
) -> list[list[Tokens]]:
    """Texts after each prefix; the captions and beams of one share its prefill, and finished ones leave the batch.

    Args:
        prefix: float[N, S, D], right-padded.
        lengths: int64[N].
        stop_ids: tokens that end a text.
        seed: instead of the method's: one for all rows, or one a row where the rows are separate requests.
        said: int64[N, H], tokens of each prompt that may not be repeated either; None where only written ones count.
        capacity: how many prompts are written at a time, the others wait; all where None.
    Returns:
        N lists of `limits.captions` sequences: best first with beams, as drawn with sampling.
    Raises:
        ConfigError: method, limits and seed do not fit together.
        PromptError: a prefix and `max_new_tokens` do not fit into the model's context.
    """
    prompts = Prefixes(language, prefix, lengths)
    return answer(language, prompts, method, limits, stop_ids, seed, said, capacity)


def answer(
    language: LanguageModel,
    prompts: Prompts,
    method: Method,
    limits: Limits,
    stop_ids: tuple[int, ...],
    seed: int | Sequence[int] | None = None,
    said: Tensor | None = None,
    capacity: int | None = None,
) -> list[list[Tokens]]:
    """As `generate`, of prompts that are read when their turn comes."""
    check(method, limits)
    check_context(language, prompts.lengths, limits)
    count = len(prompts.lengths)
    seeds, before = row_seeds(method, seed, count), already_said(language, count, prompts.device, said)
    words = Words(language, before)
    stops = words.places(stop_ids)

    def begin(which: list[int]) -> Search:
        kind = BeamSearch if isinstance(method, Beam) else Independent
        return kind(method, limits, stops, [seeds[each] for each in which], before[which])  # pyright: ignore[reportArgumentType]

    each = method.width if isinstance(method, Beam) else limits.captions
    found: list[list[Tokens]] = [[] for _ in range(count)]
    for finished in run(language, prompts, words, begin, each, capacity):
        for which, search in finished:
            for number, texts in zip(which, search.results(), strict=True):
                found[number] = [words.tokens(text) for text in texts]
    return found


@torch.no_grad()
def run(
    language: LanguageModel,
    prompts: Prompts,
    words: Words,
    begin: Callable[[list[int]], Search],
    each: int,
    capacity: int | None = None,
) -> Iterator[list[tuple[list[int], Search]]]:
    """The loop; after each step, the groups that it finished.

    Args:
        words: what searches choose from.
        begin: a search for some prompts, by number.
        each: rows that a prompt becomes.
        capacity: prompts that are written at a time.
    """
    count = len(prompts.lengths)
    capacity = count if capacity is None else capacity
    waiting = list(range(count))
    if capacity < count:  # long prompts together: less padding
        waiting.sort(key=lambda number: -prompts.lengths[number])
    batch = Batch(language, words)
    while waiting or batch.rows:
        free = capacity - -(-batch.rows // each)
        if waiting and batch.open and free >= min(len(waiting), -(-capacity // (WORTH if batch.rows else 1))):
            which, waiting = waiting[:free], waiting[free:]
            batch.join(which, begin(which), *prompts.read(which, *words.asked))
        else:
            batch.step()
        yield batch.finished()


def already_said(language: LanguageModel, count: int, device: torch.device, said: Tensor | None = None) -> Tensor:
    """What counts as said before each text, int64[N, H]: an encoder-decoder's first token too, as in transformers."""
    start: int | None = getattr(language, "start_id", None)
    first = torch.full((count, 0 if start is None else 1), start or 0, dtype=torch.long, device=device)
    return first if said is None else torch.cat([said, first], 1)


def check_context(language: LanguageModel, lengths: Sequence[int], limits: Limits) -> None:
    """Raises PromptError where a prefix and what may follow it are longer than the model's context."""
    longest = max(lengths, default=0)
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
