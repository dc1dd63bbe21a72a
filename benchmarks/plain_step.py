"""A training step as public code takes it, over the weights of our own bridge: `benchmarks.training` compares with it.

Three passes of the Q-Former a batch for ITC (pictures, texts), ITM (pairs, each with cross-attention keys of its own)
and ITG (queries once more, under the combined mask); every text padded to the longest that a recipe allows; softmax
over the whole vocabulary at every position; AdamW a parameter at a time.

Letters: B rows, Q queries, T text positions, N both, P patches, D width, A heads, E image-text space, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip2.model.bridge import Bridge
from blip2.model.qformer import Attention, Layer, QFormer
from blip2.protocols import LanguageModel
from blip2.train.objectives import Batch

Draw = Callable[[Tensor, Tensor, int], Tensor]
"""Similarities float[B, B], numbers of the pictures int64[B] and a seed to a wrong partner of each row, int64[B]."""


def stage1(
    bridge: Bridge, batch: Batch, length: int, seed: int, draw: Draw | None = None, smoothing: float = 0.1
) -> dict[str, Tensor]:
    """ITC, ITM and ITG of a batch of patches, as scalars.

    Args:
        length: that texts are padded to.
        draw: of ITM's wrong partners; by the softmax of the similarity where None.
    """
    assert bridge.heads is not None
    ids = F.pad(batch.ids, (0, length - batch.ids.shape[1]), value=bridge.config.qformer.pad_id)  # (B, T)
    patches = bridge.vision_norm(batch.images)
    real = (ids != bridge.config.qformer.pad_id).float()
    queries = bridge.qformer.query_tokens.expand(len(ids), -1, -1)
    seen = queries.new_ones(queries.shape[:2])

    # ITC
    image = encode(bridge.qformer, queries, None, seen, patches)
    text = encode(bridge.qformer, None, ids, real, None)
    if bridge.config.qformer.text_pooling == "cls":
        pooled = text[:, 0]
    else:
        pooled = (text * real[..., None]).sum(1) / real.sum(1, keepdim=True)
    image_vectors = F.normalize(bridge.heads.vision_proj(image), dim=-1).float()
    text_vectors = F.normalize(bridge.heads.text_proj(pooled), dim=-1).float()
    with torch.autocast("cpu", enabled=False):
        similar = torch.matmul(image_vectors.unsqueeze(1), text_vectors.unsqueeze(-1)).squeeze(-1)  # (B, B, Q)
    by_image = similar.amax(-1) / bridge.heads.temperature
    target = torch.arange(len(ids))
    itc = sum(F.cross_entropy(each, target, label_smoothing=smoothing) for each in (by_image, by_image.T)) / 2

    # ITM
    choose = draw or by_softmax
    wrong_texts = choose(by_image.detach(), batch.image_ids, seed)
    wrong_images = choose(by_image.detach().T, batch.image_ids, seed + 1)
    pair_ids = torch.cat([ids, ids, ids[wrong_texts]])
    pair_patches = torch.cat([patches, patches[wrong_images], patches])
    mask = torch.cat([seen.repeat(3, 1), (pair_ids != bridge.config.qformer.pad_id).float()], dim=1)
    joined = encode(bridge.qformer, queries.repeat(3, 1, 1), pair_ids, mask, pair_patches)
    logits = bridge.heads.itm_head(joined[:, : queries.shape[1]]).mean(1)
    itm = F.cross_entropy(logits.float(), torch.cat([torch.ones(len(ids)), torch.zeros(2 * len(ids))]).long())

    # ITG
    started = ids.clone()
    started[:, 0] = bridge.config.qformer.decoder_id
    written = encode(bridge.qformer, queries, started, combined(seen, real), patches)[:, queries.shape[1] :]
    assert bridge.heads.words is not None
    scores = F.linear(bridge.heads.words(written), bridge.qformer.words.weight, bridge.heads.words.bias)  # (B, T, V)
    labels = ids.masked_fill(ids == bridge.config.qformer.pad_id, -100)
    itg = F.cross_entropy(
        scores[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=smoothing, ignore_index=-100
    )
    return {"itc": cast("Tensor", itc), "itm": itm, "itg": itg}


def encode(
    qformer: QFormer, queries: Tensor | None, ids: Tensor | None, mask: Tensor, patches: Tensor | None
) -> Tensor:
    """Queries, text or both through all layers: float[B, N, D]; `mask` is float[B, N] or [B, N, N], 1 where seen."""
    parts = [] if queries is None else [queries]
    if ids is not None:
        parts.append(qformer.words(ids) + qformer.positions.weight[: ids.shape[1]])
    x = qformer.dropout(qformer.norm(torch.cat(parts, dim=1)))
    count = 0 if queries is None else queries.shape[1]
    bias = (1 - (mask[:, None, None] if mask.ndim == 2 else mask[:, None])) * torch.finfo(torch.float32).min
    for layer in cast("list[Layer]", qformer.layers):
        x = attention(layer.attention, x, x, bias)
        seeing, text = x[:, :count], x[:, count:]
        if count:
            if layer.cross_attention is not None and patches is not None:
                seeing = attention(layer.cross_attention, seeing, patches, None)
            seeing = layer.query_feed_forward(seeing)
        if text.shape[1]:
            assert layer.text_feed_forward is not None
            text = layer.text_feed_forward(text)
        x = torch.cat([seeing, text], dim=1)
    return x


def attention(part: Attention, x: Tensor, source: Tensor, bias: Tensor | None) -> Tensor:
    """BERT's, spelt out: scores, bias, softmax, dropout, values."""
    query, key, value = (
        linear(of).unflatten(-1, (part.heads, -1)).transpose(1, 2)
        for linear, of in ((part.query, x), (part.key, source), (part.value, source))
    )
    scores = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5  # (B, A, N, M)
    if bias is not None:
        scores = scores + bias
    weights = F.dropout(scores.softmax(-1), part.dropout.p, part.training)
    seen = (weights.to(value.dtype) @ value).transpose(1, 2).flatten(2)
    return part.norm(x + part.dropout(part.out(seen)))


def combined(queries: Tensor, text: Tensor) -> Tensor:
    """The mask of ITG, float[B, N, N]: queries see queries, text sees the queries and the text before it."""
    both = torch.cat([queries, text], dim=1)
    count, total = queries.shape[1], both.shape[1]
    mask = torch.ones(total, total).tril()
    mask[:count, :count] = 1
    return mask * both[:, None]


def by_softmax(similarity: Tensor, image_ids: Tensor, seed: int) -> Tensor:
    """Hard negatives a row at a time."""
    del seed
    odds = similarity.softmax(1).masked_fill(image_ids[:, None] == image_ids[None], 0) + 1e-4
    odds.fill_diagonal_(0)
    return torch.tensor([int(torch.multinomial(row, 1)) for row in odds])


def stage2(bridge: Bridge, language: LanguageModel, batch: Batch, length: int, bos: int) -> dict[str, Tensor]:
    """Language modelling: each text with its own picture, right-padded to `length`, softmax over all words."""
    images = batch.images[batch.owners]  # each text's, read for each
    queries = bridge.qformer.query_tokens.expand(len(images), -1, -1)
    hidden = encode(
        bridge.qformer, queries, None, queries.new_ones(queries.shape[:2]), bridge.vision_norm(images)
    )  # (R, Q, D)
    visual = bridge.project(hidden)
    targets = F.pad(batch.targets, (0, length - batch.targets.shape[1]), value=-100)
    start = language.embed(torch.full((len(images), 1), bos))
    prefix = torch.cat([visual.to(start.dtype), start], dim=1)
    lengths = torch.full((len(images),), prefix.shape[1])
    words = language.embed(targets[:, :-1].clamp(min=0))
    embeds = torch.cat([prefix, words], dim=1)
    states = language.read(embeds, lengths + words.shape[1])[0][:, prefix.shape[1] - 1 :]  # pyright: ignore
    scores = language.logits(states)  # pyright: ignore
    return {"lm": F.cross_entropy(scores.float().flatten(0, 1), targets.flatten(), ignore_index=-100)}


def optimizer(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    """AdamW as most code calls it."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=rate, foreach=False, fused=False)
