"""Gemma 3, text only: RMSNorm around every block, rotary positions, one wide window in several narrow ones.

Letters: B rows, T positions, D width, H heads, A heads of keys and values, d width of a head.
Source: Gemma Team 2025, sections 2 and 2.1.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip2.config import GemmaConfig
from blip2.model.attention import split_heads
from blip2.model.decoder import Attend, Decoder

Rotation = tuple[Tensor, Tensor]
"""Cosine and sine of each position's angles: float[B, 1, T, d]."""


class Gemma(Decoder):
    """The language model; `protocols.LanguageModel`."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__(config.width, config.vocab_size, config.context)
        self.config = config
        self.layers = nn.ModuleList(Layer(config, number) for number in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.requires_grad_(False).eval()

    def embed(self, ids: Tensor) -> Tensor:
        """Token embeddings, times the root of the width as the first layer takes them: int64[...] to float[..., D]."""
        return self.words(ids) * rounded(self.config.width**0.5, self.words.weight.dtype)

    def hidden(self, x: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        thetas = self.config.local_theta, self.config.global_theta
        near, far = (rotation(positions, self.config.head_width, theta, x.dtype) for theta in thetas)
        for number, layer in enumerate(self.layers):
            x = layer(x, far if sees_all(self.config, number) else near, attend)
        return self.norm(x)


class Layer(nn.Module):
    """Attention and gated feed-forward, each between two norms and added."""

    def __init__(self, config: GemmaConfig, number: int) -> None:
        super().__init__()
        self.number = number
        self.window = None if sees_all(config, number) else config.window
        self.scale = config.query_scale**-0.5
        self.heads, self.key_heads, self.head_width = config.heads, config.key_heads, config.head_width
        inner, keys = config.heads * config.head_width, config.key_heads * config.head_width
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.qkv = nn.Linear(config.width, inner + 2 * keys, bias=False)
        self.query_norm = RMSNorm(config.head_width, config.norm_eps)
        self.key_norm = RMSNorm(config.head_width, config.norm_eps)
        self.out = nn.Linear(inner, config.width, bias=False)
        self.attention_end_norm = RMSNorm(config.width, config.norm_eps)
        self.mlp_norm = RMSNorm(config.width, config.norm_eps)
        self.gate_up = nn.Linear(config.width, 2 * config.mlp_width, bias=False)
        self.down = nn.Linear(config.mlp_width, config.width, bias=False)
        self.mlp_end_norm = RMSNorm(config.width, config.norm_eps)

    def forward(self, x: Tensor, turn: Rotation, attend: Attend) -> Tensor:
        keys = self.key_heads * self.head_width
        query, key, value = self.qkv(self.attention_norm(x)).split([self.heads * self.head_width, keys, keys], -1)
        query = rotate(self.query_norm(split_heads(query, self.heads)), turn)  # (B, H, T, d)
        key = rotate(self.key_norm(split_heads(key, self.key_heads)), turn)  # (B, A, T, d)
        seen = attend(self.number, query, key, split_heads(value, self.key_heads), self.scale, self.window)
        x = x + self.attention_end_norm(self.out(seen))  # (B, T, D)
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, -1)
        return x + self.mlp_end_norm(self.down(F.gelu(gate, approximate="tanh") * up))


def sees_all(config: GemmaConfig, number: int) -> bool:
    """Whether a layer, counted from 0, sees all positions; the others see a window."""
    return (number + 1) % config.global_every == 0


@cache
def rounded(value: float, dtype: torch.dtype) -> float:
    """A number as a type holds it: the weights'."""
    return torch.tensor(value, dtype=dtype).item()


class RMSNorm(nn.Module):
    """x / rms(x) * (1 + weight), computed in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (F.rms_norm(wide, (x.shape[-1],), eps=self.eps) * (1.0 + self.weight.float())).to(x.dtype)


def rotation(positions: Tensor, width: int, theta: float, dtype: torch.dtype) -> Rotation:
    """Angles of positions, int64[B, T]: pairs of a head's halves turn by position / theta^(2i / d).

    Source: Su et al. 2021, section 3.2.2.
    """
    powers = torch.arange(0, width, 2, dtype=torch.float32, device=positions.device) / width
    angles = positions[:, None, :, None].float() / theta**powers  # (B, 1, T, d / 2)
    both = torch.cat([angles, angles], dim=-1)
    return both.cos().to(dtype), both.sin().to(dtype)


def rotate(x: Tensor, turn: Rotation) -> Tensor:
    """float[B, H, T, d], its halves turned as pairs."""
    first, second = x.chunk(2, -1)
    return x * turn[0] + torch.cat([-second, first], dim=-1) * turn[1]
