"""What every frozen language model of ours has: words, a head, and no training of its own.

Letters: N positions, D width, V vocabulary, K a part of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip2.model.scoring import HeadRows


class Language(nn.Module):
    """Embeddings and head; the rest of `protocols.LanguageModel` is a family's own.

    Args:
        width, vocab_size: of the embeddings.
        context: the most positions that prefix and text may fill together.
        tied: whether the head's weights are the embeddings.
    Attributes:
        make_head: how words, float[K, D], become a product with them where no gradient is asked for: a faster one of
            the same, set by whoever knows the device. None where there is none.
    """

    def __init__(self, width: int, vocab_size: int, context: int, *, tied: bool = True) -> None:
        super().__init__()
        self.words = nn.Embedding(vocab_size, width)
        self.head = None if tied else nn.Linear(width, vocab_size, bias=False)
        self.context = context
        self.make_head: Callable[[Tensor], Callable[[Tensor], Tensor]] | None = None
        self._rows = HeadRows()

    @property
    def width(self) -> int:
        """Width of an embedding."""
        return self.words.embedding_dim

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return self.words.num_embeddings

    def embed(self, ids: Tensor) -> Tensor:
        """Token embeddings: int64[...] to float[..., D]."""
        return self.words(ids)

    def logits(self, hidden: Tensor, vocabulary: Tensor | None = None) -> Tensor:
        """float[N, D] to float32[N, V], or [N, K] of some tokens."""
        scores = self._scores(hidden, vocabulary)
        return scores.to(torch.promote_types(scores.dtype, torch.float32))

    def _scores(self, hidden: Tensor, vocabulary: Tensor | None) -> Tensor:
        fast = None if torch.is_grad_enabled() and hidden.requires_grad else self.make_head
        if self.head is not None and vocabulary is None and fast is None:
            return self.head(hidden)
        weight = (self.head or self.words).weight
        if fast is not None:
            return self._rows.product(vocabulary, weight, fast)(hidden)
        rows = (weight, None) if vocabulary is None else self._rows(vocabulary, weight, None)
        return F.linear(hidden, *rows)

    def train(self, mode: bool = True) -> Self:  # noqa: ARG002
        """Stays in evaluation mode: the model is frozen."""
        return super().train(False)
