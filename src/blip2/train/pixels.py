"""Pictures opened when they are needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from blip2 import image
from blip2.data.sources import ImageRef, Prototype, Sample
from blip2.errors import DataError, ImageError
from blip2.train.draws import draw_seed


class Pixels:
    """Pictures opened when they are needed, for training with an encoder that sees each one anew.

    Args:
        transform: RGB pictures to float[B, 3, H, W], such as `image.Transform`.
        augment: a picture and a seed to float[3, H, W], such as `image.RandomView`; for views from 1 on.
    Raises:
        DataError: a sample has no picture (a class prototype).
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        transform: Callable[[Sequence[Any]], Tensor],
        augment: Callable[[Any, int], Tensor] | None = None,
    ) -> None:
        self.refs: list[ImageRef] = []
        for sample in samples:
            if isinstance(sample.image, Prototype):
                raise DataError(f"{sample.id!r} is a class prototype, without a picture: it needs cached features")
            self.refs.append(sample.image)
        self.ids = [sample.id for sample in samples]
        self.transform = transform
        self.augment = augment

    def __call__(self, rows: Sequence[int], views: Sequence[int]) -> Tensor:
        """float[B, 3, H, W]."""
        return torch.stack([self.view(row, view) for row, view in zip(rows, views, strict=True)])

    def view(self, row: int, view: int) -> Tensor:
        """One view of a picture, float[3, H, W].

        Raises:
            DataError: the picture cannot be opened.
        """
        try:
            picture = image.open(self.refs[row].read())
        except ImageError as error:
            raise DataError(f"{self.refs[row]} (sample {self.ids[row]!r}): {error}") from None
        if view == 0:
            return self.transform([picture])[0]
        if self.augment is None:
            raise DataError(f"view {view} is asked for, but no augmentation is given")
        return self.augment(picture, draw_seed("view", self.ids[row], view))
