"""Beam search and beam sampling, token for token as transformers' `generate` does them.

Letters: R prefixes still open, W beams of each, V vocabulary, C candidates, L tokens generated so far.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from blip2.errors import ConfigError
from blip2.generate.methods import Beam, BeamSample, Limits, Tokens, tokens
from blip2.generate.sample import FORBIDDEN, apply_limits, draw_without_replacement, narrow, noise, to_host


def candidate_count(width: int, stop_ids: tuple[int, ...]) -> int:
    """How many continuations are looked at, so that `width` of them go on even if every stop token is among them."""
    return width * max(2, 1 + len(stop_ids))


def best_possible(total: float, length: int, method: Beam, limits: Limits) -> float:
    """What an open beam of this total could still score; as transformers estimates it, see `Beam.early_stopping`."""
    if method.early_stopping == "never" and method.length_penalty > 0:
        length = limits.max_new_tokens
    return total / length**method.length_penalty


class BeamSearch:
    """The beams of each prefix; satisfies `schedule.Search`.

    Args:
        seeds: one a prefix, for `BeamSample`.
        said: int64[P, H], what counts as said before each prefix's texts.
    """

    def __init__(
        self, method: Beam, limits: Limits, stop_ids: tuple[int, ...], seeds: Sequence[int], said: Tensor
    ) -> None:
        self._method, self._limits, self._stop_ids, self._said = method, limits, stop_ids, said
        self._penalty = method.length_penalty
        self._live = list(range(len(seeds)))  # which prefix each open one is
        self._noise = [noise(seed) for seed in seeds]
        self._finished: list[list[Tokens]] = [[] for _ in seeds]
        self._ids: Tensor | None = None  # (R, W, L)
        self._log_probs: Tensor  # (R, W, L)
        self._totals: Tensor  # (R, W), sums of log_probs

    def advance(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """See `schedule.Search`."""
        if self._ids is None:  # one beam a prefix until there are tokens to differ in
            self._totals = logits.new_zeros(len(logits), 1)
            self._log_probs = logits.new_zeros(len(logits), 1, 0)
            self._ids = self._log_probs.long()
        totals, parents, chosen, gained = self._continue(logits, self._ids)  # each (R, C)
        length, width = self._ids.shape[-1] + 1, self._method.width
        ended = torch.isin(chosen, chosen.new_tensor(self._stop_ids)) | (length == self._limits.max_new_tokens)
        open_, best = totals.masked_fill(ended, FORBIDDEN).topk(width)  # (R, W)

        def longer(texts: Tensor, which: Tensor, last: Tensor) -> Tensor:
            """[R, W, L] of the candidates' parents, and their last one: [R, W, L + 1]."""
            return torch.cat([_pick(texts, parents.gather(1, which)), last.gather(1, which)[..., None]], -1)

        first = torch.arange(width, device=best.device).expand_as(best)  # only these may finish
        finishing = (ended & (totals > FORBIDDEN)).gather(1, first)
        ids, log_probs = longer(self._ids, first, chosen), longer(self._log_probs, first, gained)
        *texts, leading = to_host(finishing, ids, log_probs, open_[:, 0])
        self._collect(*texts)
        going = [place for place, total in enumerate(leading) if self._goes_on(place, total, length)]

        rows = torch.arange(len(parents), device=best.device)[:, None] * self._totals.shape[1] + parents.gather(1, best)
        self._totals = open_
        self._ids, self._log_probs = longer(self._ids, best, chosen), longer(self._log_probs, best, gained)
        if len(going) < len(self._live):
            kept = torch.tensor(going, dtype=torch.long, device=best.device)
            self._live = [self._live[place] for place in going]
            self._totals, self._ids, self._log_probs, rows = (
                each[kept] for each in (self._totals, self._ids, self._log_probs, rows)
            )
        return rows.flatten(), self._ids[..., -1].flatten()

    def results(self) -> list[list[Tokens]]:
        """See `schedule.Search`; the best first."""
        return [finished[: self._limits.captions] for finished in self._finished]

    def _continue(self, logits: Tensor, history: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The candidates, each (R, C): their totals, parents, tokens, and what each token added."""
        steps = logits.log_softmax(-1)
        said = self._said[self._live].repeat_interleave(history.shape[1], 0)  # (R * W, H)
        steps = apply_limits(steps, history.flatten(0, 1), self._limits, self._stop_ids, said)
        if isinstance(self._method, BeamSample):
            steps = narrow(steps, self._method, keep=1 + len(self._stop_ids))
        steps = steps.view(len(history), -1, logits.shape[-1])  # (R, W, V)
        every = (self._totals[..., None] + steps).flatten(1)  # (R, W * V)
        count = candidate_count(self._method.width, self._stop_ids)
        if logits.shape[-1] < count:
            raise ConfigError(f"{self._method.width} beams need a vocabulary of {count} tokens, not {logits.shape[-1]}")
        if isinstance(self._method, BeamSample):
            totals, index = draw_without_replacement(every, count, [self._noise[prefix] for prefix in self._live])
        else:
            totals, index = every.topk(count)
        parents, chosen = index // logits.shape[-1], index % logits.shape[-1]
        return totals, parents, chosen, steps.flatten(1).gather(1, index)

    def _collect(self, finishing: list[float], ids: list[float], log_probs: list[float]) -> None:
        """Keep the best `width` finished texts a prefix: [R, W], [R, W, L] and [R, W, L], flat."""
        width, length = self._method.width, len(ids) // max(1, len(finishing))
        for number, ends in enumerate(finishing):
            if ends:
                text = slice(number * length, (number + 1) * length)
                found = tokens([int(token) for token in ids[text]], log_probs[text], self._stop_ids, self._penalty)
                self._finished[self._live[number // width]].append(found)
        for prefix in self._live:
            self._finished[prefix].sort(key=lambda text: -text.score)
            del self._finished[prefix][self._method.width :]

    def _goes_on(self, place: int, total: float, length: int) -> bool:
        finished = self._finished[self._live[place]]
        if length == self._limits.max_new_tokens or total == FORBIDDEN:
            return False
        if len(finished) < self._method.width:
            return True
        if self._method.early_stopping is True:
            return False
        return best_possible(total, length, self._method, self._limits) > finished[-1].score


def _pick(beams: Tensor, index: Tensor) -> Tensor:
    """[R, W, L] at int64[R, N] to [R, N, L]."""
    return beams.gather(1, index[..., None].expand(-1, -1, beams.shape[-1]))
