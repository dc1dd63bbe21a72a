"""The small heads on the Q-Former. Letters: B rows, Q queries, T text positions, D width."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip2.config import Blip2Config

TEMPERATURE = 0.07  # where the contrastive temperature starts: CLIP's, ALBEF's and BLIP-2's


class WordHead(nn.Module):
    """BERT's masked-language head but for its output weights, which are the word embeddings themselves (ITG)."""

    def __init__(self, width: int, vocab_size: int, norm_eps: float) -> None:
        super().__init__()
        self.transform = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, norm_eps)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, hidden: Tensor) -> Tensor:
        """float[..., D] to float[..., D], ready for the product with the word embeddings."""
        return self.norm(F.gelu(self.transform(hidden)))


class StageOneHeads(nn.Module):
    """What stage 1 needs beside the Q-Former: ITC projections and temperature, ITM head, ITG word head."""

    def __init__(self, config: Blip2Config) -> None:
        super().__init__()
        width = config.qformer.width
        self.vision_proj = nn.Linear(width, config.embedding_width)
        self.text_proj = nn.Linear(width, config.embedding_width)
        self.itm_head = nn.Linear(width, 2)
        self.temperature = nn.Parameter(torch.tensor(TEMPERATURE))
        words = WordHead(width, config.qformer.vocab_size, config.qformer.norm_eps) if config.word_head else None
        self.words = words
