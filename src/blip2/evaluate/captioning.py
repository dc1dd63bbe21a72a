"""Caption metrics of the COCO evaluation, by pycocoevalcap: BLEU, METEOR, ROUGE-L, CIDEr and SPICE.

The official tokenizer, METEOR and SPICE are Java programs; without Java the others stand on `tokens`.
Letters: R resamples, N images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from blip2.errors import Blip2Error, ConfigError, DataError
from blip2.evaluate import tokens
from blip2.evaluate.estimate import Estimate, Floats, bootstrap, mean
from blip2.evaluate.java import (
    Meteor,
    find_java,
    find_java_for_spice,
    part,
    spice_folder,
    spice_of_each,
    tokenize,
)

TOKENIZER = "tokenizer"  # of Java, among what failed
_TINY, _SMALL = 1e-15, 1e-9  # pycocoevalcap's guards against division by zero

T = TypeVar("T")
Texts = dict[int, list[str]]  # tokenized, by image


def captions(
    generated: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    java: bool = True,
    spice: bool = False,
    failed: dict[str, str] | None = None,
) -> dict[str, Estimate]:
    """Scores of one caption an image against its reference captions.

    Intervals resample images. BLEU and METEOR are corpus-level: their statistics are summed anew over each resample.
    ROUGE-L, CIDEr and SPICE are means over images; CIDEr's document frequencies stay those of the whole set.

    Args:
        generated: one caption an image.
        references: at least one caption an image.
        java: False splits captions by our own rules and leaves METEOR out.
        spice: SPICE too; it takes minutes, and data that pycocoevalcap does not bring.
        failed: takes what Java failed at, `tokenizer`, `METEOR` or `SPICE`, and why, in place of an error: what it
            holds is left out, the other scores are there. Without its tokenizer it is as with `java=False`.
    Returns:
        `BLEU-1` to `BLEU-4`, `METEOR`, `ROUGE-L`, `CIDEr`, `SPICE` on their usual scales (CIDEr up to 10, the others up
        to 1).
    Raises:
        DataError: lengths differ, or an image has no reference.
        MissingExtraError: the extra `evaluate`, which brings pycocoevalcap and a Java, is not installed.
        ConfigError: no Java that METEOR or SPICE runs on, or SPICE's data is missing; the message tells what to do.
        Blip2Error: a Java program fails, or is stopped because it takes too long.
    Source: Chen et al. 2015, "Microsoft COCO Captions".
    """
    if failed is None:
        check_tools(java=java, spice=spice)
    truth, results, java = _tokenized(generated, references, java, failed)
    meteor = _unless(failed, "METEOR", lambda: _meteor(truth, results)) if java else None
    found = {
        **_bleu(truth, results),
        "METEOR": meteor,
        "ROUGE-L": mean(part("rouge.rouge").Rouge().compute_score(truth, results)[1]),
        "CIDEr": mean(_cider(truth, results)),
        "SPICE": _unless(failed, "SPICE", lambda: _spice(truth, results)) if spice else None,
    }
    return {name: estimate for name, estimate in found.items() if estimate is not None}


def cider_of_each(generated: Sequence[str], references: Sequence[Sequence[str]], *, java: bool = True) -> Floats:
    """float64[N]: each caption's own CIDEr within the set; their mean is that of `captions`."""
    return _cider(*_tokenized(generated, references, java)[:2])


def check_tools(*, java: bool = True, spice: bool = False) -> None:
    """Whether all that `captions` needs is there, before hours of captions are written.

    Raises:
        MissingExtraError, ConfigError: see `captions`.
    """
    part("tokenizer")
    if java:
        find_java()
    if not spice:
        return
    if not java:
        raise ConfigError("SPICE is a Java program: ask for it with Java, or leave it out")
    lacking: list[str] = []
    for find in (find_java_for_spice, spice_folder):
        try:
            find()
        except ConfigError as error:
            lacking.append(str(error))
    if lacking:
        raise ConfigError("; ".join(lacking))  # all of it at once: neither is quick to get


def _unless(failed: dict[str, str] | None, name: str, work: Callable[[], T]) -> T | None:
    """What a Java program finds; None where it failed, here or before, if failures are collected."""
    if failed is None:
        return work()
    if name not in failed:
        try:
            return work()
        except Blip2Error as error:
            failed[name] = str(error)
    return None


def _tokenized(
    generated: Sequence[str], references: Sequence[Sequence[str]], java: bool, failed: dict[str, str] | None = None
) -> tuple[Texts, Texts, bool]:
    """References and captions by image, and whether Java split them."""
    if len(generated) != len(references):
        raise DataError(f"{len(generated)} captions, but references for {len(references)} images")
    for number, texts in enumerate(references):
        if not texts:
            raise DataError(f"image {number} has no reference caption")
    everything = [*generated, *(text for texts in references for text in texts)]
    found = _unless(failed, TOKENIZER, lambda: tokenize(everything)) if java else None
    split = tokens.tokenize(everything) if found is None else found
    results = {number: [text] for number, text in enumerate(split[: len(generated)])}
    starts = np.cumsum([len(generated), *(len(texts) for texts in references)])
    return {number: split[starts[number] : starts[number + 1]] for number in results}, results, found is not None


def _cider(truth: Texts, results: Texts) -> Floats:
    return np.asarray(part("cider.cider").Cider().compute_score(truth, results)[1], dtype=np.float64)


def _spice(truth: Texts, results: Texts) -> Estimate:
    return mean(spice_of_each([texts[0] for texts in results.values()], list(truth.values())))


def _bleu(truth: Texts, results: Texts) -> dict[str, Estimate]:
    scorer = part("bleu.bleu_scorer").BleuScorer(n=4)
    for number, texts in results.items():
        scorer += (texts[0], truth[number])
    closest = [min((abs(length - row["testlen"]), length) for length in row["reflen"])[1] for row in scorer.ctest]
    correct: Floats = np.array([row["correct"] for row in scorer.ctest], dtype=np.float64)  # (N, 4)
    guessed: Floats = np.array([row["guess"] for row in scorer.ctest], dtype=np.float64)  # (N, 4)
    lengths: Floats = np.array([[row["testlen"] for row in scorer.ctest], closest], dtype=np.float64).T  # (N, 2)

    def score(counts: Floats, order: int) -> Floats:
        precisions = (counts @ correct[:, :order] + _TINY) / (counts @ guessed[:, :order] + _SMALL)
        ours, theirs = (counts @ lengths).T
        brevity = np.minimum(0, 1 - (theirs + _SMALL) / (ours + _TINY))
        return np.exp(np.log(precisions).mean(axis=1) + brevity)

    return {
        f"BLEU-{order}": bootstrap(lambda counts, order=order: score(counts, order), len(results))
        for order in (1, 2, 3, 4)
    }


def _meteor(truth: Texts, results: Texts) -> Estimate:
    with Meteor() as meteor:
        statistics = np.array([meteor.statistics(results[number][0], truth[number]) for number in results])
        return bootstrap(lambda counts: meteor.scores(counts @ statistics), len(results))
