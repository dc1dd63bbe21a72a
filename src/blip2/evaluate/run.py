"""Evaluate a model on samples: encode once, rank, write or answer, and score.

Letters: N images, M texts, P pairs, Q queries, D width, T text positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from blip2 import image
from blip2.blip2 import Blip2
from blip2.data.sources import Prototype, Sample
from blip2.errors import DataError, ImageError
from blip2.evaluate.answering import Accuracy, answers
from blip2.evaluate.captioning import captions, check_tools
from blip2.evaluate.estimate import Estimate
from blip2.evaluate.ranking import Recall, rerank, retrieval
from blip2.results import ImageFeatures
from blip2.text import plain

Progress = Callable[[str, int, int], None]
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


def encode(
    model: Blip2,
    samples: Sequence[Sample],
    *,
    patches: bool = True,
    batch_size: int = 32,
    progress: Progress = silent,
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
        part = model.encode([_picture(sample) for sample in samples[start : start + batch_size]])
        kept = part.patches if patches else part.patches[:, :0]
        parts.append(ImageFeatures(kept.cpu(), part.queries.cpu(), part.vectors.cpu()))
        progress("images", min(start + batch_size, len(samples)), len(samples))
    return ImageFeatures.concatenate(parts)


def cosines(
    model: Blip2, features: ImageFeatures, texts: Sequence[str], *, batch_size: int = 256, progress: Progress = silent
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
    progress: Progress = silent,
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


def evaluate_retrieval(
    model: Blip2,
    samples: Sequence[Sample],
    *,
    top: int = 0,
    weight: float = 1.0,
    clean: bool = True,
    batch_size: int = 32,
    progress: Progress = silent,
) -> dict[str, Recall]:
    """Recall among all captions and pictures of the samples.

    Args:
        top: how many of each query's best are re-ranked by matching; 0 for none. Patches of all images stay in memory.
        weight: of a match's logit beside the cosine, see `rerank`.
        clean: see `texts_of`.
    Returns:
        `itc`; and `itm` where `top` is not 0.
    """
    texts, fits = texts_of(samples, clean=clean)
    features = encode(model, samples, patches=top > 0, batch_size=batch_size, progress=progress)
    similarity = cosines(model, features, texts, progress=progress)
    found = {"itc": retrieval(similarity, fits)}
    if top:

        def score(images: NDArray[np.int64], columns: NDArray[np.int64]) -> NDArray[np.float32]:
            return match_pairs(model, features, texts, images, columns, progress=progress)

        for_images, for_texts = rerank(similarity, score, top, weight)
        found["itm"] = retrieval(for_images, fits, to_images=for_texts)
    return found


def write_captions(
    model: Blip2,
    samples: Sequence[Sample],
    *,
    num_beams: int = 5,
    batch_size: int = 16,
    progress: Progress = silent,
) -> list[str]:
    """One caption a sample."""
    written: list[str] = []
    for start in range(0, len(samples), batch_size):
        pictures = [_picture(sample) for sample in samples[start : start + batch_size]]
        written += model.caption(pictures, num_beams=num_beams)
        progress("captions", len(written), len(samples))
    return written


def evaluate_captions(
    model: Blip2, samples: Sequence[Sample], *, num_beams: int = 5, batch_size: int = 16, progress: Progress = silent
) -> tuple[dict[str, Estimate], list[str]]:
    """Scores by name, see `captions`, and the captions.

    Raises:
        DataError: a sample has no caption to compare with.
        MissingExtraError: the metrics are not installed; both are said before the first caption is written.
    """
    check_tools()
    alone = next((sample.id for sample in samples if not sample.captions), None)
    if alone is not None:
        raise DataError(f"{alone!r} has no caption to compare with")
    written = write_captions(model, samples, num_beams=num_beams, batch_size=batch_size, progress=progress)
    return captions(written, [sample.captions for sample in samples]), written


def vqa_kind(_question: str, answer: str) -> str:
    """The three kinds of VQAv2, told by the true answer: `yes/no`, `number`, `other`."""
    if answer.lower() in ("yes", "no"):
        return "yes/no"
    return "number" if answer.isdecimal() else "other"


def evaluate_answers(
    model: Blip2,
    samples: Sequence[Sample],
    kind: Callable[[str, str], str] = vqa_kind,
    *,
    num_beams: int = 5,
    batch_size: int = 16,
    progress: Progress = silent,
) -> tuple[dict[str, Accuracy], list[str]]:
    """Accuracy by kind of question, see `answers`, and the answers, in the order of samples and their questions.

    Args:
        kind: of a question and its true answer.
    """
    asked = [(number, *pair) for number, sample in enumerate(samples) for pair in sample.questions]
    given: list[str] = []
    for start in range(0, len(asked), batch_size):
        rows = asked[start : start + batch_size]
        pictures = dict.fromkeys(number for number, _, _ in rows)
        features = model.encode([_picture(samples[number]) for number in pictures])
        place = {number: row for row, number in enumerate(pictures)}
        given += model.ask(
            features[[place[number] for number, _, _ in rows]],
            [question for _, question, _ in rows],
            num_beams=num_beams,
        )
        progress("answers", len(given), len(asked))
    truth, kinds = [[answer] for _, _, answer in asked], [kind(question, answer) for _, question, answer in asked]
    return answers(given, truth, kinds, [number for number, _, _ in asked]), given


def _picture(sample: Sample) -> Any:
    if isinstance(sample.image, Prototype):
        raise DataError(f"{sample.id!r} is a class prototype: only pictures can be evaluated")
    try:
        return image.open(sample.image.read())
    except ImageError as error:
        raise ImageError(f"{sample.id!r} ({sample.image}): {error}") from None
