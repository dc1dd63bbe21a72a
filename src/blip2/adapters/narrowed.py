"""A language model that writes only the tokens that it was trained to write here.

Stage 2 may train a softmax over the words in use (`vocabulary: used`); a token outside of it was never pushed down, and
over a whole vocabulary such tokens slip into every text. Letters: B rows, S positions, T targets, D width, V and K
vocabulary and the part of it that is written.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from blip2.protocols import Cache, LanguageModel


class Narrowed(nn.Module):
    """Satisfies `protocols.LanguageModel`: every token may be read, those of the vocabulary alone are written.

    Args:
        language: the whole model.
        vocabulary: int64[K], sorted, those that end a text among them.
    """

    vocabulary: Tensor

    def __init__(self, language: LanguageModel, vocabulary: Tensor) -> None:
        super().__init__()
        self.language = language
        self.register_buffer("vocabulary", vocabulary, persistent=False)

    @property
    def width(self) -> int:
        """Width of an embedding."""
        return self.language.width

    @property
    def vocab_size(self) -> int:
        """V: the whole model's."""
        return self.language.vocab_size

    @property
    def context(self) -> int:
        """The most positions that prefix and text may fill together."""
        return self.language.context

    @property
    def start_id(self) -> int | None:
        """The token that every text of an encoder-decoder begins from."""
        return getattr(self.language, "start_id", None)

    @property
    def goes_on(self) -> bool:
        """Whether `prefill` takes a past."""
        return getattr(self.language, "goes_on", False)

    def embed(self, ids: Tensor) -> Tensor:
        """Token embeddings: int64[...] to float[..., D]."""
        return self.language.embed(ids)

    def prefill(
        self, prefix: Tensor, lengths: Tensor, vocabulary: Tensor | None = None, past: Any = None
    ) -> tuple[Tensor, Cache]:
        """As the model's; logits -inf for what is not written. See `protocols.LanguageModel`."""
        more = () if past is None else (past,)
        if vocabulary is not None:
            return self.language.prefill(prefix, lengths, vocabulary, *more)
        logits, cache = self.language.prefill(prefix, lengths, self.vocabulary, *more)
        return self._spread(logits), cache

    def step(self, ids: Tensor, cache: Any, vocabulary: Tensor | None = None) -> Tensor:
        """As the model's; logits -inf for what is not written. See `protocols.LanguageModel`."""
        if vocabulary is not None:
            return self.language.step(ids, cache, vocabulary)
        return self._spread(self.language.step(ids, cache, self.vocabulary))

    def log_probs(
        self,
        prefix: Tensor,
        lengths: Tensor,
        targets: Tensor,
        vocabulary: Tensor | None = None,
        alike: tuple[Tensor, int] | None = None,
        past: Any = None,
    ) -> Tensor:
        """As the model's; the softmax runs over what is written, unless another vocabulary is given."""
        more = () if past is None else (past,)
        return self.language.log_probs(
            prefix, lengths, targets, self.vocabulary if vocabulary is None else vocabulary, alike, *more
        )

    def _spread(self, logits: Tensor) -> Tensor:
        """float[B, K] to float[B, V], so that tokens keep their ids."""
        whole = logits.new_full((len(logits), self.vocab_size), float("-inf"))
        return whole.index_copy_(1, self.vocabulary, logits)
