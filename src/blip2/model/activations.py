"""Activations; where no gradient is asked for, in the place of what they are given, which is read no more."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def gelu(x: Tensor) -> Tensor:
    """x Φ(x), in the place of x without a gradient: memory of that size costs a CPU as much as the product before."""
    return F.gelu(x) if torch.is_grad_enabled() else torch.ops.aten.gelu_(x)


def quick_gelu(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x), the approximation that CLIP was trained with."""
    return x * torch.sigmoid(1.702 * x)
