"""Image-text retrieval: recall by similarity, and re-ranking of the best by image-text matching.

Letters: N images, M texts, A queries, B items that are ranked, P pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from blip2.errors import DataError
from blip2.evaluate.estimate import Estimate, ratio

DEPTHS = (1, 5, 10)

Scores = NDArray[np.floating]
Indices = NDArray[np.int64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Recall:
    """R@k for k in `DEPTHS`, both ways: the share of queries with a right item among the first k.

    Attributes:
        text_to_image: over texts; a text's items are the images.
        image_to_text: over images; the best placed of an image's texts counts.
    """

    text_to_image: dict[int, Estimate]
    image_to_text: dict[int, Estimate]


def belonging(image_of_text: NDArray[np.integer], images: int) -> Mask:
    """bool[N, M], True where a text was written for an image, from the image of each text, int[M].

    Raises:
        DataError: an index is no image.
    """
    if len(image_of_text) and not (image_of_text.min() >= 0 and image_of_text.max() < images):
        raise DataError(f"texts belong to images {image_of_text.min()} to {image_of_text.max()}, of only {images}")
    return np.arange(images)[:, None] == image_of_text[None]


def ranks(scores: Scores, relevant: Mask) -> Indices:
    """Where the best relevant item of each query stands, from 0; a tie with a wrong item counts against the query.

    Args:
        scores: float[A, B]; -inf for items that are not ranked.
        relevant: bool[A, B], at least one True a row.
    Returns:
        int64[A].
    """
    best = np.where(relevant, scores, -np.inf).max(axis=1, keepdims=True)
    return (~relevant & (scores >= best)).sum(axis=1)


def retrieval(similarity: Scores, relevant: Mask, *, to_images: Scores | None = None) -> Recall:
    """Recall in both directions, its intervals by resampling images (with their texts) against all candidates.

    Args:
        similarity: float[N, M].
        relevant: bool[N, M], see `belonging`; a text may fit several images, an image none (it then distracts only).
        to_images: float[N, M], what texts rank images by where it differs: after re-ranking.
    Raises:
        DataError: shapes differ, a score is NaN, or a text fits no image.
    Source: Karpathy and Fei-Fei 2015, section 4.1.
    """
    to_images = similarity if to_images is None else to_images
    if not similarity.shape == relevant.shape == to_images.shape:
        raise DataError(f"similarity is {similarity.shape}, relevance {relevant.shape}, to_images {to_images.shape}")
    if np.isnan(similarity).any() or np.isnan(to_images).any():
        raise DataError("the similarity has NaN in it: the model's vectors are broken")
    if not relevant.any(axis=0).all():
        raise DataError(f"text {int(np.argmin(relevant.any(axis=0)))} fits none of the images")
    described = relevant.any(axis=1)
    of_texts = ranks(to_images.T, relevant.T)
    of_images = ranks(similarity[described], relevant[described])
    owner = relevant.argmax(axis=0)  # a text of several images is drawn with the first of them
    owners, unit = np.unique(owner, return_inverse=True)
    texts = np.bincount(unit)
    return Recall(
        {k: ratio(np.bincount(unit, weights=of_texts < k, minlength=len(owners)), texts) for k in DEPTHS},
        {k: ratio(of_images < k, np.ones(len(of_images))) for k in DEPTHS},
    )


def rerank(
    similarity: Scores, score_pairs: Callable[[Indices, Indices], NDArray[np.floating]], top: int, weight: float = 1.0
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Score the best of each query anew: cosine plus the matching head's logit, weighed; others leave the ranking.

    Args:
        similarity: float[N, M], cosines (ITC).
        score_pairs: images int64[P] and texts int64[P] to ITM logits float[P]; called once, each pair once.
        top: how many items of each query are scored (the paper: 128).
        weight: of the logit; 1 as published. A head that has seen few pairs is worth less, find out on held-out ones.
    Returns:
        float64[N, M] for images that rank texts, and float64[N, M] for texts that rank images; -inf elsewhere.
    Source: BLIP-2, section 4.4.
    """
    images, texts = similarity.shape
    for_images, for_texts = np.zeros((2, images, texts), dtype=bool)
    for_images[np.arange(images)[:, None], np.argsort(-similarity, axis=1, kind="stable")[:, :top]] = True
    for_texts[np.argsort(-similarity, axis=0, kind="stable")[:top], np.arange(texts)[None]] = True
    rows, columns = np.nonzero(for_images | for_texts)
    scores = np.full(similarity.shape, -np.inf)
    scores[rows, columns] = weight * score_pairs(rows, columns).astype(np.float64) + similarity[rows, columns]
    return np.where(for_images, scores, -np.inf), np.where(for_texts, scores, -np.inf)
