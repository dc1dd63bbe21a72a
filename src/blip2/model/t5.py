"""T5 1.1 and Flan-T5: an encoder that reads the prefix, a decoder that writes; relative positions, RMSNorm, gated GELU.

Letters: B rows, P prompts, S prefix positions, T target positions, t positions so far, D width, H heads, d their width.
Source: Raffel et al. 2020; Shazeer 2020 (the gate); Chung et al. 2022 (Flan).
"""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip2.config import T5Config
from blip2.model.attention import attend, split_heads
from blip2.model.cache import Cache
from blip2.model.language import Language
from blip2.model.scoring import by_length, check_prefix, chosen_log_probs, first_of_each

HALF_END = torch.finfo(torch.float16).max - 1000
SCALE = 1.0  # of the scores: the initialisation took care of it


class T5(Language):
    """The language model; satisfies `protocols.LanguageModel`."""

    encoder_decoder = True

    def __init__(self, config: T5Config) -> None:
        super().__init__(config.width, config.vocab_size, config.context, tied=config.tied)
        self.config = config
        self.encoder = nn.ModuleList(EncoderLayer(config) for _ in range(config.layers))
        self.encoder_positions = RelativePositions(config, both_ways=True)
        self.encoder_norm = RMSNorm(config)
        self.decoder = nn.ModuleList(DecoderLayer(config, number) for number in range(config.layers))
        self.decoder_positions = RelativePositions(config, both_ways=False)
        self.decoder_norm = RMSNorm(config)
        self.requires_grad_(False).eval()

    def half_safe(self) -> T5:
        """With float32 weights where float16 would overflow; for a model in float16."""
        for layer in [*self.encoder, *self.decoder]:
            cast("EncoderLayer | DecoderLayer", layer).mlp.down.float()
        return self

    @property
    def start_id(self) -> int:
        """The token that every text begins from."""
        return self.config.start_id

    def prefill(self, prefix: Tensor, lengths: Tensor, vocabulary: Tensor | None = None) -> tuple[Tensor, Cache]:
        """Encode the prefix once; see `protocols.LanguageModel`.

        Raises:
            PromptError: a row is empty.
        """
        cache = self.read(prefix, lengths)
        return self.step(self._starts(prefix), cache, vocabulary), cache

    def step(self, ids: Tensor, cache: Cache, vocabulary: Tensor | None = None) -> Tensor:
        """Read one more token a row, int64[B]; float32[B, V or K], logits of the next."""
        return self.logits(self.write(ids[:, None], cache)[:, 0], vocabulary)

    def log_probs(
        self,
        prefix: Tensor,
        lengths: Tensor,
        targets: Tensor,
        vocabulary: Tensor | None = None,
        alike: tuple[Tensor, int] | None = None,
    ) -> Tensor:
        """Log-probability of each target, with gradient to `prefix`; see `protocols.LanguageModel`.

        Raises:
            PromptError: a row of the prefix is empty.
            ConfigError: a target is not in the vocabulary.
        """
        which = torch.arange(len(prefix), device=prefix.device)
        if alike is not None and bool((lengths == alike[1]).all()):  # an encoder's output hangs on the whole prefix
            first, which = first_of_each(alike[0])
            prefix, lengths = prefix[first], lengths[first]
        cache = self.read(prefix, lengths)
        words = torch.cat([self._starts(targets)[:, None], targets[:, :-1].clamp(min=0)], dim=1)  # (B, T)
        counts = (targets >= 0).sum(1).clamp(min=1)
        hidden = by_length(counts, lambda rows, end: self.write(words[rows, :end], cache.select(which[rows])))
        hidden = F.pad(hidden, (0, 0, 0, words.shape[1] - hidden.shape[1]))
        return chosen_log_probs(hidden, targets, vocabulary, self.vocab_size, lambda x: self.logits(x, vocabulary))

    def read(self, prefix: Tensor, lengths: Tensor) -> Cache:
        """The encoder, and what the decoder's layers will see of its output; arguments as `encode`."""
        return self.remember(self.encode(prefix, lengths), lengths)

    def remember(self, encoded: Tensor, lengths: Tensor) -> Cache:
        """What the decoder's layers will see of an encoder's output, float[P, S, D]."""
        cache = Cache(lengths)
        for layer in cast("list[DecoderLayer]", self.decoder):
            cache.keep(*layer.keys_values(encoded))
        return cache

    def encode(self, prefix: Tensor, lengths: Tensor) -> Tensor:
        """The encoder's output, float[P, S, D].

        Args:
            prefix: float[P, S, D], right-padded.
            lengths: int64[P].
        Raises:
            PromptError: a row is empty.
        """
        check_prefix(lengths)
        size = prefix.shape[1]
        real = torch.arange(size, device=prefix.device) < lengths[:, None]  # (P, S)
        place = torch.arange(size, device=prefix.device)
        bias = self.encoder_positions(place - place[:, None])[None]  # (1, H, S, S)
        bias = bias.masked_fill(~real[:, None, None], float("-inf"))  # (P, H, S, S)
        x = prefix.to(self.words.weight.dtype)
        for layer in self.encoder:
            x = layer(x, bias)
        return self.encoder_norm(x)

    def write(self, ids: Tensor, cache: Cache) -> Tensor:
        """The decoder on new tokens, int64[B, T]: float[B, T, D], what each next token is predicted from."""
        count = ids.shape[1]
        bias = self.decoder_positions(-cache.back(count))[None]  # (1, H, T, t)
        unborn = cache.unborn(count)
        if unborn is not None:
            bias = bias.masked_fill(unborn[:, None, None], float("-inf"))
        x = self.embed(ids)
        for layer in self.decoder:
            x = layer(x, bias, cache)
        cache.advance(count)
        return self.decoder_norm(x) * (self.width**-0.5 if self.config.scaled else 1.0)

    def _starts(self, rows: Tensor) -> Tensor:
        return torch.full((len(rows),), self.config.start_id, device=rows.device)


class EncoderLayer(nn.Module):
    """Self-attention and gated feed-forward, each after a norm and added."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        inner = config.heads * config.head_width
        self.heads = config.heads
        self.attention_norm = RMSNorm(config)
        self.qkv = nn.Linear(config.width, 3 * inner, bias=False)
        self.out = nn.Linear(inner, config.width, bias=False)
        self.mlp = FeedForward(config)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        query, key, value = (split_heads(part, self.heads) for part in self.qkv(self.attention_norm(x)).chunk(3, -1))
        return self.mlp(x + self.out(attend(query, key, value, bias, scale=SCALE)))


class DecoderLayer(nn.Module):
    """Self-attention, attention to the encoder's output, gated feed-forward, each after a norm and added."""

    def __init__(self, config: T5Config, number: int) -> None:
        super().__init__()
        inner = config.heads * config.head_width
        self.number = number
        self.heads = config.heads
        self.attention_norm = RMSNorm(config)
        self.qkv = nn.Linear(config.width, 3 * inner, bias=False)
        self.out = nn.Linear(inner, config.width, bias=False)
        self.cross_norm = RMSNorm(config)
        self.cross_query = nn.Linear(config.width, inner, bias=False)
        self.cross_key_value = nn.Linear(config.width, 2 * inner, bias=False)
        self.cross_out = nn.Linear(inner, config.width, bias=False)
        self.mlp = FeedForward(config)

    def keys_values(self, encoded: Tensor) -> tuple[Tensor, Tensor]:
        """What this layer sees of the encoder's output: float[P, S, D] to two float[P, H, S, d]."""
        key, value = (split_heads(part, self.heads) for part in self.cross_key_value(encoded).chunk(2, -1))
        return key, value

    def forward(self, x: Tensor, bias: Tensor, cache: Cache) -> Tensor:
        query, key, value = (split_heads(part, self.heads) for part in self.qkv(self.attention_norm(x)).chunk(3, -1))
        x = x + self.out(cache.self_attend(self.number, query, key, value, SCALE, bias))  # (B, T, D)
        query = split_heads(self.cross_query(self.cross_norm(x)), self.heads)
        return self.mlp(x + self.cross_out(cache.cross(self.number, query, SCALE)))


class FeedForward(nn.Module):
    """x + down(gelu(gate) * up), after a norm.

    In float16 T5's activations pass what the type can hold: gate, product and `down`, whose weights stay in float32
    (see `half_safe`), are then computed in float32, and the sum is cut at the type's end, as in transformers.
    """

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.approximate = "tanh" if config.activation == "gelu_tanh" else "none"
        self.norm = RMSNorm(config)
        self.gate_up = nn.Linear(config.width, 2 * config.mlp_width, bias=False)
        self.down = nn.Linear(config.mlp_width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(self.norm(x)).chunk(2, -1)
        half = x.dtype == torch.float16
        if half:
            x, gate, up = x.float(), gate.float(), up.float()
        x = x + self.down(F.gelu(gate, approximate=self.approximate) * up)
        return x.clamp(-HALF_END, HALF_END).half() if half else x


class RelativePositions(nn.Module):
    """What each head adds to a score by how far key and query are apart, in buckets that widen with the distance."""

    def __init__(self, config: T5Config, *, both_ways: bool) -> None:
        super().__init__()
        self.both_ways = both_ways
        self.buckets, self.max_distance = config.buckets, config.max_distance
        self.bias = nn.Embedding(config.buckets, config.heads)

    def forward(self, ahead: Tensor) -> Tensor:
        """Of how far each key is ahead of each query, int64[T, t]: float[H, T, t]; -inf ahead, unless both ways."""
        ahead = ahead.to(self.bias.weight.device)
        bias = self.bias(self._bucket(ahead)).permute(2, 0, 1)
        return bias if self.both_ways else bias.masked_fill(ahead > 0, float("-inf"))

    def _bucket(self, ahead: Tensor) -> Tensor:
        """A bucket for each distance: half of them for single steps, the others logarithmic up to `max_distance`."""
        buckets = self.buckets // 2 if self.both_ways else self.buckets
        first = (ahead > 0) * buckets if self.both_ways else torch.zeros_like(ahead)
        distance = ahead.abs() if self.both_ways else (-ahead).clamp(min=0)
        exact = buckets // 2
        share = torch.log(distance.clamp(min=1).float() / exact) / math.log(self.max_distance / exact)
        far = (exact + share * (buckets - exact)).long().clamp(max=buckets - 1)
        return first + torch.where(distance < exact, distance, far)


class RMSNorm(nn.Module):
    """weight * x / rms(x); the root in float32."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.weight = nn.Parameter(torch.ones(config.width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * F.rms_norm(x.float(), (x.shape[-1],), eps=self.eps).to(x.dtype)
