"""The Vision Transformers of the published models: EVA-CLIP ViT-g/14 and CLIP ViT-L/14, by configuration.

Letters: B images, P patches and class token, D width, A heads, p patch side.
"""

from __future__ import annotations

import copy
import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from blip2.config import VisionConfig
from blip2.errors import ImageError
from blip2.model.activations import gelu, quick_gelu
from blip2.model.attention import attend, split_heads
from blip2.protocols import Places


class VisionTransformer(nn.Module):
    """A ViT without head and final norm: BLIP-2 reads its last kept block (`ln_vision` is the bridge's).

    Attributes:
        recompute: where gradients are asked for, blocks are computed once more instead of kept (checkpointing).
    """

    recompute = False

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        width, side = config.width, config.patch_size
        self.patch_embedding = nn.Conv2d(3, width, side, side, bias=config.patch_bias)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, config.tokens, width))
        self.pre_norm = nn.LayerNorm(width, config.norm_eps) if config.pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        nn.init.normal_(self.class_token, std=0.02)
        nn.init.normal_(self.positions, std=0.02)

    @property
    def width(self) -> int:
        return self.config.width

    @property
    def image_size(self) -> int:
        return self.config.image_size

    @property
    def mean(self) -> tuple[float, float, float]:
        return self.config.mean

    @property
    def std(self) -> tuple[float, float, float]:
        return self.config.std

    def places(self, patches: Tensor) -> Places:  # noqa: ARG002
        """A grid after the class token; see `protocols.Placed`."""
        side = self.config.image_size // self.config.patch_size
        return Places(side, side, 1, ("class token",))

    def forward(self, pixels: Tensor, *, resized: bool = False) -> Tensor:
        """Patch features.

        Args:
            pixels: float[B, 3, H, W], normalised; H and W are the configured image size.
            resized: take any H and W, and interpolate the position embeddings to them.
        Returns:
            float[B, P, D]: the class token first.
        Raises:
            ImageError: another size than the position embeddings were made for, or smaller than a patch.
        Source: Dosovitskiy et al. 2021, equations 1 to 3; BLIP-2, section 3.1.
        """
        size = self.config.image_size
        if pixels.shape[-2:] != (size, size) and not (resized and min(pixels.shape[-2:]) >= self.config.patch_size):
            raise ImageError(f"the image encoder takes {size} x {size} pixels, not {tuple(pixels.shape[-2:])}")
        patches = self.patch_embedding(pixels)  # (B, D, h, w)
        positions = self._positions(patches.shape[-2], patches.shape[-1])
        patches = patches.flatten(2).transpose(1, 2)  # (B, P - 1, D)
        x = torch.cat([self.class_token.expand(len(patches), -1, -1), patches], dim=1) + positions  # (B, P, D)
        x = self.pre_norm(x)
        recompute = self.recompute and torch.is_grad_enabled()
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False) if recompute else block(x)
        return x

    def resized(self, image_size: int) -> VisionTransformer:
        """A copy for pictures of another size: its position embeddings interpolated, everything else the same.

        Raises:
            ImageError: no multiple of the patch.
        """
        side, rest = divmod(image_size, self.config.patch_size)
        if rest or side < 1:
            raise ImageError(f"image_size: {image_size} is no multiple of the patch, {self.config.patch_size}")
        made = copy.deepcopy(self)
        made.config = dataclasses.replace(self.config, image_size=image_size)
        with torch.no_grad():
            made.positions = nn.Parameter(self._positions(side, side).clone(), self.positions.requires_grad)
        return made

    def _positions(self, height: int, width: int) -> Tensor:
        """Position embeddings of the class token and so many patches: float[1, P, D]; interpolated where need be."""
        side = self.config.image_size // self.config.patch_size
        if (height, width) == (side, side):
            return self.positions
        first, grid = self.positions[:, :1], self.positions[:, 1:].unflatten(1, (side, side))  # (1, side, side, D)
        grid = F.interpolate(grid.permute(0, 3, 1, 2), (height, width), mode="bicubic", align_corners=False)
        return torch.cat([first, grid.flatten(2).transpose(1, 2)], dim=1)


class Block(nn.Module):
    """Attention and feed-forward, each after its norm (pre-LN)."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, config.norm_eps)
        self.attention = Attention(config)
        self.norm2 = nn.LayerNorm(config.width, config.norm_eps)
        self.up = nn.Linear(config.width, config.mlp_width)
        self.down = nn.Linear(config.mlp_width, config.width)
        self.activation = gelu if config.activation == "gelu" else quick_gelu

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))  # (B, P, D)
        return x + self.down(self.activation(self.up(self.norm2(x))))


class Attention(nn.Module):
    """Self-attention with one fused projection; EVA's has a bias for query and value only."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.qkv = nn.Linear(width, 3 * width, bias=config.key_bias)
        if not config.key_bias:
            self.query_bias = nn.Parameter(torch.zeros(width))
            self.value_bias = nn.Parameter(torch.zeros(width))
        self.key_bias = config.key_bias
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).chunk(3, dim=-1)  # each (B, P, D)
        if not self.key_bias:
            query, value = query + self.query_bias, value + self.value_bias
        query, key, value = (split_heads(part, self.heads) for part in (query, key, value))  # each (B, A, P, D/A)
        return self.out(attend(query, key, value))
