"""Keys and values that several rows share: of images, or of the prompts after them.

Letters: P prompts, B rows, n the most rows of a prompt, L layers, S positions, H heads, A heads of keys and values, d
width of a head, M anything that a row has several of, X anything.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class Tier:
    """What was read once for many rows; nothing of it changes after its last layer was kept.

    Args:
        lengths: int64[P], how many positions of each prompt are real.
        owners: int64[B], the prompt of each row.
        keys, values: L of float[P, A, S, d], each on its layer's device.
    Attributes:
        most: n.
        full: whether all prompts are known to be as long as the longest.
    """

    def __init__(self, lengths: Tensor, owners: Tensor, keys: list[Tensor], values: list[Tensor]) -> None:
        self.lengths, self.owners, self.keys, self.values = lengths, owners, keys, values
        self._places, self.most = _places(owners, len(lengths))
        self._real: dict[torch.device, Tensor] = {}
        self.full = False

    @classmethod
    def empty(cls, lengths: Tensor) -> Tier:
        """A row a prompt, for `keep` to fill."""
        new = cls.__new__(cls)
        new.lengths, new.owners = lengths, torch.arange(len(lengths), device=lengths.device)
        new.keys, new.values = [], []
        new._places, new.most, new._real, new.full = None, 1, {}, False
        return new

    @property
    def size(self) -> int:
        """S: positions of the longest prompt."""
        return self.keys[0].shape[2]

    @property
    def both(self) -> tuple[list[Tensor], list[Tensor]]:
        """Keys, and values."""
        return self.keys, self.values

    @property
    def slots(self) -> Tensor:
        """The place of each row where every prompt has as many as the one with the most: int64[B] into P * n."""
        return torch.arange(len(self.owners), device=self.owners.device) if self._places is None else self._places

    @property
    def devices(self) -> list[torch.device]:
        """Of each layer."""
        return [key.device for key in self.keys]

    def keep(self, key: Tensor, value: Tensor) -> None:
        """The next layer's: float[P, A, S, d]."""
        self.keys.append(key)
        self.values.append(value)

    def real(self, device: torch.device) -> Tensor:
        """Which positions are no padding: bool[P, S]."""
        if device not in self._real:
            self._real[device] = torch.arange(self.size, device=device) < self.lengths.to(device)[:, None]
            if device.type == "cpu":  # others would have to be waited for
                self.full = self.full or bool(self._real[device].all())
        return self._real[device]

    def select(self, rows: Tensor) -> Tier:
        """For rows in a new order, int64[N]; prompts stay until most of them have no rows any more."""
        owners = self.owners[rows]
        if torch.equal(owners, self.owners):
            return self
        used = owners.unique()
        if 2 * len(used) > len(self.lengths):
            return self._of(self.lengths, owners, self.keys, self.values)
        keys, values = _some(self.keys, used), _some(self.values, used)
        return self._of(self.lengths[used], torch.searchsorted(used, owners), keys, values)

    def join(self, other: Tier) -> Tier:
        """For these rows and then those of another tier; its prompts come in, unless they are the same."""
        if self.keys is other.keys:
            return self._of(self.lengths, torch.cat([self.owners, other.owners]), self.keys, self.values)
        size = max(self.size, other.size)

        def both(mine: list[Tensor], theirs: list[Tensor]) -> list[Tensor]:
            return [torch.cat([_wide(x, size), _wide(y, size)]) for x, y in zip(mine, theirs, strict=True)]

        owners = torch.cat([self.owners, other.owners + len(self.lengths)])
        lengths = torch.cat([self.lengths, other.lengths])
        new = Tier(lengths, owners, both(self.keys, other.keys), both(self.values, other.values))
        new.full = self.full and other.full and self.size == other.size
        return new

    def _of(self, lengths: Tensor, owners: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tier:
        new = Tier(lengths, owners, keys, values)
        new.full = self.full
        return new

    def to_prompts(self, x: Tensor) -> Tensor:
        """[B, A, M, X] to [P * A, n * M, X]: the rows of one prompt beside each other, zeros where few."""
        places, most = self._places, self.most
        if places is not None:
            x = x.new_zeros(len(self.lengths) * most, *x.shape[1:]).index_copy(0, places.to(x.device), x)
        if most == 1:
            return x.flatten(0, 1)
        return x.unflatten(0, (-1, most)).transpose(1, 2).flatten(2, 3).flatten(0, 1)

    def to_rows(self, x: Tensor, heads: int) -> Tensor:
        """[P * A, n * M, X] back to [B * A, M, X]."""
        places, most = self._places, self.most
        if places is None and most == 1:
            return x
        x = x.view(-1, heads, most, x.shape[1] // most, x.shape[2]).transpose(1, 2).flatten(0, 1)  # (P * n, A, M, X)
        return (x if places is None else x[places.to(x.device)]).flatten(0, 1)


def _places(owners: Tensor, prompts: int) -> tuple[Tensor | None, int]:
    """A place for each row among its prompt's, int64[B] into P * n, None where that is its own; and n."""
    counts = owners.bincount(minlength=prompts)
    order = owners.argsort(stable=True)
    starts = counts.cumsum(0) - counts
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device) - starts[owners[order]]
    most = int(counts.max()) if len(owners) else 0
    places = owners * most + rank
    same = len(places) == prompts * most and torch.equal(places, torch.arange(len(places), device=places.device))
    return (None if same else places), most


def _wide(x: Tensor, size: int) -> Tensor:
    """float[P, A, S, d], padded to so many positions."""
    return x if x.shape[2] == size else F.pad(x, (0, 0, 0, size - x.shape[2]))


def _some(every: list[Tensor], prompts: Tensor) -> list[Tensor]:
    return [each.index_select(0, prompts.to(each.device)) for each in every]
