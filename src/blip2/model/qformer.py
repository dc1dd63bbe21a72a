"""The Querying Transformer: learned queries that read an image, beside a text that may or may not see them.

One transformer, three ways to look (BLIP-2, figure 2):
  ITC  `look` and `read`: queries see queries, text sees text.
  ITM  `join`: queries and text see each other.
  ITG  `write`: text sees the queries and the text before it; the queries' keys and values come from `look`.
What the cross-attention reads of an image hangs on nothing else: `see` computes it once for all of them.

Letters: B rows, Q queries, T text positions, P patches, D width, A heads, E encoder width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from blip2.config import QFormerConfig
from blip2.model.activations import gelu
from blip2.model.attention import attend, lowered, split_heads

INIT_STD = 0.02  # BERT's; BLIP-2's for the queries too


@dataclass(frozen=True)
class Sight:
    """Images as the cross-attention reads them.

    Attributes:
        keys, values: one float[B, A, P, D/A] for each layer that crosses.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    def rows(self, index: Tensor) -> Sight:
        """Some rows, int64[N], perhaps many times."""
        keys, values = ([part[index] for part in parts] for parts in (self.keys, self.values))
        return Sight(tuple(keys), tuple(values))

    def extended(self, other: Sight) -> Sight:
        """These images, then others."""
        keys = (torch.cat(pair) for pair in zip(self.keys, other.keys, strict=True))
        values = (torch.cat(pair) for pair in zip(self.values, other.values, strict=True))
        return Sight(tuple(keys), tuple(values))


@dataclass(frozen=True)
class Look:
    """What the queries saw.

    Attributes:
        hidden: float[B, Q, D], the last layer's output.
        keys, values: one float[B, A, Q, D/A] a layer, of the self-attention: what a text needs to go on from here.
    """

    hidden: Tensor
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    def rows(self, index: Tensor) -> Look:
        """Some rows, int64[N]."""
        keys, values = ([part.index_select(0, index) for part in parts] for parts in (self.keys, self.values))
        return Look(self.hidden.index_select(0, index), tuple(keys), tuple(values))


@dataclass(frozen=True)
class Watch:
    """Where attention went in one pass, for whoever hands it in: weights as the pass used them, gradient and all.

    Attributes:
        within: one float[B, A, N, M] a layer, the self-attention of all positions.
        across: one float[B, A, Q, P] for each layer that crosses, of the queries to their image's patches.
    """

    within: list[Tensor] = field(default_factory=list[Tensor])
    across: list[Tensor] = field(default_factory=list[Tensor])


class QFormer(nn.Module):
    """BERT with learned queries, cross-attention to an image and a second feed-forward for the queries."""

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.config = config
        self.query_tokens = nn.Parameter(torch.empty(1, config.queries, config.width))
        if config.text:
            self.words = nn.Embedding(config.vocab_size, config.width)
            self.positions = nn.Embedding(config.positions, config.width)
        self.norm = nn.LayerNorm(config.width, config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        every = config.cross_attention_every
        self.layers = nn.ModuleList(Layer(config, crosses=index % every == 0) for index in range(config.layers))
        self.apply(_initialise)
        nn.init.normal_(self.query_tokens, std=INIT_STD)
        if config.frozen_words and config.text:
            self.words.weight.requires_grad_(False)

    def see(self, patches: Tensor) -> Sight:
        """Images, float[B, P, E], as the cross-attention reads them."""
        crossing = [layer.cross_attention for layer in self._layers if layer.cross_attention is not None]
        pairs = [attention.keys_values(patches) for attention in crossing]
        return Sight(tuple(key for key, _ in pairs), tuple(value for _, value in pairs))

    def look(self, sight: Sight, watch: Watch | None = None) -> Look:
        """Queries read the image and see no text; what they carry on stays float32, small differences and all.

        Args:
            watch: takes down where they looked.
        Source: BLIP-2, section 3.1.
        """
        x = self._start_queries(len(sight.keys[0]))
        keys: list[Tensor] = []
        values: list[Tensor] = []
        for layer, seen in self._layers_with(sight):
            key, value = layer.attention.keys_values(x)
            keys.append(key)
            values.append(value)
            x = layer(x, x.shape[1], key, value, None, seen, watch)
        return Look(x, tuple(keys), tuple(values))

    def read(self, ids: Tensor) -> Tensor:
        """Text alone, both ways (ITC): int64[B, T], right-padded, to float[B, T, D]."""
        return self.through(self._start_text(ids), 0, self.real(ids))

    def join(
        self,
        sight: Sight,
        ids: Tensor,
        images: Tensor | None = None,
        *,
        wanted: int | None = None,
        watch: Watch | None = None,
    ) -> Tensor:
        """Queries and text see each other (ITM).

        Args:
            sight: of B images; of fewer, each for as many texts in a row; of any number where `images`, int64[B], says
                which one each text goes with.
            ids: int64[B, T], right-padded.
            wanted: how many positions to give, the first of them; all where None.
            watch: takes down who looked where.
        Returns:
            float[B, Q + T, D]: the queries first.
        Source: BLIP-2, section 3.2.
        """
        queries = self._start_queries(len(ids))
        x = lowered(torch.cat([queries, self._start_text(ids)], dim=1))  # (B, Q + T, D)
        real = torch.cat([self.real(ids).new_ones(queries.shape[:2]), self.real(ids)], dim=1)  # (B, Q + T)
        return self.through(x, queries.shape[1], real, sight, images, wanted, watch)

    def through(
        self,
        x: Tensor,
        queries: int,
        real: Tensor,
        sight: Sight | None = None,
        images: Tensor | None = None,
        wanted: int | None = None,
        watch: Watch | None = None,
    ) -> Tensor:
        """All layers, every position seeing every real one.

        Args:
            x: float[B, N, D], normed, of which the first `queries` positions are queries and the rest text.
            real: bool[B, N], False where a position is padding.
            sight, images, wanted, watch: as of `join`; no sight where nothing crosses to an image.
        Returns:
            float[B, N, D].
        """
        for layer, seen in self._layers_with(sight, images):
            key, value = layer.attention.keys_values(x)
            if layer is self.layers[-1]:
                x = x[:, :wanted]  # nobody sees the others any more
            x = layer(x, queries, key, value, real[:, None, None, :], seen, watch)
        return x

    def write(self, look: Look, ids: Tensor) -> Tensor:
        """Text sees all queries and the text before it (ITG): int64[B, T], right-padded, to float[B, T, D].

        The queries are not computed again: they never saw the text.
        """
        length = ids.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
        queries = causal.new_ones(length, look.hidden.shape[1])
        mask = torch.cat([queries, causal], dim=1)[None, None]  # (1, 1, T, Q + T); padding stands right of all text
        x = self._start_text(ids)
        for layer, past_key, past_value in zip(self._layers, look.keys, look.values, strict=True):
            key, value = layer.attention.keys_values(x)
            key, value = torch.cat([past_key, key], dim=2), torch.cat([past_value, value], dim=2)
            x = layer(x, 0, key, value, mask, None)
        return x

    def real(self, ids: Tensor) -> Tensor:
        """bool[B, T]: True where a token is no padding."""
        return ids != self.config.pad_id

    def mean(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """The mean over the tokens of each text: float[B, T, D] of int64[B, T] to float[B, D]."""
        real = self.real(ids)[..., None]  # (B, T, 1)
        return (hidden * real).sum(1) / real.sum(1)

    @property
    def _layers(self) -> list[Layer]:
        return cast("list[Layer]", self.layers)  # a ModuleList forgets the type of its modules

    def _layers_with(
        self, sight: Sight | None, images: Tensor | None = None
    ) -> Iterator[tuple[Layer, tuple[Tensor, Tensor] | None]]:
        """Each layer with what its cross-attention reads, None where it has none; one layer's copies at a time."""
        crossing = iter(()) if sight is None else zip(sight.keys, sight.values, strict=True)
        for layer in self._layers:
            seen = None if sight is None or layer.cross_attention is None else next(crossing)
            yield layer, seen if seen is None or images is None else (seen[0][images], seen[1][images])

    def _start_queries(self, rows: int) -> Tensor:
        return self.dropout(self.norm(self.query_tokens).expand(rows, -1, -1))  # (B, Q, D)

    def _start_text(self, ids: Tensor) -> Tensor:
        return self.dropout(lowered(self.norm(self.words(ids) + self.positions.weight[: ids.shape[1]])))  # (B, T, D)


class Layer(nn.Module):
    """Shared self-attention; cross-attention and a feed-forward for queries; another feed-forward for text."""

    def __init__(self, config: QFormerConfig, *, crosses: bool) -> None:
        super().__init__()
        self.attention = Attention(config, config.width)
        self.cross_attention = Attention(config, config.encoder_width) if crosses else None
        self.query_feed_forward = FeedForward(config)
        self.text_feed_forward = FeedForward(config) if config.text else None

    def forward(
        self,
        x: Tensor,
        queries: int,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        seen: tuple[Tensor, Tensor] | None,
        watch: Watch | None = None,
    ) -> Tensor:
        """One layer.

        Args:
            x: float[B, N, D], of which the first `queries` positions are queries and the rest text.
            key, value: float[B, A, M, D/A] of everything that may be seen.
            mask: bool, broadcastable to [B, A, N, M], None where all is seen.
            seen: keys and values float[B, A, P, D/A] of the image, None where no query crosses to it here; of fewer
                images, each is seen by as many rows in a row.
            watch: takes down where the rows looked; each has an image of its own then.
        """
        within, across = (None, None) if watch is None else (watch.within, watch.across)
        x = self.attention(x, key, value, mask, within)
        seeing, text = x[:, :queries], x[:, queries:]
        parts: list[Tensor] = []
        if queries:
            if self.cross_attention is not None and seen is not None:
                side_by_side = seeing.reshape(len(seen[0]), -1, seeing.shape[2])  # all that read one image
                seeing = self.cross_attention(side_by_side, *seen, None, across).reshape(seeing.shape)
            parts.append(self.query_feed_forward(seeing))
        if text.shape[1] and self.text_feed_forward is not None:
            parts.append(self.text_feed_forward(text))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


class Attention(nn.Module):
    """BERT's: projections, attention, output, then add and norm (post-LN)."""

    def __init__(self, config: QFormerConfig, source_width: int) -> None:
        super().__init__()
        self.heads = config.heads
        self.query = nn.Linear(config.width, config.width)
        self.key = nn.Linear(source_width, config.width)
        self.value = nn.Linear(source_width, config.width)
        self.out = nn.Linear(config.width, config.width)
        self.norm = nn.LayerNorm(config.width, config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def keys_values(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of what is looked at: float[B, M, source width] to two float[B, A, M, D/A]."""
        return split_heads(self.key(source), self.heads), split_heads(self.value(source), self.heads)

    def forward(
        self, x: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, kept: list[Tensor] | None = None
    ) -> Tensor:
        query = split_heads(self.query(x), self.heads)  # (B, A, N, D/A)
        seen = attend(query, key, value, mask, self.dropout.p if self.training else 0.0, kept=kept)  # (B, N, D)
        return self.norm(x + self.dropout(self.out(seen)))


class FeedForward(nn.Module):
    """BERT's: up, GELU, down, then add and norm (post-LN)."""

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.width, config.mlp_width)
        self.down = nn.Linear(config.mlp_width, config.width)
        self.norm = nn.LayerNorm(config.width, config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.dropout(self.down(gelu(self.up(x)))))


def _initialise(module: nn.Module) -> None:
    """BERT's initialisation; training starts from a pre-trained BERT where a recipe names one."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=INIT_STD)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
