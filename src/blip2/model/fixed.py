"""A cache whose step is a pure function of buffers of fixed size, so that a CUDA graph of it can be replayed.

It is scratch: the rows of any `Cache` are laid into it, stepped, and the new column is given back. Rows of one prompt
stand beside each other, in as many places as the prompt with the most rows has; the places that are left are padding.

Letters: P prompts, n places of a prompt, B = P * n places, L layers, S prompt positions, A heads, d their width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from blip2.model.cache import Cache
from blip2.model.columns import Columns
from blip2.model.tier import Tier

STRIDE = 32  # positions that buffers are rounded up to


class Shape(NamedTuple):
    """What a step's buffers are made for: prompts, places of each, prompt positions, columns."""

    prompts: int
    places: int
    size: int
    room: int


def shape_of(cache: Cache) -> Shape | None:
    """The smallest buffers for the next step of a cache; None where its layers are on several devices."""
    tiers = cache.tiers
    if len(set(tiers[0].devices)) > 1 or not all(tier.full for tier in tiers[:-1]):
        return None
    prompts = 1 << (len(tiers[-1].lengths) - 1).bit_length()
    return Shape(prompts, tiers[-1].most, _rounded(sum(tier.size for tier in tiers)), _rounded(cache.own.used + 1))


class Fixed(Cache):
    """Buffers for rows of caches of one shape; to a language model, a cache like any other.

    Attributes:
        ids: int64[B], what the places read.
    """

    def __init__(self, shape: Shape, like: Cache) -> None:
        super().__init__(like.starts.new_ones(shape.prompts))
        key = like.tiers[0].keys[0]
        _, heads, _, width = key.shape
        tier = _FixedTier(shape, self.tiers[0].lengths)
        for _ in like.tiers[0].keys:
            tier.keep(*(key.new_zeros(shape.prompts, heads, shape.size, width) for _ in range(2)))
        rows = shape.prompts * shape.places
        self.tiers: list[Tier] = [tier]
        self.own: _FixedColumns = _FixedColumns(key.new_zeros(len(tier.keys), 2, rows, heads, shape.room, width))
        self.starts = like.starts.new_zeros(rows)
        self.ids = torch.zeros_like(self.starts)
        self._loaded: list[Tier] = []

    @property
    def nbytes(self) -> int:
        """Of keys and values."""
        tier = self.tiers[0]
        return sum(each.nbytes for each in (*tier.keys, *tier.values, self.own.buffer))

    def load(self, ids: Tensor, cache: Cache) -> None:
        """The rows of a cache and their next tokens, int64[N]."""
        if len(self._loaded) != len(cache.tiers) or any(
            old is not new for old, new in zip(self._loaded, cache.tiers, strict=True)
        ):
            self._load_tiers(cache.tiers)
        self.own.load(cache.own, self._slots)
        self.starts.zero_().index_copy_(0, self._slots, cache.starts)
        self.ids.zero_().index_copy_(0, self._slots, ids)

    def unload(self, logits: Tensor, cache: Cache) -> Tensor:
        """Give the cache its new column; the logits of its rows, float[N, V], of those of all places, float[B, V]."""
        cache.own.take(self.own.column(self._slots))
        return logits.index_select(0, self._slots)

    def _load_tiers(self, tiers: list[Tier]) -> None:
        mine, last = self.tiers[0], tiers[-1]
        self._slots, count = last.slots, len(last.lengths)
        mine.lengths.fill_(1).narrow(0, 0, count).copy_(last.lengths)
        start = 0
        for tier in tiers:
            size = tier.size
            owners = None
            if tier is not last:  # what several prompts share is laid before each of them
                owners = last.owners.new_zeros(count).index_copy_(0, last.owners, tier.owners)
                mine.lengths.narrow(0, 0, count).add_(size)
            for layer, both in enumerate(zip(tier.keys, tier.values, strict=True)):
                for target, source in zip((mine.keys[layer], mine.values[layer]), both, strict=True):
                    chosen = source if owners is None else source.index_select(0, owners)
                    target.narrow(0, 0, count).narrow(2, start, size).copy_(chosen)
            start += size
        self._loaded = list(tiers)


class _FixedTier(Tier):
    """One tier, whose lengths and keys are written anew in place."""

    def __init__(self, shape: Shape, lengths: Tensor) -> None:
        owners = torch.arange(shape.prompts, device=lengths.device).repeat_interleave(shape.places)
        super().__init__(lengths, owners, [], [])

    def real(self, device: torch.device) -> Tensor:
        """See `Tier.real`; never kept, for the lengths change."""
        return torch.arange(self.size, device=device) < self.lengths[:, None]


class _FixedColumns(Columns):
    """Columns that are all looked at, the filled ones seen; how many are filled is a tensor."""

    used: Tensor  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, buffer: Tensor) -> None:
        super().__init__(torch.zeros(buffer.shape[2], dtype=torch.long, device=buffer.device))
        self.used = self.births.new_zeros(())
        self.buffer, self._layered = buffer, buffer.flatten(2, 3)

    def load(self, columns: Columns, slots: Tensor) -> None:
        self.used.fill_(columns.used)
        self.births.fill_(columns.used).index_copy_(0, slots, columns.births)
        if columns.used:
            filled = columns.filled(self.buffer.device)
            self.buffer.narrow(4, 0, columns.used).index_copy_(2, slots, filled)

    def column(self, slots: Tensor) -> Tensor:
        """The one that was written: float[L, 2, N, A, 1, d]."""
        return self.buffer.index_select(4, self.used[None]).index_select(2, slots)

    def span(self, count: int) -> int:  # noqa: ARG002
        return self.buffer.shape[4]

    def back(self, count: int) -> Tensor:
        column = torch.arange(self.buffer.shape[4], device=self.births.device)
        return self.used + torch.arange(count, device=self.births.device)[:, None] - column

    def unborn(self, count: int) -> Tensor:  # noqa: ARG002
        return torch.arange(self.buffer.shape[4], device=self.births.device) < self.births[:, None]

    def add(self, layer: int, devices: list[torch.device], key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        self.buffer[layer, 0].index_copy_(2, self.used[None], key)
        self.buffer[layer, 1].index_copy_(2, self.used[None], value)
        return self._layered[layer, 0], self._layered[layer, 1]

    def advance(self, count: int) -> None:
        """What is filled is told by `load`."""


def _rounded(count: int) -> int:
    return -(-count // STRIDE) * STRIDE
