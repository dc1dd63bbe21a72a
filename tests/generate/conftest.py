"""A language model of a few numbers, in float64, so that batched and unbatched sums never part at a near-tie."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

VOCAB, WIDTH = 23, 8


@dataclass
class States:
    hidden: Tensor  # (B, D)

    def select(self, rows: Tensor) -> States:
        return States(self.hidden[rows])

    def join(self, other: States) -> States:
        return States(torch.cat([self.hidden, other.hidden]))


class Recurrent:
    """A random recurrent network: everything read so far changes every later score."""

    def __init__(self, seed: int = 13, context: int = 200) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._words, self._mix, self._head = (
            torch.randn(*shape, generator=generator, dtype=torch.float64)
            for shape in ((VOCAB, WIDTH), (WIDTH, WIDTH), (WIDTH, VOCAB))
        )
        self.width, self.vocab_size, self.context = WIDTH, VOCAB, context
        self.prefills = 0
        self.rows_read: list[int] = []

    def embed(self, ids: Tensor) -> Tensor:
        return self._words[ids]

    def _read(self, hidden: Tensor, embeds: Tensor) -> Tensor:
        return torch.tanh(hidden @ self._mix + embeds)

    def prefill(self, prefix: Tensor, lengths: Tensor, vocabulary: Tensor | None = None) -> tuple[Tensor, States]:
        self.prefills += 1
        hidden = torch.zeros(len(prefix), WIDTH, dtype=torch.float64)
        for place in range(prefix.shape[1]):
            hidden = torch.where((place < lengths)[:, None], self._read(hidden, prefix[:, place].double()), hidden)
        return self._scores(hidden, vocabulary), States(hidden)

    def step(self, ids: Tensor, cache: States, vocabulary: Tensor | None = None) -> Tensor:
        self.rows_read.append(len(ids))
        cache.hidden = self._read(cache.hidden, self.embed(ids))
        return self._scores(cache.hidden, vocabulary)

    def _scores(self, hidden: Tensor, vocabulary: Tensor | None) -> Tensor:
        return 2 * hidden @ (self._head if vocabulary is None else self._head[:, vocabulary])

    def log_probs(
        self,
        prefix: Tensor,
        lengths: Tensor,
        targets: Tensor,
        vocabulary: Tensor | None = None,
        alike: tuple[Tensor, int] | None = None,  # noqa: ARG002
    ) -> Tensor:
        vocabulary = torch.arange(VOCAB) if vocabulary is None else vocabulary
        logits, cache = self.prefill(prefix, lengths, vocabulary)
        found: list[Tensor] = []
        for words in targets.T.contiguous():
            target = torch.where(words < 0, words, torch.searchsorted(vocabulary, words))
            scores = logits.log_softmax(-1).gather(1, target.clamp(min=0)[:, None])[:, 0]
            found.append(scores.masked_fill(target < 0, 0.0))
            logits = self.step(words.clamp(min=0), cache, vocabulary)
        return torch.stack(found, 1).float()


@pytest.fixture(scope="session")
def recurrent() -> type[Recurrent]:
    return Recurrent


@pytest.fixture
def language() -> Recurrent:
    return Recurrent()


@pytest.fixture(scope="session")
def prefix() -> Tensor:
    """Five rows, padded to six positions."""
    return torch.randn(5, 6, WIDTH, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="session")
def lengths() -> Tensor:
    return torch.tensor([3, 6, 1, 4, 6])
