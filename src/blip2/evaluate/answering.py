"""Accuracy of answers to questions, as the VQAv2 evaluation compares them."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from blip2.errors import DataError
from blip2.evaluate.estimate import Estimate, ratio

_NUMBERS = "zero one two three four five six seven eight nine ten"
_DIGITS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBERS.split())}
_ARTICLES = {"a", "an", "the"}
_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've o'clock
oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've
someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's they'd they'd've
they'll they're they've 'twas 'ow's'at wasn't we'd've we've weren't what'll what're what's what've when's where'd
where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all
y'all'd've y'all'll you'd you'd've you'll you're you've
"""


def _one_apostrophe_less(word: str) -> set[str]:
    """Every way to leave one apostrophe of a word out: two are not mended."""
    return {word[:place] + word[place + 1 :] for place, letter in enumerate(word) if letter == "'"}


_CONTRACTIONS = {short: word for word in _CONTRACTED.split() for short in _one_apostrophe_less(word)}
_CONTRACTIONS["somebody'd"] = "somebodyd"  # the official table has this one the wrong way round


@functools.lru_cache(1 << 16)  # annotators' answers repeat: two million of them are mostly a few thousand words
def strip_punctuation(text: str) -> str:
    """The first half of `normalise`, all that is applied to what annotators answered.

    A mark that touches a space, or any mark where a comma parts digits, is dropped; elsewhere it gives way to a space.
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    drop_all = re.search(r"\d,\d", text) is not None
    result = text
    for mark in _MARKS:
        drop = drop_all or f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if drop else " ")
    return re.sub(r"\.(?!\d)", "", result)


@functools.lru_cache(1 << 16)
def normalise(text: str) -> str:
    """An answer as the VQAv2 evaluation compares it: lower case, no punctuation and articles, digits, contractions."""
    words = [_DIGITS.get(word, word) for word in strip_punctuation(text).lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def score(predicted: str, truth: Sequence[str]) -> float:
    """How right an answer is, 0 to 1.

    One true answer: 1 where both are equal, normalised. Several (one an annotator): over each choice of all but one of
    them, the mean of min(1, equal answers / 3); as in the official evaluation the annotators' answers are stripped of
    punctuation only, and not even that where they all agree.

    Source: Goyal et al. 2017 (VQAv2), its evaluation code.
    """
    if len(truth) == 1:
        return float(normalise(predicted) == normalise(truth[0]))
    predicted = normalise(predicted)
    if len(set(truth)) > 1:
        truth = [strip_punctuation(answer) for answer in truth]
    equal = sum(answer == predicted for answer in truth)
    left_out = [equal - (answer == predicted) for answer in truth]
    return sum(min(1.0, count / 3) for count in left_out) / len(truth)


@dataclass(frozen=True)
class Accuracy:
    """Of one kind of question.

    Attributes:
        accuracy: mean score.
        floor: the mean score of the best single answer to all of them, among the true ones.
        answer: that answer.
        count: questions.
    """

    accuracy: Estimate
    floor: float
    answer: str
    count: int


def answers(
    predicted: Sequence[str],
    truth: Sequence[Sequence[str]],
    kinds: Sequence[str],
    images: Sequence[Hashable] | None = None,
) -> dict[str, Accuracy]:
    """Accuracy by kind of question, beside what the most frequent answer would get.

    Args:
        predicted: one answer a question.
        truth: the true answers of each question: one, or one an annotator.
        kinds: of each question.
        images: what each question is about; intervals resample images with all their questions (questions where None).
    Raises:
        DataError: lengths differ, there are no questions, or one has no true answer.
    """
    images = range(len(predicted)) if images is None else images
    if not len(predicted) == len(truth) == len(kinds) == len(images):
        sizes = f"{len(predicted)} answers, {len(truth)} truths, {len(kinds)} kinds, {len(images)} images"
        raise DataError(f"every question needs one of each: {sizes}")
    if not predicted:
        raise DataError("nothing to evaluate: no questions are left")
    for number, texts in enumerate(truth):
        if not texts:
            raise DataError(f"question {number} has no true answer")
    result: dict[str, Accuracy] = {}
    for kind in sorted(set(kinds)):
        rows = [row for row, other in enumerate(kinds) if other == kind]
        scores = np.array([score(predicted[row], truth[row]) for row in rows])
        place = {image: number for number, image in enumerate(dict.fromkeys(images[row] for row in rows))}
        unit = np.array([place[images[row]] for row in rows])
        floor, answer = _floor([truth[row] for row in rows])
        accuracy = ratio(np.bincount(unit, weights=scores), np.bincount(unit))
        result[kind] = Accuracy(accuracy, floor, answer, len(rows))
    return result


def _floor(truth: Sequence[Sequence[str]]) -> tuple[float, str]:
    """The best single answer, by its mean score; of equals the first in the alphabet."""
    counts = Counter(answer for texts in truth for answer in {normalise(text) for text in texts})
    likely = sorted(counts, key=lambda answer: (-counts[answer], answer))[:10]
    means = {answer: sum(score(answer, texts) for texts in truth) / len(truth) for answer in likely}
    best = max(likely, key=lambda answer: means[answer])
    return means[best], best
