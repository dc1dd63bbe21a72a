"""What LAVIS's models give: as in transformers, taken by attribute, by name or by position."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from blip2.compat.transformers.outputs import ModelOutput


@dataclass(frozen=True)
class BlipOutputFeatures(ModelOutput):
    """Features of images, texts or both. Letters: B rows, Q queries, T tokens, D width, E image-text space.

    Attributes:
        image_embeds: float32[B, Q, D], the queries.
        image_embeds_proj: float32[B, Q, E], unit length.
        text_embeds: float32[B, T, D], every token; the first is [CLS].
        text_embeds_proj: float32[B, T, E], unit length; only the first token's was trained to meet an image's.
        multimodal_embeds: float32[B, Q, D], the queries beside the text.
    """

    image_embeds: Tensor | None = None
    image_embeds_proj: Tensor | None = None
    text_embeds: Tensor | None = None
    text_embeds_proj: Tensor | None = None
    multimodal_embeds: Tensor | None = None


@dataclass(frozen=True)
class BlipOutput(ModelOutput):
    """Losses, float32 scalars: the sum, and each."""

    loss: Tensor | None = None
    loss_itc: Tensor | None = None
    loss_itm: Tensor | None = None
    loss_lm: Tensor | None = None
