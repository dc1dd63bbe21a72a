"""Given answers, ranked by how likely the language model finds each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from blip2.errors import PromptError
from blip2.model.scoring import PADDING
from blip2.protocols import LanguageModel


@torch.no_grad()
def rank(
    language: LanguageModel,
    prefix: Tensor,
    lengths: Tensor,
    choices: Sequence[Sequence[int]],
    past: Any = None,
    *,
    per_token: bool = False,
    batch: int = 64,
) -> Tensor:
    """Log-likelihood of each choice after each prefix.

    Args:
        prefix: float[B, S, D], right-padded.
        lengths: int64[B].
        past: a cache of what each prefix goes on from, of a model that `goes_on`.
        choices: C token sequences; end each with a stop token to score the whole answer and not its beginning.
        per_token: the mean over a choice's tokens, which does not favour short ones, instead of the sum.
        batch: how many pairs of prefix and choice the model reads at a time.
    Returns:
        float32[B, C].
    Raises:
        PromptError: there is no choice, or one is empty.
    """
    if not choices or not all(choices):
        raise PromptError("a choice is empty: give at least one choice, and each of them at least one word")
    device = prefix.device
    longest = max(len(choice) for choice in choices)
    padded = [[*choice, *[PADDING] * (longest - len(choice))] for choice in choices]
    targets = torch.tensor(padded, device=device)  # (C, T)
    rows = torch.arange(len(prefix), device=device).repeat_interleave(len(choices))
    which = torch.arange(len(choices), device=device).repeat(len(prefix))
    vocabulary = _with_choices(language, targets)
    common = int(lengths.min())  # a row's choices share all of its prefix, but all rows are cut at one place
    found: list[Tensor] = []
    for some_rows, some in zip(rows.split(batch), which.split(batch), strict=True):
        more = () if past is None else (past.select(some_rows),)
        arguments = prefix[some_rows], lengths[some_rows], targets[some], vocabulary, (some_rows, common), *more
        found.append(language.log_probs(*arguments).sum(1))
    scores = torch.cat(found).view(len(prefix), len(choices))
    return scores / (targets != PADDING).sum(1) if per_token else scores


def _with_choices(language: LanguageModel, targets: Tensor) -> Tensor | None:
    """Where a model writes some tokens only: these and those of all choices, one vocabulary for every row."""
    written: Tensor | None = getattr(language, "vocabulary", None)
    return None if written is None else torch.cat([written, targets[targets != PADDING]]).unique()
