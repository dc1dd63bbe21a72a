"""Scaled dot-product attention: the one place that knows how it is computed.

Letters: B rows, N queries, M keys, A heads, D width.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, N, D) to (B, A, N, D/A)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    *,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """softmax(q kᵀ · scale) v, heads joined again.

    Args:
        query: float[B, A, N, d].
        key, value: float[B, A, M, d], or with fewer heads, each for as many neighbouring ones of the query.
        mask: broadcastable to [B, A, N, M]: bool, True where the query may look; or float, added to the scores. Each
            query must see something.
        dropout: probability on the attention weights.
        causal: each query sees the keys up to its own position; instead of a mask.
        scale: 1 / √d where None.
    Returns:
        float[B, N, A * d].
    Source: Vaswani et al. 2017, equation 1.
    """
    shared = query.shape[1] != key.shape[1]
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scale, enable_gqa=shared
    )
    return out.transpose(1, 2).flatten(2)  # (B, N, D)
