"""A language model that writes only some of its tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from blip2.adapters.narrowed import Narrowed
from blip2.generate import generate, rank, stream
from blip2.generate.methods import Beam, Greedy, Limits, Sample
from blip2.protocols import LanguageModel

STOPS = (3, 7)
WRITTEN = torch.tensor([1, 3, 4, 7, 9, 11, 12, 14, 18, 20])


class Masked:
    """The same by brute force: everything is scored, then what is not written is struck out."""

    def __init__(self, language: Any) -> None:
        self.language = language
        self.context, self.vocab_size = language.context, language.vocab_size

    def _strike(self, logits: Tensor) -> Tensor:
        kept = torch.full_like(logits, float("-inf"))
        kept[:, WRITTEN] = logits[:, WRITTEN]
        return kept

    def prefill(self, prefix: Tensor, lengths: Tensor) -> tuple[Tensor, Any]:
        logits, cache = self.language.prefill(prefix, lengths)
        return self._strike(logits), cache

    def step(self, ids: Tensor, cache: Any) -> Tensor:
        return self._strike(self.language.step(ids, cache))


@pytest.mark.parametrize("few", [0, 1024])
@pytest.mark.parametrize("method", [Greedy(), Beam(3), Sample(seed=5), Sample(top_k=3, top_p=0.9, seed=6)])
def test_it_writes_what_the_whole_model_would_with_the_rest_struck_out(
    language: Any, prefix: Tensor, lengths: Tensor, method: Any, few: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("blip2.generate.words.FEW", few)
    limits = Limits(max_new_tokens=9)
    narrowed = Narrowed(language, WRITTEN)
    assert isinstance(narrowed, LanguageModel)

    found = generate(narrowed, prefix, lengths, method, limits, STOPS)

    expected = generate(Masked(language), prefix, lengths, method, limits, STOPS)  # type: ignore[arg-type]
    assert [[(text.ids, text.end) for text in row] for row in found] == [
        [(text.ids, text.end) for text in row] for row in expected
    ]
    if not isinstance(method, Beam):
        assert list(stream(narrowed, prefix, lengths, method, limits, STOPS)) == list(
            stream(Masked(language), prefix, lengths, method, limits, STOPS)  # type: ignore[arg-type]
        )
    assert all(set(text.ids) <= set(WRITTEN.tolist()) for row in found for text in row)


def test_choices_may_hold_any_word(language: Any, prefix: Tensor, lengths: Tensor):
    choices = [[4, 3], [15, 16, 3]]
    scores = rank(Narrowed(language, WRITTEN), prefix, lengths, choices)

    wide = torch.tensor(sorted({*WRITTEN.tolist(), 15, 16}))
    targets = torch.tensor([[4, 3, -100], [15, 16, 3]])
    expected = [language.log_probs(prefix, lengths, row.expand(len(prefix), -1), wide).sum(1) for row in targets]
    torch.testing.assert_close(scores, torch.stack(expected, 1))
    torch.testing.assert_close(rank(Narrowed(language, WRITTEN), prefix, lengths, choices, batch=1), scores)
