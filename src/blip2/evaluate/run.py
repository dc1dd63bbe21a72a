"""Retrieval with a model: every picture and text encoded once, ranked, and the best matched pair by pair.

Letters: N images, M texts, P pairs, Q queries, D width, T text positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL.Image import Image

from blip2 import image
from blip2.blip2 import Blip2
from blip2.data.sources import ImageRef, Prototype, Sample
from blip2.errors import DataError, ImageError
from blip2.evaluate.kept import Kept, Row
from blip2.evaluate.protocols import Ranking
from blip2.evaluate.ranking import Recall, belonging, ranks, rerank, retrieval
from blip2.results import ImageFeatures
from blip2.text import plain, published_caption

PATCHES_KEPT = 4 << 30  # bytes of patches that wait in memory for matching

T = TypeVar("T")
NamedProgress: TypeAlias = Callable[[str, int, int], None]
"""What is being done, how many are done, of how many."""


def silent(what: str, done: int, total: int) -> None:
    """A progress callback that shows nothing."""
    del what, done, total


def texts_of(samples: Sequence[Sample], *, clean: bool = True) -> tuple[list[str], NDArray[np.bool_]]:
    """The captions of samples, and which image they fit.

    A text that was written for several images (or twice for one) is one text that fits them all.

    Args:
        clean: write captions as training sees them: lower case, no final dot.
    Returns:
        M texts, and bool[N, M].
    """
    rows: dict[str, list[int]] = {}
    for number, sample in enumerate(samples):
        for caption in sample.captions:
            rows.setdefault(plain(caption) if clean else caption, []).append(number)
    fits = np.zeros((len(samples), len(rows)), dtype=bool)
    for column, images in enumerate(rows.values()):
        fits[images, column] = True
    return list(rows), fits


def published_texts(samples: Sequence[Sample]) -> tuple[list[str], NDArray[np.bool_]]:
    """The captions of samples as the published models read them, each a text that fits its own image alone.

    Returns:
        M texts, and bool[N, M].
    """
    pairs = [
        (published_caption(caption), number) for number, sample in enumerate(samples) for caption in sample.captions
    ]
    owners = np.array([number for _, number in pairs], dtype=np.int64)
    return [text for text, _ in pairs], belonging(owners, len(samples))


def encode(
    model: Blip2,
    samples: Sequence[Sample],
    *,
    patches: bool = True,
    batch_size: int = 32,
    progress: NamedProgress = silent,
) -> ImageFeatures:
    """Each picture once, in order; the features wait in main memory.

    Args:
        patches: keep them too, for matching: by far the largest part (0.7 MB an image for ViT-g at 224 pixels).
    Raises:
        DataError: there are no samples, or one has no picture.
        ImageError: a picture cannot be opened; the message names it.
    """
    if not samples:
        raise DataError("nothing to evaluate: no samples are left")
    parts: list[ImageFeatures] = []
    for start in range(0, len(samples), batch_size):
        part = model.encode([picture_of(sample.id, sample.image) for sample in samples[start : start + batch_size]])
        kept = part.patches if patches else part.patches[:, :0]
        parts.append(ImageFeatures(kept.cpu(), part.queries.cpu(), part.vectors.cpu()))
        progress("images", min(start + batch_size, len(samples)), len(samples))
    return ImageFeatures.concatenate(parts)


def cosines(
    model: Blip2,
    features: ImageFeatures,
    texts: Sequence[str],
    *,
    batch_size: int = 256,
    progress: NamedProgress = silent,
) -> NDArray[np.float32]:
    """float32[N, M]: cosine of each text and the best query of each image (ITC)."""
    columns: list[NDArray[np.float32]] = []
    images = features.vectors.float()  # (N, Q, E)
    for start in range(0, len(texts), batch_size):
        vectors = model.embed_texts(texts[start : start + batch_size]).cpu().float()  # (M', E)
        columns.append((images @ vectors.T).amax(1).numpy())  # (N, M')
        progress("texts", min(start + batch_size, len(texts)), len(texts))
    return np.concatenate(columns, axis=1)


def match_pairs(
    model: Blip2,
    features: ImageFeatures,
    texts: Sequence[str],
    images: NDArray[np.int64],
    columns: NDArray[np.int64],
    *,
    batch_size: int = 256,
    progress: NamedProgress = silent,
) -> NDArray[np.float32]:
    """ITM logits of class 1 for pairs, without the full product of images and texts.

    Args:
        images: int64[P], rows of `features`.
        columns: int64[P], positions in `texts`.
    Returns:
        float32[P].
    Raises:
        ConfigError: the model has no text side or no matching head.
    """
    ids = model.text_ids(texts)  # (M, T)
    lengths = (ids != model.config.qformer.pad_id).sum(1).cpu().numpy()
    order = np.argsort(images, kind="stable")  # a batch has few images, each seen once for all of its pairs
    logits = np.empty(len(order), dtype=np.float32)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        pairs = torch.from_numpy(np.stack([images[batch], columns[batch]], axis=1))
        longest = int(lengths[columns[batch]].max())
        logits[batch] = model.match_logits(features, ids[:, :longest], pairs)[:, 1].cpu().numpy()
        progress("pairs", min(start + batch_size, len(order)), len(order))
    return logits


@dataclass(frozen=True)
class Ranked:
    """Pictures and texts that ranked each other.

    Attributes:
        recalls: by `itc`; and by `itm` after matching, where it was asked for.
        texts: M.
        fits: bool[N, M].
        for_images: float[N, M], what images rank texts by in the end; -inf for those that were not matched.
        for_texts: float[N, M], what texts rank images by.
    """

    recalls: dict[str, Recall]
    texts: list[str]
    fits: NDArray[np.bool_]
    for_images: NDArray[np.floating]
    for_texts: NDArray[np.floating]

    def best(self, samples: Sequence[Sample], depth: int = 10) -> list[dict[str, Any]]:
        """Of each text and of each picture, in values of JSON, what stands first and where its own stands, from 1."""
        rows: list[dict[str, Any]] = []
        described = np.flatnonzero(self.fits.any(axis=1))
        places = ranks(self.for_texts.T, self.fits.T), ranks(self.for_images[described], self.fits[described])
        for column, text in enumerate(self.texts):
            first = np.argsort(-self.for_texts[:, column], kind="stable")[:depth]
            found = [samples[row].id for row in first]
            rows.append({"text": text, "place": int(places[0][column]) + 1, "images": found})
        for number, row in enumerate(described.tolist()):
            first = np.argsort(-self.for_images[row], kind="stable")[:depth]
            found = [self.texts[column] for column in first]
            rows.append({"image": samples[row].id, "place": int(places[1][number]) + 1, "texts": found})
        return rows


def rank_pictures(
    model: Blip2,
    samples: Sequence[Sample],
    how: Ranking | None = None,
    *,
    kept: Kept | None = None,
    batch_size: int = 32,
    progress: NamedProgress = silent,
) -> Ranked:
    """Pictures and captions of the samples rank each other, by cosine and then by matching.

    Patches stay in memory where all of them fit in `PATCHES_KEPT`; else each picture is encoded once more.

    Args:
        how: the protocol; the model's own without.
        kept: what an earlier run of the same has done is not done again.
    Raises:
        DataError: there are no samples, or one has no picture.
        ImageError: a picture cannot be opened; the message names it.
    """
    how, kept = how or Ranking("own"), kept or Kept()
    if not samples:
        raise DataError("nothing to evaluate: no samples are left")
    texts, fits = texts_of(samples) if how.texts == "plain" else published_texts(samples)
    if not texts:
        raise DataError("nothing to evaluate: none of the pictures has a caption")
    pictures = _Pictures(model, samples, kept, batch_size, progress)
    features = pictures.encode(patches=how.top > 0)
    similarity = kept.block("cosines", lambda: cosines(model, features, texts, progress=progress))
    recalls = {"itc": retrieval(similarity, fits)}
    if not how.top:
        return Ranked(recalls, texts, fits, similarity, similarity)
    for_images, for_texts = rerank(
        similarity, lambda images, columns: pictures.match(texts, images, columns), how.top, how.weight
    )
    recalls["itm"] = retrieval(for_images, fits, to_images=for_texts)
    return Ranked(recalls, texts, fits, for_images, for_texts)


class _Pictures:
    """The pictures of an evaluation in blocks of a batch, each of whose results is kept."""

    def __init__(
        self, model: Blip2, samples: Sequence[Sample], kept: Kept, batch_size: int, progress: NamedProgress
    ) -> None:
        self._model, self._samples, self._kept, self._progress = model, samples, kept, progress
        self._blocks = [range(len(samples))[start : start + batch_size] for start in range(0, len(samples), batch_size)]
        self._features: dict[int, ImageFeatures] = {}  # of blocks whose patches stay in memory

    def encode(self, *, patches: bool) -> ImageFeatures:
        """All vectors, without patches and queries; patches stay in memory where there is room for all."""
        vectors: list[NDArray[np.float32]] = []
        for block in self._blocks:
            vectors.append(
                self._kept.block(f"vectors-{block.start:07d}", lambda block=block: self._seen(block, patches))
            )
            self._progress("images", block.stop, len(self._samples))
        found = torch.from_numpy(np.concatenate(vectors))  # (N, Q, E)
        return ImageFeatures(found[:, :0], found[:, :, :0], found)

    def match(self, texts: Sequence[str], images: NDArray[np.int64], columns: NDArray[np.int64]) -> NDArray[np.float32]:
        """ITM logits of pairs; `images` ascend."""
        logits: list[NDArray[np.float32]] = []
        for block in self._blocks:
            rows = slice(*np.searchsorted(images, (block.start, block.stop)).tolist())
            own, used = images[rows] - block.start, columns[rows]
            logits.append(
                self._kept.block(
                    f"matches-{block.start:07d}",
                    lambda block=block, own=own, used=used: self._matched(block, texts, own, used),
                )
            )
            self._progress("pairs", rows.stop, len(images))
        return np.concatenate(logits)

    def _seen(self, block: range, patches: bool) -> NDArray[np.float32]:
        features = self._encoded(block)
        size = features.patches.nbytes / len(block) * len(self._samples)
        if patches and size <= PATCHES_KEPT:
            self._features[block.start] = features
        return features.vectors.float().numpy()

    def _matched(
        self, block: range, texts: Sequence[str], images: NDArray[np.int64], columns: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        features = self._features.get(block.start) or self._encoded(block)
        used, place = np.unique(columns, return_inverse=True)
        return match_pairs(self._model, features, [texts[int(column)] for column in used], images, place)

    def _encoded(self, block: range) -> ImageFeatures:
        return encode(self._model, [self._samples[row] for row in block], batch_size=len(block))


def evaluate_retrieval(
    model: Blip2,
    samples: Sequence[Sample],
    *,
    top: int = 0,
    weight: float = 1.0,
    batch_size: int = 32,
    progress: NamedProgress = silent,
) -> dict[str, Recall]:
    """Recall among all captions and pictures of the samples, see `rank_pictures`.

    Args:
        top: how many of each query's best are re-ranked by matching; 0 for none.
        weight: of a match's logit beside the cosine, see `rerank`.
    Returns:
        `itc`; and `itm` where `top` is not 0.
    """
    how = Ranking("own", top, weight)
    return rank_pictures(model, samples, how, batch_size=batch_size, progress=progress).recalls


def picture_of(name: str, ref: ImageRef | Prototype) -> Image:
    """A picture, opened.

    Args:
        name: of what it belongs to, for messages.
    Raises:
        DataError: it is a class prototype.
        ImageError: it cannot be opened.
    """
    if isinstance(ref, Prototype):
        raise DataError(f"{name!r} is a class prototype: only pictures can be evaluated")
    try:
        return image.open(ref.read())
    except (ImageError, DataError) as error:
        raise ImageError(f"{name!r} ({ref}): {error}") from None


def of_readable(
    batch: Sequence[T], picture: Callable[[T], Image], work: Callable[[Sequence[T], Sequence[Image]], Sequence[Row]]
) -> list[Row]:
    """What `work` finds of each of a batch, in order; `{"error": ...}` of one whose picture cannot be read.

    Such a picture takes none of its neighbours with it.
    """
    pictures: list[Image] = []
    readable: list[T] = []
    errors: dict[int, str] = {}
    for number, item in enumerate(batch):
        try:
            pictures.append(picture(item))
            readable.append(item)
        except ImageError as error:
            errors[number] = str(error)
    found = iter(work(readable, pictures) if readable else [])
    return [{"error": errors[number]} if number in errors else next(found) for number in range(len(batch))]
