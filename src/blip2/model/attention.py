"""Scaled dot-product attention: the one place that knows how it is computed.

Letters: B rows, N queries, M keys, A heads, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SHORT = 64  # keys up to which torch's fused backward is slower than matrix products on a CPU, in float32 too


def lowered(x: Tensor) -> Tensor:
    """In the type that autocast computes in, where it is on: cast once here, not by each product that reads it."""
    device = x.device.type
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)  # meta tensors have none
    return x.to(torch.get_autocast_dtype(device)) if on else x


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
    kept: list[Tensor] | None = None,
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
        kept: where given, the attention weights are added to it, float[B, A, N, M], as the result was made of them: a
            gradient goes through them.
    Returns:
        float[B, N, A * d].
    Source: Vaswani et al. 2017, equation 1.
    """
    slow = query.dtype != torch.float32 or key.shape[2] <= SHORT
    if kept is not None or (query.device.type == "cpu" and query.requires_grad and slow):
        return _spelt_out(query, key, value, mask, dropout, causal=causal, scale=scale, kept=kept)
    shared = query.shape[1] != key.shape[1]
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scale, enable_gqa=shared
    )
    return out.transpose(1, 2).flatten(2)  # (B, N, D)


def _spelt_out(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    *,
    causal: bool,
    scale: float | None,
    kept: list[Tensor] | None,
) -> Tensor:
    """The same as matrix products: on a CPU, with gradients and 16 bits, up to eight times as fast as torch's own."""
    heads, count, width = query.shape[1:]
    each = heads // key.shape[1]  # heads of the query that share one of the keys
    if causal:
        mask = torch.ones(count, key.shape[2], dtype=torch.bool, device=query.device).tril()
    query = (query * (width**-0.5 if scale is None else scale)).unflatten(1, (-1, each)).flatten(2, 3)
    scores = (query @ key.mT).unflatten(2, (each, count)).flatten(1, 2)  # (B, A, N, M)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    weights = F.dropout(scores.softmax(-1), dropout).to(value.dtype)  # (B, A, N, M)
    if kept is not None:
        kept.append(weights)
    out = weights.unflatten(1, (-1, each)).flatten(2, 3) @ value
    return out.unflatten(2, (each, count)).flatten(1, 2).transpose(1, 2).flatten(2)
