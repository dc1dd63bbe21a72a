"""Queries that look where a question asks, of models whose Q-Former reads it (`Blip2Config.question_aware`).

Letters: N rows, I images, T text positions, P patches, Q queries, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from blip2.model.bridge import Bridge
from blip2.results import ImageFeatures

IMAGES, ROWS = 16, 256  # whose keys and values, and whose hidden states, are held together


def heeded(bridge: Bridge, features: ImageFeatures, ids: Tensor) -> ImageFeatures:
    """The same images, their queries read anew beside a question each; patches are not encoded again.

    What was read of an image before stays with the features that were given: it is of other queries.

    Args:
        features: a row for each question, the same image in any number of them.
        ids: int64[N, T], the Q-Former's tokens of the questions, right-padded, on the bridge's device.
    Returns:
        features of N rows, `queries` on the bridge's device.
    """
    about: dict[int, list[int]] = {}
    for row, reading in enumerate(features.readings):  # one object is one image
        about.setdefault(id(reading), []).append(row)
    groups = list(about.values())
    order: list[int] = []
    found: list[Tensor] = []
    for start in range(0, len(groups), IMAGES):
        some = groups[start : start + IMAGES]
        patches = features.patches[[rows[0] for rows in some]].to(ids.device, bridge.dtype)
        sight = bridge.see(patches)
        rows = [row for each in some for row in each]
        images = torch.tensor([image for image, each in enumerate(some) for _ in each], device=ids.device)
        for part in range(0, len(rows), ROWS):
            found.append(bridge.heed(sight, images[part : part + ROWS], ids[rows[part : part + ROWS]]))
        order += rows
    place = torch.tensor(order, device=ids.device).argsort()
    return ImageFeatures(features.patches, torch.cat(found)[place], features.vectors)


def each_image(questions: Sequence[str], counts: Sequence[int]) -> list[str]:
    """The question of each image, where prompts have several."""
    return [question for question, count in zip(questions, counts, strict=True) for _ in range(count)]
