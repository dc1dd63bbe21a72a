"""The oracle of every faster path: one row, one sequence, everything read again for each token.

Nothing is batched, nothing is kept from one step to the next, beams are lists. Use it in tests and to settle doubts.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from blip2.generate.beam import best_possible, candidate_count
from blip2.generate.engine import already_said, check_context, row_seeds
from blip2.generate.methods import Beam, BeamSample, Greedy, Limits, Method, Sample, Tokens, check, tokens
from blip2.generate.sample import FORBIDDEN, apply_limits, draw, draw_without_replacement, narrow, noise
from blip2.protocols import LanguageModel


@torch.no_grad()
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
    """As `engine.generate`, slowly."""
    check(method, limits)
    check_context(language, lengths.tolist(), limits)
    seeds = row_seeds(method, seed, len(prefix))
    said = already_said(language, len(prefix), prefix.device, said)
    results: list[list[Tokens]] = []
    for row, length in enumerate(lengths.tolist()):
        reader = _Reader(language, prefix[row : row + 1, :length], limits, stop_ids, said[row : row + 1])
        if isinstance(method, Beam):
            results.append(_beams(reader, method, noise(seeds[row]))[: limits.captions])
        else:
            captions = range(limits.captions)
            results.append([_sequence(reader, method, noise(seeds[row], caption)) for caption in captions])
    return results


@dataclass(frozen=True)
class _Reader:
    language: LanguageModel
    prefix: Tensor  # (1, S, D)
    limits: Limits
    stop_ids: tuple[int, ...]
    said: Tensor  # (1, H)

    def logits(self, ids: Sequence[int]) -> Tensor:
        """float[1, V], read from the first position on."""
        logits, cache = self.language.prefill(self.prefix, torch.tensor([self.prefix.shape[1]]).to(self.prefix.device))
        for token in ids:
            logits = self.language.step(torch.tensor([token], device=self.prefix.device), cache)
        return logits

    def limited(self, scores: Tensor, ids: Sequence[int]) -> Tensor:
        history = torch.tensor([ids], dtype=torch.long, device=scores.device)
        return apply_limits(scores, history, self.limits, self.stop_ids, self.said)

    def ends(self, ids: Sequence[int]) -> bool:
        return ids[-1] in self.stop_ids or len(ids) == self.limits.max_new_tokens


def _sequence(reader: _Reader, method: Greedy | Sample, generator: random.Random) -> Tokens:
    ids: list[int] = []
    log_probs: list[float] = []
    while not ids or not reader.ends(ids):
        scores = reader.limited(reader.logits(ids), ids)
        if isinstance(method, Sample):
            scores = narrow(scores, method)
            token = int(draw(scores.softmax(-1), [generator.random()]))
        else:
            token = int(scores.argmax())
        log_probs.append(scores.log_softmax(-1)[0, token].item())
        ids.append(token)
    return tokens(ids, log_probs, reader.stop_ids)


@dataclass(frozen=True)
class _Beam:
    ids: tuple[int, ...] = ()
    log_probs: tuple[float, ...] = ()

    @property
    def total(self) -> float:
        return sum(self.log_probs)


def _beams(reader: _Reader, method: Beam, generator: random.Random) -> list[Tokens]:
    finished: list[Tokens] = []
    open_ = [_Beam()]
    while open_:
        candidates = _candidates(reader, method, generator, open_)
        for beam in candidates[: method.width]:
            if reader.ends(beam.ids) and beam.total > FORBIDDEN:
                ids, log_probs = list(beam.ids), list(beam.log_probs)
                finished.append(tokens(ids, log_probs, reader.stop_ids, method.length_penalty))
        finished = sorted(finished, key=lambda text: text.score, reverse=True)[: method.width]
        going = [beam for beam in candidates if not reader.ends(beam.ids)]
        open_ = heapq.nlargest(method.width, going, key=lambda beam: beam.total)
        if open_ and len(finished) == method.width:
            possible = best_possible(open_[0].total, len(open_[0].ids), method, reader.limits)
            if method.early_stopping is True or possible <= finished[-1].score:
                break
    return finished


def _candidates(reader: _Reader, method: Beam, generator: random.Random, open_: list[_Beam]) -> list[_Beam]:
    count = candidate_count(method.width, reader.stop_ids)
    steps: list[Tensor] = []
    for beam in open_:
        scores = reader.limited(reader.logits(beam.ids).log_softmax(-1), beam.ids)
        if isinstance(method, BeamSample):
            scores = narrow(scores, method, keep=1 + len(reader.stop_ids))
        steps.append(scores[0])
    every = torch.cat([scores + beam.total for scores, beam in zip(steps, open_, strict=True)])
    if isinstance(method, BeamSample):
        values, index = draw_without_replacement(every[None], count, [generator])
        chosen: list[int] = index[values > FORBIDDEN].tolist()
    else:
        chosen = heapq.nlargest(count, range(len(every)), key=every.tolist().__getitem__)
    size = len(steps[0])
    return [
        _Beam((*open_[at // size].ids, at % size), (*open_[at // size].log_probs, steps[at // size][at % size].item()))
        for at in chosen
    ]
