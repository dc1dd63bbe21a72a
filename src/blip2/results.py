"""The values that verbs take and give. Letters: N images, M texts, P patches, Q queries, D width."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from blip2.reading import Reading


@dataclass(frozen=True)
class ImageFeatures:
    """Images encoded once, accepted wherever an image is.

    Attributes:
        patches: float[N, P, Dv], the frozen encoder's output; matching needs it.
        queries: float[N, Q, Dq], what the Q-Former read from it; captions and answers start here.
        vectors: float[N, Q, E], unit length, in the shared image-text space; empty (E = 0) without that head.
        readings: of each image, what language models have read of it, so that the next question goes on from there:
            21 MB an image of OPT-2.7b in float32, 0.6 MB of `mini`, and of few images at a time only. Chosen images
            keep theirs.
    """

    patches: Tensor
    queries: Tensor
    vectors: Tensor
    readings: tuple[Reading, ...] = field(default=(), repr=False, compare=False)

    def __post_init__(self) -> None:
        if len(self.readings) != len(self):
            object.__setattr__(self, "readings", tuple(Reading() for _ in range(len(self))))

    def __len__(self) -> int:
        return self.queries.shape[0]

    def __getitem__(self, rows: int | slice | Sequence[int] | Tensor) -> ImageFeatures:
        """Some of the images, still as a batch."""
        index = [rows] if isinstance(rows, int) else rows
        kept = [self.readings[number] for number in torch.arange(len(self))[_on_cpu(index)].tolist()]
        return ImageFeatures(self.patches[index], self.queries[index], self.vectors[index], tuple(kept))

    @staticmethod
    def concatenate(parts: Sequence[ImageFeatures]) -> ImageFeatures:
        """Several batches as one, in order."""
        return ImageFeatures(
            torch.cat([part.patches for part in parts]),
            torch.cat([part.queries for part in parts]),
            torch.cat([part.vectors for part in parts]),
            tuple(reading for part in parts for reading in part.readings),
        )


@dataclass(frozen=True)
class Matches:
    """How well N images and M texts fit.

    Attributes:
        itm: float[N, M], probability that the pair matches (image-text matching head).
        itc: float[N, M], cosine of the best query and the text (image-text contrastive).
        odds: float[N, M], log-odds of a match as the head gives them, before any calibration: retrieval ranks by them.
    """

    itm: Tensor
    itc: Tensor
    odds: Tensor


@dataclass(frozen=True)
class Generation:
    """One generated text.

    Attributes:
        text: decoded and stripped.
        ids: its tokens, without the one that ended it.
        log_probs: log-probability of each generated token, the ending one included where there was one.
        score: what it was ranked by: the sum of `log_probs` over length ** length_penalty.
        finish: `stop` where the model ended the text itself, `length` where the limit did.
        match: probability that text and image match (ITM); None where it was not asked, or the model does not match.
        cosine: of their vectors (ITC); None as `match`.
    """

    text: str
    ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    score: float
    finish: Literal["stop", "length"]
    match: float | None = None
    cosine: float | None = None

    @property
    def confidence(self) -> float:
        """How sure the language model was of a token, on (geometric) average: from 0 to 1, whatever the length."""
        return math.exp(sum(self.log_probs) / len(self.log_probs)) if self.log_probs else 0.0


@dataclass(frozen=True)
class Ranking:
    """Given answers, by how likely the model finds each.

    Attributes:
        choices: as they were given.
        log_probs: summed log-probability of each choice's tokens.
    """

    choices: tuple[str, ...]
    log_probs: tuple[float, ...]

    @property
    def best(self) -> str:
        """The likeliest choice; the first of equals."""
        return self.choices[max(range(len(self.choices)), key=lambda index: self.log_probs[index])]

    @property
    def probabilities(self) -> tuple[float, ...]:
        """Of each choice, given that one of them is the answer."""
        return tuple(torch.tensor(self.log_probs).softmax(0).tolist())


@dataclass(frozen=True)
class Classification:
    """Labels, by how well they fit an image.

    Attributes:
        labels: as they were given.
        scores: of each label its cosine with the image (ITC), or the probability that it matches by itself (ITM).
    """

    labels: tuple[str, ...]
    scores: tuple[float, ...]

    @property
    def best(self) -> str:
        """The label that fits best; the first of equals."""
        return self.top(1)[0][0]

    def top(self, count: int) -> list[tuple[str, float]]:
        """The best labels with their scores, best first."""
        order = sorted(range(len(self.labels)), key=lambda index: -self.scores[index])[:count]
        return [(self.labels[index], self.scores[index]) for index in order]


def _on_cpu(index: Any) -> Any:
    return index.cpu() if isinstance(index, Tensor) else index
