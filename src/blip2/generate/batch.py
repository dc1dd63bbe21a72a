"""Groups of prompts whose rows the model steps together.

Letters: N prompts, B rows, S positions, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from blip2.generate.capture import stepper
from blip2.generate.schedule import Search
from blip2.generate.words import Words
from blip2.protocols import Cache, LanguageModel


class Prompts(Protocol):
    """What texts follow, read when its turn comes."""

    @property
    def lengths(self) -> Sequence[int]:
        """Positions of each prompt."""
        ...

    @property
    def device(self) -> torch.device: ...

    def read(self, which: list[int], vocabulary: Tensor | None = None) -> tuple[Tensor, Any]:
        """Some prompts, by number: what `LanguageModel.prefill` gives of them."""
        ...


class Prefixes:
    """Embeddings that are there already; satisfies `Prompts`.

    Args:
        prefix: float[N, S, D], right-padded.
        lengths: int64[N].
    """

    def __init__(self, language: LanguageModel, prefix: Tensor, lengths: Tensor) -> None:
        self._language, self._prefix, self._lengths = language, prefix, lengths
        self.lengths: list[int] = lengths.tolist()

    @property
    def device(self) -> torch.device:
        """Of the prefixes."""
        return self._prefix.device

    def read(self, which: list[int], vocabulary: Tensor | None = None) -> tuple[Tensor, Cache]:
        """See `Prompts`."""
        asked = () if vocabulary is None else (vocabulary,)
        if len(which) == len(self.lengths):
            return self._language.prefill(self._prefix, self._lengths, *asked)
        longest = max(self.lengths[number] for number in which)
        return self._language.prefill(self._prefix[which, :longest], self._lengths[which], *asked)


class Batch:
    """Rows of all groups: one cache, one token each.

    Attributes:
        rows: how many there are at present.
    """

    def __init__(self, language: LanguageModel, words: Words) -> None:
        self._language, self._words = language, words
        self._groups: list[tuple[list[int], Search, int]] = []  # prompts, their search, its rows
        self._finished: list[tuple[list[int], Search]] = []
        self._cache: Any = None
        self._ids: Tensor
        self.rows = 0

    @property
    def open(self) -> bool:
        """Whether a group can join: always where there is none, and where the model's cache takes others in."""
        return not self.rows or getattr(self._cache, "joins", hasattr(self._cache, "join"))

    def join(self, which: list[int], search: Search, logits: Tensor, cache: Any) -> None:
        """A group that was just read takes its first tokens."""
        rows, ids = search.advance(logits)
        if not len(ids):
            self._finished.append((which, search))
            return
        cache = _chosen(cache, rows, len(logits))
        if self.rows:
            cache, ids = self._cache.join(cache), torch.cat([self._ids, ids])
        self._groups.append((which, search, len(rows)))
        self._cache, self._ids, self.rows = cache, ids, self.rows + len(rows)

    def step(self) -> None:
        """Every row reads its token, and every group chooses the next."""
        step = stepper(self._language, self._cache)
        logits = step(self._words.ids(self._ids), self._cache, *self._words.asked)
        rows: list[Tensor] = []
        ids: list[Tensor] = []
        groups, start = self._groups, 0
        self._groups = []
        for (which, search, size), part in zip(groups, logits.split([size for *_, size in groups]), strict=True):
            mine, next_ids = search.advance(part)
            if len(next_ids):
                self._groups.append((which, search, len(next_ids)))
                rows.append(mine + start if start else mine)
                ids.append(next_ids)
            else:
                self._finished.append((which, search))
            start += size
        self.rows = sum(size for *_, size in self._groups)
        if self.rows:
            self._ids = ids[0] if len(ids) == 1 else torch.cat(ids)
            self._cache = _chosen(self._cache, rows[0] if len(rows) == 1 else torch.cat(rows), len(logits))

    def finished(self) -> list[tuple[list[int], Search]]:
        """The groups that ended since this was asked last."""
        found, self._finished = self._finished, []
        return found


def _chosen(cache: Any, rows: Tensor, count: int) -> Any:
    """The rows of a cache of so many, which is not used any more; itself where they are all, in order."""
    if len(rows) == count and torch.equal(rows, torch.arange(count, device=rows.device)):
        return cache
    return getattr(cache, "moved", cache.select)(rows)
