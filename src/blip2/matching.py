"""Every image with every text (ITM): each is read once, and their pairs go through the matching head in blocks.

Letters: N images, M texts, T text positions, P patches, Q queries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blip2.calibration import Calibration
from blip2.config import QFormerConfig
from blip2.device import free_memory
from blip2.model.bridge import Bridge

CPU_BLOCK = 2**26  # bytes: what a block computes should stay near the processor's caches
SHARE = 4  # of a CUDA device's free memory, one part is a block's
FLOAT = 4  # bytes


def match_all(bridge: Bridge, patches: Tensor, ids: Tensor) -> Tensor:
    """Logits of (no match, match) of every image with every text, in blocks that fit into the memory there is.

    Args:
        patches: float[N, P, Dv] on any device.
        ids: int64[M, T], right-padded, on the bridge's.
    Returns:
        float32[N, M, 2].
    """
    images, texts = block(bridge.config.qformer, patches.shape[1], ids)
    blocks = (some.to(ids.device, bridge.dtype) for some in patches.split(images))
    return torch.cat([bridge.match_all(bridge.see(some), ids, texts) for some in blocks])


def probability(logits: Tensor, calibration: Calibration | None) -> Tensor:
    """float32[...] that pairs match, of their logits, float[..., 2]; the head's own word where nothing corrects it."""
    return logits.softmax(-1)[..., 1] if calibration is None else calibration.probability(logits)


def block(config: QFormerConfig, patches: int, ids: Tensor) -> tuple[int, int]:
    """How many images, and how many texts with each of them, go through the matching head together."""
    budget = CPU_BLOCK if ids.device.type == "cpu" else free_memory(ids.device) // SHARE
    crossing = -(-config.layers // config.cross_attention_every)
    image = FLOAT * patches * (config.encoder_width + 2 * crossing * config.width)  # with its keys and values
    count = config.queries + ids.shape[1]
    scores = config.heads * max(config.queries * patches, count * count)
    pair = FLOAT * (count * (2 * config.mlp_width + 6 * config.width) + scores)
    images = budget // (image + len(ids) * pair)
    return max(1, images), max(1, len(ids) if images else (budget - image) // pair)
