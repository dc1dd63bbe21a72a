"""The bridge: everything of BLIP-2 that is trained, between a frozen image encoder and a frozen language model.

Letters: B rows, P patches, Q queries, T text positions, D Q-Former width, E width of the image-text space.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip2.config import Blip2Config
from blip2.errors import ConfigError
from blip2.model.attention import lowered
from blip2.model.heads import StageOneHeads
from blip2.model.qformer import Look, QFormer, Sight

GROUP = 32  # texts of like length that a CPU computes together


class Bridge(nn.Module):
    """`ln_vision`, the Q-Former, its heads and the projection to the language model."""

    def __init__(self, config: Blip2Config) -> None:
        super().__init__()
        if config.vision.width != config.qformer.encoder_width:
            raise ConfigError(
                f"qformer.encoder_width is {config.qformer.encoder_width}, the image encoder's is {config.vision.width}"
            )
        if config.question_aware and not config.qformer.text:
            raise ConfigError(
                "question_aware: this Q-Former has no text side to read a question with (qformer.text is false); start "
                "from a model that has one, or leave it out"
            )
        self.config = config
        self.vision_norm = nn.LayerNorm(config.vision.width, config.vision_norm_eps)
        self.qformer = QFormer(config.qformer)
        self.heads = StageOneHeads(config) if config.heads else None
        width = config.qformer.width
        self.language_projection = nn.Linear(width, config.language.width) if config.language else None

    @property
    def dtype(self) -> torch.dtype:
        """That it computes in."""
        return self.vision_norm.weight.dtype

    def see(self, patches: Tensor) -> Sight:
        """Images as the queries read them, whatever the text beside: float[B, P, Dv]."""
        return self.qformer.see(self.vision_norm(lowered(patches)))

    def look(self, sight: Sight) -> Look:
        """The queries read the images: hidden states float[B, Q, D] with their keys and values."""
        return self.qformer.look(sight)

    def image_vectors(self, hidden: Tensor) -> Tensor:
        """Queries in the image-text space: float[B, Q, D] to float32[B, Q, E], unit length (ITC)."""
        return F.normalize(self._heads.vision_proj(hidden).float(), dim=-1)

    def text_vectors(self, ids: Tensor) -> Tensor:
        """Texts in the image-text space: int64[B, T], right-padded, to float32[B, E], unit length (ITC)."""
        return self._by_length(ids, lambda _, group: self._text_vectors(group))

    def _text_vectors(self, ids: Tensor) -> Tensor:
        hidden = self.qformer.read(ids)  # (B, T, D)
        pooled = hidden[:, 0] if self.config.qformer.text_pooling == "cls" else self.qformer.mean(hidden, ids)
        return F.normalize(self._heads.text_proj(pooled).float(), dim=-1)

    def match(self, sight: Sight, images: Tensor, ids: Tensor) -> Tensor:
        """The matching head on pairs: the mean over the queries (ITM).

        Args:
            sight: of N images, each seen once for all of its pairs.
            images: int64[B], the image of each pair.
            ids: int64[B, T], its text, right-padded.
        Returns:
            float32[B, 2], logits of (no match, match).
        """
        return self._by_length(ids, lambda rows, group: self._match(sight, images[rows], group))

    def _match(self, sight: Sight, images: Tensor, ids: Tensor) -> Tensor:
        return self._heads.itm_head(self._joined(sight, images, ids)).float().mean(1)

    def heed(self, sight: Sight, images: Tensor, ids: Tensor) -> Tensor:
        """Queries that read images beside a question: hidden states float[B, Q, D], for `project`.

        Args:
            sight, images, ids: as of `match`, the text being the question.
        Source: BLIP-2, section 4.3.
        """
        return self._by_length(ids, lambda rows, group: self._joined(sight, images[rows], group))

    def _joined(self, sight: Sight, images: Tensor, ids: Tensor) -> Tensor:
        return self.qformer.join(sight, ids, images, wanted=self.config.qformer.queries)  # (B, Q, D)

    def match_all(self, sight: Sight, ids: Tensor, texts: int = GROUP) -> Tensor:
        """The matching head on every image with every text: no image's keys are copied for its texts.

        Args:
            sight: of N images.
            ids: int64[M, T], right-padded.
            texts: the most that are read together, of like length.
        Returns:
            float32[N, M, 2], logits of (no match, match).
        """
        images, lengths = len(sight.keys[0]), self.qformer.real(ids).sum(1)
        order = lengths.argsort(descending=True, stable=True)
        found: list[Tensor] = []
        for rows in order.split(min(texts, GROUP)):
            group = ids[rows, : int(lengths[rows[0]])]
            hidden = self.qformer.join(sight, group.repeat(images, 1), wanted=self.config.qformer.queries)
            found.append(self._heads.itm_head(hidden).float().mean(1).unflatten(0, (images, -1)))  # (N, rows, 2)
        return torch.cat(found, dim=1)[:, order.argsort()]

    def groups(self, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Rows of like length, and their ids cut to the longest of them; all rows are in one of the groups.

        On a CPU padding costs as much as words, and half of a batch of captions is padding.
        """
        if ids.device.type != "cpu" or len(ids) <= 1:
            return [(torch.arange(len(ids), device=ids.device), ids)]
        lengths = self.qformer.real(ids).sum(1)
        order = lengths.argsort(descending=True, stable=True)
        return [(rows, ids[rows, : int(lengths[rows[0]])]) for rows in order.split(GROUP)]

    def _by_length(self, ids: Tensor, run: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """`run(rows, ids[rows])` on texts of like length together, in the rows' own order again."""
        groups = self.groups(ids)
        order = torch.cat([rows for rows, _ in groups])
        return torch.cat([run(rows, group) for rows, group in groups])[order.argsort()]

    def write(self, look: Look, ids: Tensor) -> Tensor:
        """Hidden states float[B, T, D] that see the queries and the text so far; [CLS] gives way to [DEC] (ITG)."""
        first = torch.full_like(ids[:, :1], self.config.qformer.decoder_id)
        return self.qformer.write(look, torch.cat([first, ids[:, 1:]], dim=1))

    def word_logits(self, hidden: Tensor, vocabulary: Tensor | None = None) -> Tensor:
        """Logits of the next token (ITG).

        Args:
            hidden: float[..., D], from `write`.
            vocabulary: int64[K], sorted: logits of these tokens only, all where None.
        Returns:
            float[..., K or V].
        """
        words, head = self.qformer.words.weight, self._heads.words
        if head is None:
            raise ConfigError("this model has no word head: its format keeps none, and stage 1 trains one (ITG)")
        if vocabulary is None:
            return F.linear(head(hidden), words, head.bias)
        return F.linear(head(hidden), words[vocabulary], head.bias[vocabulary])

    def project(self, hidden: Tensor) -> Tensor:
        """Queries as soft prompt: float[B, Q, D] to the language model's width."""
        if self.language_projection is None:
            raise ConfigError("this model has no language model: it matches and embeds, but does not write")
        return self.language_projection(hidden.to(self.dtype))

    @property
    def _heads(self) -> StageOneHeads:
        if self.heads is None:
            raise ConfigError("this model has no matching heads: it writes, but does not match or embed")
        return self.heads
