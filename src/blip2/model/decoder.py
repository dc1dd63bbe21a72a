"""What every decoder-only language model of ours does alike: the protocol over its layers.

Letters: B rows, S prefix positions, T positions, D width, V vocabulary, K a part of it, H heads, d width of a head.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol

import torch
from torch import Tensor

from blip2.model.cache import Cache
from blip2.model.language import Language
from blip2.model.scoring import by_length, check_prefix, chosen_log_probs, first_of_each, packed, pick


class Attend(Protocol):
    """How a layer's queries see keys and values: `Cache.read` within a prompt, `Cache.go_on` after it."""

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None = None
    ) -> Tensor: ...


class Decoder(Language, ABC):
    """A frozen decoder-only language model; satisfies `protocols.LanguageModel`. A model says what its layers do."""

    @abstractmethod
    def hidden(self, x: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """All layers and the last norm.

        Args:
            x: float[B, T, D], embeddings as `embed` gives them.
            positions: int64[B, T], from 0.
        Returns:
            float[B, T, D], ready for the head.
        """

    goes_on = True  # `prefill` takes a past

    def prefill(
        self, prefix: Tensor, lengths: Tensor, vocabulary: Tensor | None = None, past: Cache | None = None
    ) -> tuple[Tensor, Cache]:
        """Read the prefix once; see `protocols.LanguageModel`.

        Args:
            past: what each row has read before its prefix, as a prefill or `Cache.part` gave it; it stays as it is.
        Raises:
            PromptError: a row is empty.
        """
        check_prefix(lengths)
        if past is None:
            hidden, cache = self.read(prefix, lengths)
        else:
            past = past.select(torch.arange(len(past), device=lengths.device))
            hidden = self._go_on(prefix.to(self.words.weight.dtype), past)
            cache = past.settle(lengths)
        return self.logits(pick(hidden, lengths[:, None] - 1)[:, 0], vocabulary), cache

    def step(self, ids: Tensor, cache: Cache, vocabulary: Tensor | None = None) -> Tensor:
        """Read one more token a row, int64[B]; float32[B, V or K], logits of the next."""
        return self.logits(self._go_on(self.embed(ids)[:, None], cache)[:, 0], vocabulary)

    def log_probs(
        self,
        prefix: Tensor,
        lengths: Tensor,
        targets: Tensor,
        vocabulary: Tensor | None = None,
        alike: tuple[Tensor, int] | None = None,
        past: Cache | None = None,
    ) -> Tensor:
        """Log-probability of each target, with gradient to `prefix`; see `protocols.LanguageModel`.

        Args:
            past: as of `prefill`, where `alike` is given; rows of one owner have the same.
        Raises:
            PromptError: a row of the prefix is empty.
            ConfigError: a target is not in the vocabulary.
        """
        check_prefix(lengths)
        words = self.embed(targets[:, :-1].clamp(min=0))
        rows = packed(prefix.to(words.dtype), lengths, words)  # (B, S + T - 1, D)
        ends = lengths + (targets >= 0).sum(1).clamp(min=1) - 1  # (B,) positions that have to be read
        places = lengths[:, None] - 1 + torch.arange(targets.shape[1], device=prefix.device)
        if alike is None:
            hidden = by_length(ends, lambda some, end: self.read(rows[some, :end], ends[some])[0])
        else:
            owners, common = alike
            first, which = first_of_each(owners)
            counts = torch.full_like(first, common)
            if past is None:
                shared, cache = self.read(rows[first, :common], counts)
            else:
                before = past.select(first)
                shared = self._go_on(rows[first, :common], before)
                cache = before.settle(counts)
            rest = by_length(
                ends - common,
                lambda some, length: self._go_on(rows[some, common : common + length], cache.select(which[some])),
            )
            hidden = torch.cat([shared[which, -1:], rest], dim=1)  # from the last position in common on
            places = places - (common - 1)
        hidden = pick(hidden, places.clamp(max=hidden.shape[1] - 1))
        return chosen_log_probs(hidden, targets, vocabulary, self.vocab_size, lambda x: self.logits(x, vocabulary))

    def read(self, prefix: Tensor, lengths: Tensor) -> tuple[Tensor, Cache]:
        """Hidden states float[B, S, D] of a right-padded prefix, what each next token comes from; and its cache."""
        cache = Cache(lengths)
        positions = torch.arange(prefix.shape[1], device=prefix.device).expand(len(prefix), -1)
        return self.hidden(prefix.to(self.words.weight.dtype), positions, cache.read), cache

    def _go_on(self, x: Tensor, cache: Cache) -> Tensor:
        if not x.shape[1]:
            return x
        positions = cache.positions[:, None]
        if x.shape[1] > 1:  # padding may reach past the last position that there is
            positions = (positions + torch.arange(x.shape[1], device=x.device)).clamp(max=self.context - 1)
        hidden = self.hidden(x, positions, cache.go_on)
        cache.advance(x.shape[1])
        return hidden
