"""Greedy decoding and sampling: sequences that know nothing of each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from blip2.generate.methods import Greedy, Limits, Sample, Tokens, tokens
from blip2.generate.sample import apply_limits, draw, narrow, noise, to_host


class Search(Protocol):
    """The state of a generation and the policy that grows it. The engine runs the model; this decides what it reads."""

    def advance(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Choose the next tokens and collect the sequences that end with them.

        Args:
            logits: float[N, V], one row a sequence that was scheduled last; at first one row a prefix.
        Returns:
            for each sequence that goes on, int64[M]: which of the N rows it continues, and its new token.
        """
        ...

    def results(self) -> list[list[Tokens]]:
        """The finished sequences, a list a prefix."""
        ...


class Independent:
    """`captions` sequences a prefix, each on its own; satisfies `Search`.

    Args:
        seeds: one a prefix.
        said: int64[P, H], what counts as said before each prefix's texts.
    """

    def __init__(
        self, method: Greedy | Sample, limits: Limits, stop_ids: tuple[int, ...], seeds: Sequence[int], said: Tensor
    ) -> None:
        self._method, self._limits, self._stop_ids = method, limits, stop_ids
        count = len(seeds) * limits.captions
        self._said = said.repeat_interleave(limits.captions, 0)
        self._live = list(range(count))  # which sequence each present row is
        self._ids: list[list[int]] = [[] for _ in range(count)]
        self._log_probs: list[list[float]] = [[] for _ in range(count)]
        self._noise = [noise(seed, caption) for seed in seeds for caption in range(limits.captions)]
        self._history: Tensor | None = None  # (N, L), of the live sequences
        self.latest: list[int | None] = []

    def advance(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """See `Search`."""
        device = logits.device
        rows = torch.arange(len(logits), device=device)
        if self._history is None:  # the captions of a prefix start from one prefill
            rows = rows.repeat_interleave(self._limits.captions)
            self._history = rows.new_empty(len(rows), 0)
        ids, log_probs = self._choose(logits[rows], self._history)
        words, gained = to_host(ids, log_probs)
        open_ = self._append([int(word) for word in words], gained)
        self._history = torch.cat([self._history, ids[:, None]], 1)
        if len(open_) < len(self._live):
            self._live = [self._live[place] for place in open_]
            kept = torch.tensor(open_, dtype=torch.long, device=device)
            self._history, rows, ids = self._history[kept], rows[kept], ids[kept]
        return rows, ids

    def results(self) -> list[list[Tokens]]:
        """See `Search`."""
        pairs = zip(self._ids, self._log_probs, strict=True)
        finished = [tokens(ids, log_probs, self._stop_ids) for ids, log_probs in pairs]
        size = self._limits.captions
        return [finished[start : start + size] for start in range(0, len(finished), size)]

    def _choose(self, logits: Tensor, history: Tensor) -> tuple[Tensor, Tensor]:
        scores = apply_limits(logits, history, self._limits, self._stop_ids, self._said[self._live])
        if isinstance(self._method, Sample):
            log_probs = narrow(scores, self._method).log_softmax(-1)
            ids = draw(log_probs.exp(), [self._noise[sequence].random() for sequence in self._live])
        else:
            log_probs = scores.log_softmax(-1)
            ids = scores.argmax(-1)
        return ids, log_probs.gather(1, ids[:, None])[:, 0]

    def _append(self, ids: list[int], log_probs: list[float]) -> list[int]:
        """Add a token to each live sequence; the places of those that go on."""
        open_: list[int] = []
        self.latest = [None] * len(self._ids)
        for place, (sequence, token, log_prob) in enumerate(zip(self._live, ids, log_probs, strict=True)):
            self._ids[sequence].append(token)
            self._log_probs[sequence].append(log_prob)
            if token in self._stop_ids:
                continue
            self.latest[sequence] = token
            if len(self._ids[sequence]) < self._limits.max_new_tokens:
                open_.append(place)
        return open_
