"""What a decoder has read: prompts, which are not copied for a row, and the tokens since.

The keys and values of a prompt are computed once and stay where they are: beams, samples and texts that follow the same
prompt are rows that point at it. Only the few tokens that a row wrote itself are its own, and move when rows do.

Letters: P prompts, B rows, L layers, S prompt positions, T new positions, t all since the prompt, H heads, A heads of
keys and values (H = A * G), d width of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blip2.model.attention import attend

ROOM = 16  # positions that are made room for at a time


class Cache:
    """Keys and values, layer by layer, each on its layer's device; satisfies `protocols.Cache`.

    Args:
        lengths: int64[P], how many positions of each prompt are real.
    Attributes:
        owners: int64[B], the prompt of each row.
        steps: positions since the prompt, the same for all rows.
    """

    def __init__(self, lengths: Tensor) -> None:
        self.lengths = lengths
        self.owners = torch.arange(len(lengths), device=lengths.device)
        self.steps = 0
        self._prompts: list[tuple[Tensor, Tensor]] = []  # L of float[P, A, S, d]
        self._own: list[tuple[Tensor, Tensor]] = []  # L of float[B, A, room, d], the first t of which are written
        self._places = self.owners, 1  # of each row among its prompt's, int64[B] into P * n, and n, the most of one
        self._masks: dict[tuple[int, int | None, torch.device], tuple[Tensor, Tensor]] = {}

    def select(self, rows: Tensor) -> Cache:
        """The rows in a new order, int64[N], some perhaps many times or not at all."""
        owners, left = self.owners[rows], self.lengths
        prompts = self._prompts
        used = owners.unique()
        if 2 * len(used) <= len(left):  # most prompts have no rows any more: the rest is worth a copy
            prompts = [(key[used.to(key.device)], value[used.to(value.device)]) for key, value in prompts]
            owners, left = torch.searchsorted(used, owners), left[used]
        chosen = Cache(left)
        chosen.owners, chosen.steps = owners, self.steps
        chosen._prompts, chosen._places = prompts, _places(owners, len(left))
        chosen._own = [(_moved(key, rows, self.steps), _moved(value, rows, self.steps)) for key, value in self._own]
        return chosen

    def keep(self, key: Tensor, value: Tensor) -> None:
        """What the next layer's queries will see of each prompt: float[P, A, S, d]."""
        self._prompts.append((key, value))

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
        assert layer == len(self._prompts)
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
        """Attention of new positions to the prompt of their row and to what the row has read since.

        Args:
            query: float[B, H, T, d].
            key, value: float[B, A, T, d], which are kept.
        Returns:
            float[B, T, H * d].
        """
        heads, count = key.shape[1], query.shape[2]
        query = query.unflatten(1, (heads, -1)).flatten(2, 3) * scale  # (B, A, G * T, d)
        prompt_key, prompt_value = self._prompts[layer]
        own_key, own_value = self._add(layer, key, value)  # (B, A, t, d)
        seen, own_seen = self._visible(count, window, query.device)
        groups = query.shape[2] // count
        scores = self._to_rows(self._to_prompts(query) @ prompt_key.mT, query.shape[2])  # (B, A, G * T, S)
        scores = scores.masked_fill(~seen.repeat(1, groups, 1)[:, None], float("-inf"))
        own_scores = (query @ own_key.mT).masked_fill(~own_seen.repeat(groups, 1), float("-inf"))  # (B, A, G * T, t)
        weights = torch.cat([scores, own_scores], dim=-1).float().softmax(-1).to(query.dtype)
        weights, own_weights = weights.split([scores.shape[-1], own_scores.shape[-1]], dim=-1)
        out = self._to_rows(self._to_prompts(weights) @ prompt_value, query.shape[2]) + own_weights @ own_value
        return out.unflatten(2, (groups, count)).permute(0, 3, 1, 2, 4).flatten(2)  # (B, T, A * G * d)

    def cross(self, layer: int, query: Tensor, scale: float) -> Tensor:
        """Attention to the prompt of each row alone: float[B, H, T, d] to float[B, T, H * d] (encoder-decoders)."""
        key, value = self._prompts[layer]
        real = torch.arange(key.shape[2], device=key.device) < self.lengths.to(key.device)[:, None]  # (P, S)
        seen = attend(self._to_prompts(query), key, value, real[:, None, None], scale=scale)  # (P, n * T, H * d)
        return self._to_rows(seen[:, None], query.shape[2])[:, 0]

    def own(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, bias: Tensor) -> Tensor:
        """Attention to what the row has read since its prompt, itself included (encoder-decoders).

        Args:
            query, key, value: float[B, H, T, d]; keys and values are kept.
            bias: float[H, T, t], added to the scores; -inf where a query may not look.
        Returns:
            float[B, T, H * d].
        """
        keys, values = self._add(layer, key, value)
        return attend(query, keys, values, bias, scale=scale)

    def advance(self, count: int) -> None:
        """All layers have read so many new positions."""
        self.steps += count
        self._masks.clear()

    def _add(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values of the rows' own positions, the new ones included."""
        end = self.steps + key.shape[2]
        if layer == len(self._own):
            self._own.append((_room(key, end), _room(value, end)))
        old = self._own[layer]
        if torch.is_grad_enabled() and key.requires_grad:  # what is written in place has no gradient
            self._own[layer] = _joined(old[0], key, self.steps), _joined(old[1], value, self.steps)
            return self._own[layer]
        if end > old[0].shape[2]:
            old = self._own[layer] = _longer(old[0], end), _longer(old[1], end)
        for room, new in zip(old, (key, value), strict=True):
            room[:, :, self.steps : end] = new
        return old[0][:, :, :end], old[1][:, :, :end]

    def _visible(self, count: int, window: int | None, device: torch.device) -> tuple[Tensor, Tensor]:
        """What new positions may see of their prompt, bool[B, T, S], and of their row, bool[T, t]."""
        if (count, window, device) not in self._masks:
            size = self._prompts[0][0].shape[2]
            new = self.steps + torch.arange(count, device=device)  # (T,) counted from the end of the prompt
            lengths = self.lengths[self.owners].to(device)[:, None, None]  # (B, 1, 1)
            place = torch.arange(size, device=device)
            seen = (place < lengths).expand(-1, count, -1)  # (B, T, S)
            back = new[:, None] - torch.arange(self.steps + count, device=device)  # (T, t)
            own = back >= 0
            if window is not None:
                seen = seen & (lengths + new[:, None] - place < window)
                own = own & (back < window)
            self._masks[count, window, device] = seen, own
        return self._masks[count, window, device]

    def _to_prompts(self, x: Tensor) -> Tensor:
        """float[B, A, M, X] to float[P, A, n * M, X]: the rows of one prompt beside each other, zeros where few."""
        places, most = self._places
        spread = x.new_zeros(len(self.lengths) * most, *x.shape[1:]).index_copy(0, places.to(x.device), x)
        return spread.unflatten(0, (-1, most)).transpose(1, 2).flatten(2, 3)

    def _to_rows(self, x: Tensor, width: int) -> Tensor:
        """float[P, A, n * M, X] back to float[B, A, M, X]."""
        places, most = self._places
        return x.unflatten(2, (most, width)).transpose(1, 2).flatten(0, 1)[places.to(x.device)]


def _places(owners: Tensor, prompts: int) -> tuple[Tensor, int]:
    """A place for each row among its prompt's, int64[B] into P * n, and n, the most rows of a prompt."""
    counts = owners.bincount(minlength=prompts)
    order = owners.argsort(stable=True)
    starts = counts.cumsum(0) - counts
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device) - starts[owners[order]]
    most = int(counts.max()) if len(owners) else 0
    return owners * most + rank, most


def _room(like: Tensor, length: int) -> Tensor:
    """Room for so many positions and some more: float[B, A, room, d]."""
    rows, heads, _, width = like.shape
    return like.new_empty(rows, heads, -(-length // ROOM) * ROOM, width)


def _longer(old: Tensor, length: int) -> Tensor:
    new = _room(old, length)
    new[:, :, : old.shape[2]] = old
    return new


def _joined(old: Tensor, new: Tensor, steps: int) -> Tensor:
    return torch.cat([old[:, :, :steps], new], dim=2)


def _moved(old: Tensor, rows: Tensor, steps: int) -> Tensor:
    new = old.new_empty(len(rows), *old.shape[1:])
    new[:, :, :steps] = old[rows.to(old.device), :, :steps]
    return new
