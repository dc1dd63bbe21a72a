"""Whether matching probabilities mean what they say: of the pairs that are given 0.8, eight in ten should match.

Pairs are every picture with its own texts, and as many with texts of other pictures, drawn.
Letters: K pairs, N pictures, M texts, B bins, R resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from blip2.blip2 import Blip2
from blip2.calibration import BASE_RATE, weights_of
from blip2.data.sources import Sample
from blip2.errors import DataError
from blip2.evaluate.estimate import SEED, Estimate, Floats, bootstrap, ratio
from blip2.evaluate.run import NamedProgress, encode, silent, texts_of

BINS = 15  # of equal width, as Guo et al. 2017 draw them
FEWEST = 10  # pictures whose pairs a bin needs to be drawn


@dataclass(frozen=True)
class Pairs:
    """Pictures beside texts, judged by the matching head.

    Attributes:
        logits: float32[K, 2], of (no match, match).
        matches: bool[K].
        pictures: int64[K], of each pair; intervals resample them.
    """

    logits: Tensor
    matches: Tensor
    pictures: NDArray[np.int64]


@dataclass(frozen=True)
class Bin:
    """Pairs of like probability.

    Attributes:
        probability: their mean.
        share: of them that match.
    """

    probability: float
    share: Estimate


@dataclass(frozen=True)
class Reliability:
    """How far probabilities can be believed.

    Attributes:
        nll: mean negative log-likelihood of what is so; 0.693 for whoever always says 0.5.
        ece: expected calibration error: how far probabilities are from shares, on average over pairs.
        bins: those with pairs of at least `FEWEST` pictures.
    Source: Guo et al. 2017, "On calibration of modern neural networks".
    """

    nll: Estimate
    ece: Estimate
    bins: tuple[Bin, ...]


def drawn_pairs(fits: NDArray[np.bool_], seed: int = SEED) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Each picture with each of its texts, and for each of these pairs one with a text that was not written for it.

    Args:
        fits: bool[N, M].
    Returns:
        int64[K] of pictures, which ascend, and int64[K] of texts.
    Raises:
        DataError: every text fits a picture, so there is none to draw.
    """
    alone = fits.all(axis=1)
    if alone.any():
        raise DataError("a picture has no strangers: give at least two pictures with texts of their own")
    rows, columns = np.nonzero(fits)
    random = np.random.default_rng(seed)
    others = random.integers(fits.shape[1], size=len(rows))
    while (wrong := fits[rows, others]).any():
        others[wrong] = random.integers(fits.shape[1], size=int(wrong.sum()))
    order = np.argsort(np.concatenate([rows, rows]), kind="stable")
    return np.concatenate([rows, rows])[order], np.concatenate([columns, others])[order]


def judged(model: Blip2, samples: Sequence[Sample], *, batch_size: int = 32, progress: NamedProgress = silent) -> Pairs:
    """The pairs of some samples, see `drawn_pairs`, before the matching head.

    Raises:
        DataError: no samples, a picture without a text of its own, or too few to draw others.
        ImageError: a picture cannot be opened; the message names it.
        ConfigError: the model has no text side or no matching head.
    """
    mute = next((sample.id for sample in samples if not sample.captions), None)
    if mute is not None:
        raise DataError(f"{mute!r} has no text: only pictures with texts of their own can tell what matches")
    texts, fits = texts_of(samples, clean=model.config.plain_texts)
    rows, columns = drawn_pairs(fits)
    logits: list[Tensor] = []
    for start in range(0, len(samples), batch_size):
        own = slice(*np.searchsorted(rows, (start, start + batch_size)).tolist())
        features = encode(model, samples[start : start + batch_size], batch_size=batch_size)
        used, place = np.unique(columns[own], return_inverse=True)
        pairs = torch.from_numpy(np.stack([rows[own] - start, place], axis=1))
        logits.append(model.match_logits(features, model.text_ids([texts[column] for column in used]), pairs).cpu())
        progress("pictures", min(start + batch_size, len(samples)), len(samples))
    return Pairs(torch.cat(logits), torch.from_numpy(fits[rows, columns]), rows)


def reliability(probabilities: Tensor, pairs: Pairs, base_rate: float = BASE_RATE) -> Reliability:
    """How far the probabilities of pairs can be believed, with 95% intervals over pictures.

    Args:
        probabilities: float[K].
        base_rate: share of matches that the pairs are weighed to.
    """
    said = probabilities.double().numpy()
    true = pairs.matches.double().numpy()
    weights = weights_of(pairs.matches, base_rate).numpy()
    kinds, unit = np.unique(pairs.pictures, return_inverse=True)
    tiny = np.finfo(np.float32).tiny  # a certainty that is wrong costs much, not everything
    surprise = -np.log(np.maximum(np.where(true > 0, said, 1 - said), tiny))
    bins = np.minimum((said * BINS).astype(np.int64), BINS - 1)

    def sums(values: Floats) -> Floats:  # (N, B): of each picture in each bin
        flat = np.bincount(unit * BINS + bins, weights=weights * values, minlength=len(kinds) * BINS)
        return flat.astype(np.float64).reshape(len(kinds), BINS)

    mass, sure, right = sums(np.ones_like(said)), sums(said), sums(true)
    gap = sure - right
    ece = bootstrap(lambda counts: np.abs(counts @ gap).sum(1) / (counts @ mass).sum(1), len(kinds))
    nll = ratio(np.bincount(unit, weights=weights * surprise), mass.sum(1))
    shown = [number for number in range(BINS) if (mass[:, number] > 0).sum() >= FEWEST]
    return Reliability(nll, ece, tuple(_bin(mass[:, each], sure[:, each], right[:, each]) for each in shown))


def _bin(mass: Floats, sure: Floats, right: Floats) -> Bin:
    there = mass > 0
    return Bin(float(sure.sum() / mass.sum()), ratio(right[there], mass[there]))
