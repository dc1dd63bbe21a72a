"""What a decoder has read: tiers that rows share, whose keys are never copied for a row, and what each row read since.

A tier holds the keys and values of images or of prompts. They are computed once and stay where they are: beams, samples
and questions that follow the same prompt are rows that point at it. What a row wrote itself stands in columns that all
rows write at the same time; a row that came later has nothing in the columns before its first.

Letters: P prompts of a tier, B rows, n rows of a prompt, L layers, S positions of a tier, T new positions, t columns,
H heads, A heads of keys and values (H = A * G), d width of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blip2.model.attention import attend
from blip2.model.columns import Columns
from blip2.model.tier import Tier

UNSEEN = float("-inf")


class Cache:
    """Keys and values, layer by layer, each on its layer's device; satisfies `protocols.Cache`.

    Args:
        lengths: int64[P], how many positions of each prompt are real.
    Attributes:
        tiers: what rows share, in the order it was read.
        own: what each row has read since.
        starts: int64[B], how many positions of each row stand in tiers.
    """

    def __init__(self, lengths: Tensor) -> None:
        self.tiers = [Tier.empty(lengths)]
        self.own = Columns(torch.zeros_like(lengths))
        self.starts = lengths
        self._masks: dict[tuple[int | None, torch.device], list[Tensor | None]] = {}

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def positions(self) -> Tensor:
        """Where each row's next token stands: int64[B]."""
        return self.starts + self.own.counts

    def select(self, rows: Tensor) -> Cache:
        """The rows in a new order, int64[N], some perhaps many times or not at all; what was read here stays."""
        return self._with([tier.select(rows) for tier in self.tiers], self.own.select(rows), self.starts[rows])

    def moved(self, rows: Tensor) -> Cache:
        """As `select`, where this cache is not used any more: see `Columns.moved`."""
        return self._with([tier.select(rows) for tier in self.tiers], self.own.moved(rows), self.starts[rows])

    def join(self, other: Cache) -> Cache:
        """These rows and then those of another cache, which began at another time, with prompts of other lengths.

        Args:
            other: of the same model, read in as many parts.
        """
        tiers = [mine.join(theirs) for mine, theirs in zip(self.tiers, other.tiers, strict=True)]
        return self._with(tiers, self.own.join(other.own), torch.cat([self.starts, other.starts]))

    def settle(self, counts: Tensor) -> Cache:
        """What the rows have read since their tiers as a tier of its own, to go on from.

        Args:
            counts: int64[B], how many positions of each row are real; the others are never seen.
        """
        tier = Tier.empty(counts)
        for key, value in self.own.layers():
            tier.keep(key, value)
        return self._with([*self.tiers, tier], Columns(torch.zeros_like(counts)), self.starts + counts)

    def part(self, row: int, count: int) -> Cache:
        """The first positions of a row that has so many in its tiers: one row of one tier, in memory of its own."""
        new = Cache(self.starts.new_full((1,), count))
        owners = [int(tier.owners[row]) for tier in self.tiers]
        lengths = [int(tier.lengths[owner]) for tier, owner in zip(self.tiers, owners, strict=True)]

        def joined(layers: list[Tensor]) -> Tensor:
            parts = [each[owner, :, :end] for each, owner, end in zip(layers, owners, lengths, strict=True)]
            whole = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
            return whole[None, :, :count].clone()  # (1, A, count, d)

        for layer in range(len(self.tiers[0].keys)):
            new.keep(*(joined([tier.both[side][layer] for tier in self.tiers]) for side in (0, 1)))
        new.tiers[0].full = True
        return new

    def head(self, count: int) -> Cache:
        """The first positions of what `part` gave, in the same memory."""
        tier = self.tiers[0]
        new = Cache(self.starts.new_full((1,), count))
        for key, value in zip(*tier.both, strict=True):
            new.keep(key[:, :, :count], value[:, :, :count])
        new.tiers[0].full = True
        return new

    def bytes_of(self, count: int) -> int:
        """What `part` takes for so many positions."""
        return sum(2 * count * key[0, :, 0].nbytes for key in self.tiers[0].keys)

    def keep(self, key: Tensor, value: Tensor) -> None:
        """What the next layer's queries will see of each prompt: float[P, A, S, d]."""
        self.tiers[0].keep(key, value)

    def read(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None = None
    ) -> Tensor:
        """Attention within the prompts themselves, whose keys and values are kept.

        Args:
            query: float[P, H, S, d].
            key, value: float[P, A, S, d]. Padding on the right is never seen: attention looks back only.
            window: how many positions a query sees, itself among them; all before it where None.
        Returns:
            float[P, S, H * d].
        """
        assert layer == len(self.tiers[0].keys)
        self.keep(key, value)
        length = query.shape[2]
        if window is None or length <= window:
            return attend(query, key, value, causal=True, scale=scale)
        place = torch.arange(length, device=query.device)
        back = place[:, None] - place[None, :]  # (S, S), how far each query looks back to each key
        return attend(query, key, value, (back >= 0) & (back < window), scale=scale)

    def go_on(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None = None
    ) -> Tensor:
        """Attention of new positions to the tiers of their row and to what the row has read since.

        Args:
            query: float[B, H, T, d].
            key, value: float[B, A, T, d], which are kept.
        Returns:
            float[B, T, H * d].
        """
        rows, heads, count, width = key.shape
        groups = query.shape[1] // heads
        query = query.reshape(rows, heads, groups * count, width)
        own_key, own_value = self._add(layer, key, value)  # (B * A, t, d)
        *masks, own_mask = self._visible(count, groups, heads, window, key)
        scores = [
            tier.to_rows(_scores(mask, tier.to_prompts(query), tier.keys[layer].flatten(0, 1), scale), heads)
            for tier, mask in zip(self.tiers, masks, strict=True)
        ]  # each (B * A, G * T, S)
        scores.append(_scores(own_mask, query.flatten(0, 1), own_key, scale))  # (B * A, G * T, t)
        sizes = [score.shape[-1] for score in scores]
        weights = torch.cat(scores, -1)
        wide = torch.promote_types(weights.dtype, torch.float32)
        weights = weights.softmax(-1, dtype=wide).to(query.dtype).split(sizes, -1)
        out = torch.bmm(weights[-1], own_value)
        for tier, weight in zip(self.tiers, weights, strict=False):
            seen = torch.bmm(tier.to_prompts(weight.unflatten(0, (rows, heads))), tier.values[layer].flatten(0, 1))
            out = out + tier.to_rows(seen, heads)
        out = out.view(rows, heads, groups, count, width)
        return out.permute(0, 3, 1, 2, 4).reshape(rows, count, -1)  # (B, T, A * G * d)

    def cross(self, layer: int, query: Tensor, scale: float) -> Tensor:
        """Attention to the prompt of each row alone: float[B, H, T, d] to float[B, T, H * d] (encoder-decoders)."""
        tier, heads = self.tiers[0], query.shape[1]
        key, value = tier.keys[layer], tier.values[layer]
        real = tier.real(key.device)[:, None, None]  # (P, 1, 1, S)
        seen = attend(tier.to_prompts(query).unflatten(0, (-1, heads)), key, value, real, scale=scale)
        seen = seen.unflatten(-1, (heads, -1)).transpose(1, 2).flatten(0, 1)  # (P * H, n * T, d)
        seen = tier.to_rows(seen, heads).unflatten(0, (-1, heads))  # (B, H, T, d)
        return seen.transpose(1, 2).flatten(2)

    def self_attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, bias: Tensor) -> Tensor:
        """Attention to what the row has read since its prompt, itself included (encoder-decoders).

        Args:
            query, key, value: float[B, H, T, d]; keys and values are kept.
            bias: float[B or 1, H, T, t], added to the scores; -inf where a query may not look.
        Returns:
            float[B, T, H * d].
        """
        heads = query.shape[1]
        keys, values = (each.unflatten(0, (-1, heads)) for each in self._add(layer, key, value))
        return attend(query, keys, values, bias.to(query.device), scale=scale)

    def back(self, count: int) -> Tensor:
        """How far each of so many new positions looks back to each column: int64[T, t], below 0 ahead of it."""
        return self.own.back(count)

    def unborn(self, count: int) -> Tensor | None:
        """Columns that stand before a row's first, bool[B, t]; None where there are none."""
        return self.own.unborn(count)

    def advance(self, count: int) -> None:
        """All layers have read so many new positions."""
        self.own.advance(count)
        self._masks.clear()

    def _with(self, tiers: list[Tier], own: Columns, starts: Tensor) -> Cache:
        new = Cache.__new__(Cache)
        new.tiers, new.own, new.starts, new._masks = tiers, own, starts, {}
        return new

    def _add(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values of the rows' own positions, the new ones included: float[B * A, t, d]."""
        if torch.is_grad_enabled() and key.requires_grad:  # what is written in place has no gradient
            assert not self.own.used, "rows go on from their prompts once where there is a gradient"
            return key.flatten(0, 1), value.flatten(0, 1)
        return self.own.add(layer, self.tiers[0].devices, key, value)

    def _visible(self, count: int, groups: int, heads: int, window: int | None, like: Tensor) -> list[Tensor | None]:
        """What is added to the scores, 0 where new positions see and -inf where not: of each tier, and of the columns.

        Returns:
            of a tier float[P * A, 1 or n * G * T, S], of the columns float[B * A, G * T, t]; None where all is seen.
        """
        if window is not None and self._span(count) <= window:
            window = None
        if (window, like.device) not in self._masks:
            found: list[Tensor | None] = []
            places = self.positions[:, None] + torch.arange(count, device=self.starts.device)  # (B, T)
            before = torch.zeros_like(self.starts)  # positions of each row in earlier tiers
            for tier in self.tiers:
                unseen = ~tier.real(tier.lengths.device)[:, None, None]  # (P, 1, 1, S)
                if window is None and tier.full:
                    found.append(None)
                    continue
                if window is not None:
                    at = before[:, None, None] + torch.arange(unseen.shape[-1], device=before.device)  # (B, 1, S)
                    far = (places[..., None] - at >= window).repeat(1, groups, 1)  # (B, G * T, S)
                    unseen = unseen | tier.to_prompts(far[:, None])[:, None]
                found.append(_mask(unseen, heads, like))
                before = before + tier.lengths[tier.owners]
            unborn = self.unborn(count)
            if window is None and count == 1 and unborn is None:
                found.append(None)
                return self._masks.setdefault((window, like.device), found)
            back = self.back(count)  # (T, t)
            unseen = (back < 0) if window is None else (back < 0) | (back >= window)
            unseen = unseen.repeat(groups, 1)[None, None]  # (1, 1, G * T, t)
            if unborn is not None:
                unseen = unseen | unborn[:, None, None]
            found.append(_mask(unseen.expand(len(self), -1, -1, -1), heads, like))
            self._masks[window, like.device] = found
        return self._masks[window, like.device]

    def _span(self, count: int) -> int:
        """No row has more positions than this, so many new ones included."""
        return sum(tier.size for tier in self.tiers) + self.own.span(count)


def _scores(mask: Tensor | None, query: Tensor, key: Tensor, scale: float) -> Tensor:
    """float[N, M, d] and float[N, S, d] to float[N, M, S]."""
    if mask is None:
        return torch.baddbmm(query.new_empty(()), query, key.mT, beta=0, alpha=scale)  # what is empty is not read
    return torch.baddbmm(mask, query, key.mT, alpha=scale)


def _mask(unseen: Tensor, heads: int, like: Tensor) -> Tensor:
    """bool[N, 1, M, S] to float[N * A, M, S]."""
    mask = torch.zeros(unseen.shape, dtype=like.dtype, device=unseen.device).masked_fill(unseen, UNSEEN)
    return mask.to(like.device).expand(-1, heads, -1, -1).reshape(-1, *unseen.shape[2:])
