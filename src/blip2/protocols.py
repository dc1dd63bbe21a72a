"""The two kinds of frozen part, and what a bridge asks of them.

Letters: B rows, P patches, O of them beside the grid, S prefix positions, T target positions, D width, V vocabulary,
K a part of it, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, Self, TypeAlias, runtime_checkable

import torch
from torch import Tensor

Progress: TypeAlias = Callable[[int, int], None]
"""Called with how many are done, of how many."""


@runtime_checkable
class ImageEncoder(Protocol):
    """A frozen image encoder: normalised pixels to a sequence of patch features."""

    @property
    def width(self) -> int:
        """Width of a patch feature."""
        ...

    @property
    def image_size(self) -> int:
        """Side of the square input in pixels."""
        ...

    @property
    def mean(self) -> tuple[float, float, float]:
        """Mean of each channel on 0..1, that pixels are normalised with."""
        ...

    @property
    def std(self) -> tuple[float, float, float]:
        """Standard deviation of each channel on 0..1."""
        ...

    def __call__(self, pixels: Tensor) -> Tensor:
        """Patch features.

        Args:
            pixels: float[B, 3, H, W], normalised.
        Returns:
            float[B, P, D].
        """
        ...


@dataclass(frozen=True)
class Places:
    """Where the patches of a picture lie.

    Attributes:
        rows, columns: of the grid that covers the encoder's whole square, cell by cell, row after row.
        first: number of the grid's first patch.
        beside: what each patch is that lies on no grid, in order.
        grids: how many patches a cell has: one such grid after the other.
    """

    rows: int
    columns: int
    first: int
    beside: tuple[str, ...]
    grids: int = 1

    @property
    def count(self) -> int:
        """P: patches altogether."""
        return self._on_grids + len(self.beside)

    @property
    def _on_grids(self) -> int:
        return self.grids * self.rows * self.columns

    def grid(self, values: Tensor) -> Tensor:
        """Of values of patches, float[..., P], the sum at each cell of the grid, float[..., rows, columns]."""
        cells = values[..., self.first : self.first + self._on_grids]
        return cells.unflatten(-1, (self.grids, self.rows, self.columns)).sum(-3)

    def rest(self, values: Tensor) -> Tensor:
        """Of values of patches, float[..., P], those beside the grid, float[..., O]."""
        return torch.cat([values[..., : self.first], values[..., self.first + self._on_grids :]], dim=-1)


@runtime_checkable
class Placed(Protocol):
    """An image encoder that says where its patches lie, which `explain` asks of it."""

    def places(self, patches: Tensor) -> Places:
        """Where the patches of one image lie, float[P, D]: as many as this encoder gives."""
        ...


class Cache(Protocol):
    """What a language model has read so far, one row a sequence.

    A cache that has `join(other)` too, and no `joins` that is False, takes the rows of another one in, after its own:
    then finished texts' places are taken by waiting ones. Its rows count their positions, whenever they began. One that
    has `moved(rows)`, as `select`, is asked for that where the cache is not used any more.
    """

    def select(self, rows: Tensor) -> Self:
        """The rows in a new order, some perhaps many times or not at all: for beams and finished rows.

        Args:
            rows: int64[N], indices into the present rows.
        """
        ...


@runtime_checkable
class LanguageModel(Protocol):
    """A frozen language model, decoder-only or encoder-decoder: the difference stays behind this protocol.

    A prefix is right-padded; a row's result never depends on its neighbours or on padding. A model whose `goes_on` is
    True has a last argument `past` of `prefill` and of `log_probs`: a cache that each row goes on from, itself made by
    the `part` and `head` of such a cache, which stays as it is. A model that writes some tokens only has `vocabulary`.
    """

    @property
    def width(self) -> int:
        """Width of an embedding."""
        ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def context(self) -> int:
        """The most positions that prefix and text may fill together."""
        ...

    def embed(self, ids: Tensor) -> Tensor:
        """Token embeddings as the model's first layer takes them: int64[...] to float[..., D]."""
        ...

    def prefill(self, prefix: Tensor, lengths: Tensor, vocabulary: Tensor | None = None) -> tuple[Tensor, Cache]:
        """Read the prefix once.

        Args:
            prefix: float[B, S, D], right-padded.
            lengths: int64[B], how many positions of each row are real.
            vocabulary: int64[K], sorted: logits of these tokens only (all where None).
        Returns:
            logits float[B, V or K] of the first new token, and the cache to go on from.
        """
        ...

    def step(self, ids: Tensor, cache: Any, vocabulary: Tensor | None = None) -> Tensor:
        """Read one more token a row, int64[B], into the cache that `prefill` gave; logits of the next, as there."""
        ...

    def log_probs(
        self,
        prefix: Tensor,
        lengths: Tensor,
        targets: Tensor,
        vocabulary: Tensor | None = None,
        alike: tuple[Tensor, int] | None = None,
    ) -> Tensor:
        """Log-probability of each target token after the prefix and the targets before it (teacher forcing).

        Carries the gradient to `prefix`: the loss of stage 2 is the negative mean of this, a choice's score its sum.

        Args:
            prefix: float[B, S, D], right-padded.
            lengths: int64[B].
            targets: int64[B, T], right-padded with -100.
            vocabulary: int64[K], sorted: the softmax runs over these tokens only (all where None); every target
                must be among them.
            alike: owners int64[B], not falling, and a number of positions: rows of one owner have the same prefix so
                far, which need not be computed for each of them.
        Returns:
            float32[B, T], 0 where the target is padding.
        """
        ...
