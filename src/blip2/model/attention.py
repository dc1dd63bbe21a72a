"""Scaled dot-product attention: the one place that knows how it is computed.

Letters: B rows, N queries, M keys, A heads, D width.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, N, D) to (B, A, N, D/A)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """softmax(q kᵀ / √d) v, heads joined again.

    Args:
        query: float[B, A, N, d].
        key, value: float[B, A, M, d].
        mask: bool, broadcastable to [B, A, N, M]; True where the query may look. Each query must see something.
        dropout: probability on the attention weights.
    Returns:
        float[B, N, A * d].
    Source: Vaswani et al. 2017, equation 1.
    """
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
    return out.transpose(1, 2).flatten(2)  # (B, N, D)
