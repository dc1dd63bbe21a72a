"""Images of a list, read and squeezed by threads to what an encoder takes, while the model is busy with others."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from blip2 import image
from blip2.batching import WORKERS, BatchSize, batches, in_order, sparing
from blip2.bulk.sinks import Failure
from blip2.errors import ImageError, MissingExtraError

Square: TypeAlias = tuple[Path, npt.NDArray[np.uint8]]
"""An image's path, and uint8[S, S, 3] as `image.Transform.square` gives it."""


def each(
    verb: Callable[[Tensor], Iterable[Any]], paths: Iterable[Path], transform: image.Transform, size: BatchSize
) -> Generator[list[tuple[Path, Any]]]:
    """What a verb gives for each image, batch by batch, in order; `Failure` for an image that cannot be read.

    Args:
        verb: of uint8[N, S, S, 3], squares, which the verbs of `Blip2` take as N images.
        transform: of the model that the verb is of.
    """

    def work(batch: Sequence[Square]) -> list[Any]:
        try:
            return list(verb(torch.from_numpy(np.stack([square for _, square in batch]))))
        except ImageError as error:  # an image that the model refuses fails alone
            if len(batch) == 1:
                return [Failure(batch[0][0], str(error))]
            return [found for item in batch for found in work([item])]

    with closing(opened(paths, transform, ahead=lambda: size.ahead)) as stream:
        for batch in batches(stream, size):
            squares = [item for item in batch if not isinstance(item, Failure)]
            found = iter(sparing(work, squares, size))
            yield [(item.image, item) if isinstance(item, Failure) else (item[0], next(found)) for item in batch]


def opened(
    paths: Iterable[Path], transform: image.Transform, *, ahead: Callable[[], int], workers: int = WORKERS
) -> Generator[Square | Failure]:
    """Images in order, read by threads. However large the pictures are, little is held: squares of the encoder's size.

    Args:
        ahead: how many to hold ready at most, asked each time.
    """

    def read(path: Path) -> Square | Failure:
        try:
            return path, transform.square(image.open(path))
        except (ImageError, MissingExtraError) as error:
            return Failure(path, str(error))

    return in_order(read, paths, ahead, workers)
