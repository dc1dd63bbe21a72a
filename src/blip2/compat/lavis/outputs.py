"""What LAVIS's models give: values with names, which can also be taken by name or position."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor


class _Named:
    """`output.name`, `output["name"]` and `output[0]`; what is None has no position and is no key."""

    def keys(self) -> list[str]:
        """Names of what is there, in order."""
        assert dataclasses.is_dataclass(self)
        return [field.name for field in dataclasses.fields(self) if getattr(self, field.name) is not None]

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())

    def __getitem__(self, key: str | int | slice) -> Any:
        if isinstance(key, str):
            if key not in self.keys():
                raise KeyError(key)
            return getattr(self, key)
        return tuple(getattr(self, name) for name in self.keys())[key]


@dataclass(frozen=True)
class BlipOutputFeatures(_Named):
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
class BlipOutput(_Named):
    """Losses, float32 scalars: the sum, and each."""

    loss: Tensor | None = None
    loss_itc: Tensor | None = None
    loss_itm: Tensor | None = None
    loss_lm: Tensor | None = None
