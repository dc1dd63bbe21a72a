"""OPT, as BLIP-2 uses it (2.7b and 6.7b): learned positions, norms before, ReLU, tied head.

Letters: B rows, T positions, D width, H heads, d width of a head. Source: Zhang et al. 2022.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from blip2.config import OPTConfig
from blip2.model.attention import split_heads
from blip2.model.decoder import Attend, Decoder

POSITION_OFFSET = 2  # the first two rows of the position embeddings are never used


class OPT(Decoder):
    """The language model; `protocols.LanguageModel`."""

    def __init__(self, config: OPTConfig) -> None:
        super().__init__(config.width, config.vocab_size, config.context)
        self.config = config
        self.positions = nn.Embedding(config.context + POSITION_OFFSET, config.width)
        self.layers = nn.ModuleList(Layer(config, number) for number in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.requires_grad_(False).eval()

    def hidden(self, x: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        x = x + self.positions(positions + POSITION_OFFSET)  # (B, T, D)
        for layer in self.layers:
            x = layer(x, attend)
        return self.norm(x)


class Layer(nn.Module):
    """Attention and feed-forward, each after a norm and added."""

    def __init__(self, config: OPTConfig, number: int) -> None:
        super().__init__()
        self.number = number
        self.heads = config.heads
        self.scale = (config.width // config.heads) ** -0.5
        self.attention_norm = nn.LayerNorm(config.width)
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)
        self.mlp_norm = nn.LayerNorm(config.width)
        self.up = nn.Linear(config.width, config.mlp_width)
        self.down = nn.Linear(config.mlp_width, config.width)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        query, key, value = (split_heads(part, self.heads) for part in self.qkv(self.attention_norm(x)).chunk(3, -1))
        x = x + self.out(attend(self.number, query, key, value, self.scale))  # (B, T, D)
        return x + self.down(F.relu(self.up(self.mlp_norm(x))))
