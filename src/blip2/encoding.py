"""Pictures to features: read, squeezed and sent to the device while the encoder is busy with those before them."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from os import PathLike
from typing import cast

import torch
from torch import Tensor

from blip2 import image
from blip2.batching import BatchSize, batches, in_order, sparing
from blip2.results import ImageFeatures


def encoded(
    features: Callable[[Tensor], ImageFeatures],
    transform: image.Transform,
    items: Sequence[image.Source],
    size: BatchSize,
) -> list[ImageFeatures]:
    """Features of images, batch after batch.

    Args:
        features: of uint8[N, S, S, 3], squares.
    Raises:
        ImageError: an image cannot be read; the message names it.
    """
    parts: list[ImageFeatures] = []

    def work(squares: Sequence[Tensor]) -> Sequence[None]:
        parts.append(features(torch.stack(list(squares))))
        return [None] * len(squares)

    with closing(_squares(transform, items, size)) as stream:
        for batch in batches(stream, size):
            sparing(work, batch, size)
    return parts


def _squares(transform: image.Transform, items: Sequence[image.Source], size: BatchSize) -> Generator[Tensor]:
    """Each image as uint8[S, S, 3]; several files are read ahead."""

    def read(item: image.Source) -> Tensor:
        return torch.from_numpy(transform.square(image.open(item)).copy())  # Pillow's own is only readable

    if transform.fits(items):
        yield from cast("Tensor", items)
    elif len(items) > 1 and all(isinstance(item, str | PathLike | bytes) for item in items):
        with closing(in_order(read, items, lambda: 2 * size.now)) as stream:
            yield from stream
    else:  # others may share what they are read from: threads would read it at once
        yield from map(read, items)
