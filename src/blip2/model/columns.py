"""Keys and values that each row wrote itself: columns that all rows fill at the same time, in place.

A row may begin at any column. So rows which began at different times go on together, each with its own count.

Letters: B rows, L layers, T new columns, t all columns so far, A heads of keys and values, d width of a head.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

ROOM = 16  # columns that are made room for at a time


class Columns:
    """One buffer a device, for all of its layers.

    Args:
        births: int64[B], the first column of each row.
    Attributes:
        used: t, columns that are filled.
    """

    def __init__(self, births: Tensor) -> None:
        self.births, self.used = births, 0
        self._ragged = False  # whether a row may begin after the first column
        self._devices: list[torch.device] = []  # of the layers
        self._buffers: dict[torch.device, Tensor] = {}  # float[its layers, 2, B, A, room, d]: keys, and values
        self._spare: dict[torch.device, Tensor] = {}  # of the same rows, what `moved` writes to
        self._views: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []  # of a layer, two to write and two to read

    @property
    def counts(self) -> Tensor:
        """How many columns each row has: int64[B]."""
        return self.used - self.births

    def span(self, count: int) -> int:
        """No row has more columns than this, so many new ones included."""
        return self.used + count

    def back(self, count: int) -> Tensor:
        """How far each of so many new columns looks back to each: int64[T, t], below 0 ahead of it."""
        column = torch.arange(self.used + count, device=self.births.device)
        return column[self.used :, None] - column

    def unborn(self, count: int) -> Tensor | None:
        """Columns before a row's first, bool[B, t], so many new ones among them; None where there are none."""
        if not self._ragged:
            return None
        return torch.arange(self.used + count, device=self.births.device) < self.births[:, None]

    def add(self, layer: int, devices: list[torch.device], key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write a layer's new columns; all that it has then.

        Args:
            devices: of all layers.
            key, value: float[B, A, T, d].
        Returns:
            keys and values, float[B * A, t, d].
        """
        if not self._views:
            self._lay_out(devices, key)
        write_key, write_value, keys, values = self._views[layer]
        write_key.copy_(key)
        write_value.copy_(value)
        return keys, values

    def advance(self, count: int) -> None:
        """All layers have written so many columns."""
        self.used += count
        self._views = []

    def select(self, rows: Tensor) -> Columns:
        """The rows in a new order, int64[N], in memory of their own."""
        return self._moved(rows, {})

    def moved(self, rows: Tensor) -> Columns:
        """As `select`, from columns that nobody reads any more: their memory is what the next move writes to.

        Fresh memory at each step costs five times what moving the rows into it does: the system clears its pages.
        """
        new = self._moved(rows, self._spare)
        if len(rows) == len(self.births):  # else no later move has their shape
            new._spare = self._buffers
        return new

    def _moved(self, rows: Tensor, into: dict[torch.device, Tensor]) -> Columns:
        moved: dict[torch.device, Tensor] = {}
        for at, each in self._buffers.items():
            shape = (*each.shape[:2], len(rows), *each.shape[3:])
            spare = into.get(at)
            moved[at] = spare if spare is not None and spare.shape == shape else each.new_empty(shape)
            torch.index_select(self.filled(at), 2, rows.to(at), out=moved[at].narrow(4, 0, self.used))
        return self._with(self.births[rows], self.used, moved)

    def join(self, other: Columns) -> Columns:
        """These rows and then those of another, whose last columns stand beside these last."""
        used = max(self.used, other.used)
        births = torch.cat([self.births + used - self.used, other.births + used - other.used])
        gone = int(births.min()) if len(births) else used  # columns that no row has any more
        parts = (self, slice(0, len(self.births))), (other, slice(len(self.births), None))
        buffers: dict[torch.device, Tensor] = {}
        for at, like in {**other._buffers, **self._buffers}.items():
            layers, two, _, heads, _, width = like.shape
            buffers[at] = like.new_zeros(layers, two, len(births), heads, _rounded(used - gone), width)
            for part, rows in parts:
                kept = min(part.used, used - gone)
                if kept:
                    new = part._buffers[at].narrow(4, part.used - kept, kept)
                    buffers[at][:, :, rows, :, used - gone - kept : used - gone] = new
        joined = (self if self._devices else other)._with(births - gone, used - gone, buffers)
        joined._ragged = bool(joined.births.any())
        return joined

    def filled(self, device: torch.device) -> Tensor:
        """A device's layers: float[L, 2, B, A, t, d]."""
        return self._buffers[device].narrow(4, 0, self.used)

    def take(self, column: Tensor) -> None:
        """One more column of all layers, which are on one device: float[L, 2, B, A, 1, d]."""
        if not self._buffers or self.used == self._buffers[column.device].shape[4]:
            self._make_room([column.device] * len(column), column[0, 0], self.used + 1)
        self._buffers[column.device].narrow(4, self.used, 1).copy_(column)
        self.advance(1)

    def layers(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Keys and values of each layer, float[B, A, t, d]."""
        for at, number in self._numbers():
            key, value = self.filled(at)[number].unbind(0)
            yield key, value

    def _with(self, births: Tensor, used: int, buffers: dict[torch.device, Tensor]) -> Columns:
        new = Columns(births)
        new.used, new._ragged, new._devices, new._buffers = used, self._ragged, self._devices, buffers
        return new

    def _numbers(self) -> Iterator[tuple[torch.device, int]]:
        """The device of each layer, and which of that device's layers it is."""
        counts = dict.fromkeys(self._devices, 0)
        for device in self._devices:
            yield device, counts[device]
            counts[device] += 1

    def _lay_out(self, devices: list[torch.device], like: Tensor) -> None:
        """Room for new columns, and the views of a step."""
        end = self.used + like.shape[2]
        self._make_room(devices, like, end)
        write = {at: each.narrow(4, self.used, like.shape[2]).unbind(0) for at, each in self._buffers.items()}
        read = {at: each.narrow(4, 0, end).flatten(2, 3).unbind(0) for at, each in self._buffers.items()}
        for at, number in self._numbers():
            new, all_ = write[at][number], read[at][number]
            self._views.append((new[0], new[1], all_[0], all_[1]))

    def _make_room(self, devices: list[torch.device], like: Tensor, end: int) -> None:
        """Buffers of so many columns at least, on all layers' devices, for keys like these: float[B, A, T, d]."""
        self._devices = devices
        rows, heads, _, width = like.shape
        for at in dict.fromkeys(devices):
            old = self._buffers.get(at)
            if old is not None and end <= old.shape[4]:
                continue
            shape = devices.count(at), 2, rows, heads, _rounded(end), width
            self._buffers[at] = torch.empty(shape, dtype=like.dtype, device=at)
            if old is not None:
                self.filled(at).copy_(old.narrow(4, 0, self.used))


def _rounded(columns: int) -> int:
    return -(-columns // ROOM) * ROOM
