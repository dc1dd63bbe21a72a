from __future__ import annotations

import pytest
import torch
from torch import Tensor

from blip2.errors import PromptError
from blip2.generate import rank
from blip2.protocols import LanguageModel

CHOICES = [[5, 1], [7, 8, 9, 1], [2], [7, 8, 1]]


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_a_score_is_the_log_likelihood_of_the_choice_alone(
    language: LanguageModel, prefix: Tensor, lengths: Tensor, batch: int
) -> None:
    scores = rank(language, prefix, lengths, CHOICES, batch=batch)
    means = rank(language, prefix, lengths, CHOICES, batch=batch, per_token=True)
    assert scores.shape == (5, 4)
    for row, length in enumerate(lengths.tolist()):
        for column, choice in enumerate(CHOICES):
            one = prefix[row : row + 1, :length]
            expected = language.log_probs(one, lengths[row : row + 1], torch.tensor([choice])).sum()
            assert torch.allclose(scores[row, column], expected, atol=1e-5)
            assert torch.allclose(means[row, column], expected / len(choice), atol=1e-5)


@pytest.mark.parametrize("choices", [[], [[5], []]])
def test_an_empty_choice_is_refused(
    language: LanguageModel, prefix: Tensor, lengths: Tensor, choices: list[list[int]]
) -> None:
    with pytest.raises(PromptError, match="empty"):
        rank(language, prefix, lengths, choices)
