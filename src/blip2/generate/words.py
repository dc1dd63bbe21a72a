"""The tokens that a search chooses from. Letters: K tokens that a model writes, N rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from blip2.generate.methods import Tokens
from blip2.protocols import LanguageModel

FEW = 1024  # beams may need as many tokens to choose from: of a smaller vocabulary all tokens are looked at


class Words:
    """All tokens of a model; or, where it writes some only, those: a search then knows them by their place.

    Looking through a vocabulary of 262,144 tokens takes longer than a layer; a model that writes 9,134 is spared it.

    Args:
        said: int64[N, H], what counts as said before the texts; a search that must know it works on all tokens.
    Attributes:
        written: int64[K], sorted; None where all tokens are looked at.
    """

    def __init__(self, language: LanguageModel, said: Tensor) -> None:
        some: Tensor | None = getattr(language, "vocabulary", None)
        self.written = None if said.shape[1] or some is None or len(some) < FEW else some

    @property
    def asked(self) -> tuple[Tensor, ...]:
        """The last argument of `prefill` and `step`, where there is one."""
        return () if self.written is None else (self.written,)

    def places(self, ids: Sequence[int]) -> tuple[int, ...]:
        """Of tokens, as a search knows them; those that are never written are left out."""
        if self.written is None:
            return tuple(ids)
        return tuple(torch.isin(self.written, self.written.new_tensor(ids)).nonzero()[:, 0].tolist())

    def ids(self, places: Tensor) -> Tensor:
        """Tokens, int64[N], of what a search chose."""
        return places if self.written is None else self.written[places]

    def token(self, place: int | None) -> int | None:
        """One token; None of none."""
        return place if place is None or self.written is None else int(self.written[place])

    def tokens(self, text: Tokens) -> Tokens:
        """A text of a search in the model's tokens."""
        if self.written is None:
            return text
        ids = self.written[self.written.new_tensor(text.ids)].tolist()
        return dataclasses.replace(text, ids=tuple(ids), end=self.token(text.end))
