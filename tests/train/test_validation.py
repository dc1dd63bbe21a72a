"""What is looked at while training: captions, and questions where the recipe trains on them."""

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor, nn

from blip2.config import PromptConfig
from blip2.data.sources import ImageRef, Sample
from blip2.train.data import Texts
from blip2.train.distributed import World
from blip2.train.loop import better
from blip2.train.objectives import Batch
from blip2.train.parts import Data
from blip2.train.validation import OF_QUESTIONS, Validation


class Recorder(nn.Module):
    """A loss of 1 a caption and of 3 a question; keeps what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, tuple[tuple[int, ...], ...]]] = []

    def forward(self, batch: Batch, seed: int) -> dict[str, Tensor]:  # noqa: ARG002
        self.seen.append((batch.images[:, 0, 0], batch.prompts))
        return {"lm": torch.tensor([3.0 if prompt else 1.0 for prompt in batch.prompts]).mean()}


def held_out(questions: Sequence[int]) -> Data:
    """Pictures with a caption each, and questions about some; a picture's patches are its number."""
    samples = [
        Sample(f"s{row}", ImageRef(Path(f"{row}.jpg")), ("a red circle",), (("the colour", "red"),) * count)
        for row, count in enumerate(questions)
    ]
    return Data(samples, lambda rows, views: torch.tensor(rows).float()[:, None, None].expand(-1, 2, 3))  # noqa: ARG005


def validation(data: Data, objective: nn.Module, questions: float) -> Validation:
    texts = Texts(language=tiny.tokenizer(), prompts=PromptConfig())
    made = World(), torch.device("cpu")
    return Validation(nn.Module(), objective, [data], texts, 4, *made, questions=questions)  # pyright: ignore


def test_questions_are_scored_beside_captions_in_the_shares_of_training():
    recorder = Recorder()
    metrics, score = validation(held_out([0, 1, 2, 0, 1, 0]), recorder, questions=0.4)()
    assert metrics == {"lm": 1.0, OF_QUESTIONS: 3.0}
    assert score == pytest.approx(-(0.6 * 1 + 0.4 * 3))
    asked = [images.tolist() for images, prompts in recorder.seen if all(prompts)]
    assert sorted(row for images in asked for row in images) == [1, 2, 4], "only pictures with questions, each its own"


@pytest.mark.parametrize(("counts", "questions"), [([0, 0, 0, 0], 0.4), ([1, 1, 1, 1], 0.0)])
def test_without_questions_captions_alone_are_scored(counts: list[int], questions: float):
    metrics, score = validation(held_out(counts), Recorder(), questions)()
    assert metrics == {"lm": 1.0}
    assert score == -1.0


def test_a_score_that_is_no_number_is_beaten_by_any_and_beats_none():
    assert better(-7.0, math.nan)
    assert not better(math.nan, -7.0)
    assert not better(math.nan, math.nan)
    assert better(2.0, 1.0)
    assert not better(1.0, 1.0)
