"""`torch.compile` for what sees images: the one place that knows what of a model is compiled.

The language model's steps are not: they are captured, see `generate`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from blip2.blip2 import Blip2


def compile_sight(model: Blip2, backend: str = "inductor") -> None:
    """Make the image encoder and the Q-Former compile at their first call; weights and names stay as they are.

    Args:
        backend: of `torch.compile`.
    """
    if isinstance(model.encoder, nn.Module):
        model.encoder.compile(backend=backend)
    bridge = model.bridge
    bridge.see = torch.compile(bridge.see, backend=backend)
    bridge.look = torch.compile(bridge.look, backend=backend)
    bridge.qformer.join = torch.compile(bridge.qformer.join, backend=backend)
