"""Any image encoder of transformers behind `protocols.ImageEncoder`: CLIP, SigLIP, DINOv2, ViT, ConvNeXt, ...

Letters: B images, P patches, D width, S side of the input in pixels, H W of a map.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor, nn

from blip2.errors import ConfigError, ImageError
from blip2.protocols import Places


class TransformersVision(nn.Module):
    """A frozen image encoder of transformers; satisfies `protocols.ImageEncoder` and `protocols.Placed`.

    What a bridge sees is the last hidden state: every patch, a class token and registers where the encoder has such.

    Args:
        model: takes `pixel_values` and gives `last_hidden_state`, such as `Dinov2Model`; of a model that reads texts
            too, such as `CLIPModel`, its `vision_model` alone is kept. Its parameters are frozen and it stays in
            evaluation mode.
        image_size: side of the square that pictures are squeezed to.
        mean, std: of each channel on 0..1.
    Raises:
        ConfigError: the model does not take pictures, or none of this size.
    """

    def __init__(
        self, model: Any, image_size: int, mean: tuple[float, float, float], std: tuple[float, float, float]
    ) -> None:
        super().__init__()
        tower = image_side(model)
        if "pixel_values" not in inspect.signature(tower.forward).parameters:
            raise ConfigError(f"{type(model).__name__} is no image encoder: it takes no pixel_values")
        self.tower = tower.requires_grad_(False)
        self.image_size, self.mean, self.std = image_size, mean, std
        self.train(False)
        weight = next(tower.parameters())
        try:
            with torch.inference_mode():
                patches = self(torch.zeros(1, 3, image_size, image_size, dtype=weight.dtype, device=weight.device))
        except (RuntimeError, ValueError) as error:
            raise ConfigError(
                f"{type(tower).__name__} does not take {image_size} x {image_size} pixels: {error}"
            ) from None
        self.tokens, self.width = (int(size) for size in patches.shape[1:])

    def train(self, mode: bool = True) -> TransformersVision:  # noqa: ARG002
        """Stays in evaluation mode: the part is frozen."""
        return super().train(False)

    def forward(self, pixels: Tensor) -> Tensor:
        """The last hidden state.

        Args:
            pixels: float[B, 3, S, S], normalised.
        Returns:
            float[B, P, D]; a map float[B, D, H, W] row by row.
        Raises:
            ImageError: the pixels have another shape.
        """
        if pixels.shape[1:] != (3, self.image_size, self.image_size):
            size = self.image_size
            raise ImageError(
                f"this encoder takes pixels of (B, 3, {size}, {size}), not {tuple(pixels.shape)}; "
                "use blip2.image.Transform"
            )
        hidden: Tensor = self.tower(pixel_values=pixels).last_hidden_state
        return hidden if hidden.ndim == 3 else hidden.flatten(2).transpose(1, 2)

    def places(self, patches: Tensor) -> Places:
        """The patches are the largest square that there is, and stand after what lies on no grid."""
        count = len(patches)
        patch = getattr(self.tower.config, "patch_size", None)
        side = self.image_size // patch if isinstance(patch, int) else math.isqrt(count)
        if side**2 > count:  # patches were merged since, as in Swin
            side = math.isqrt(count)
        first = count - side**2
        return Places(side, side, first, tuple(f"token {number + 1}" for number in range(first)))


def image_side(model: Any) -> Any:
    """The part of a model that sees."""
    return getattr(model, "vision_model", model)
