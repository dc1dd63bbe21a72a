"""What GQA's evaluation measures beside accuracy: consistency, and how far answers are from their distribution."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from blip2.evaluate.answering import normalise
from blip2.evaluate.estimate import Estimate, ratio
from blip2.evaluate.questions import Question


def consistency(questions: Sequence[Question], given: Mapping[str, str]) -> Estimate | None:
    """Of balanced questions answered right: the share of right answers to what they entail, averaged over them.

    Args:
        given: an answer to each question, by key.
    Returns:
        None where no such question entails another, or one that is not among the questions: only the files of all
        questions can tell, the balanced ones leave those out. Intervals resample pictures.
    Source: Hudson and Manning 2019, section 4.4.
    """
    truth = {question.key: question.answers[0] for question in questions}
    right = {key: normalise(given[key]) == normalise(answer) for key, answer in truth.items()}
    shares: dict[str, list[float]] = {}
    for question in questions:
        entailed = [key for key in question.entailed if key != question.key]
        if not question.balanced or not entailed:
            continue
        if not truth.keys() >= set(entailed):
            return None
        if right[question.key]:
            shares.setdefault(question.picture, []).append(sum(right[key] for key in entailed) / len(entailed))
    if not shares:
        return None
    return ratio([sum(row) for row in shares.values()], [len(row) for row in shares.values()])


def distribution(questions: Sequence[Question], given: Mapping[str, str]) -> float | None:
    """How far the answers' frequencies are from the true ones': chi-square in each group, averaged by its size.

    Lower is better, 0 is equal.

    Args:
        given: an answer to each question, by key.
    Returns:
        None where no balanced question has a group.
    Source: Hudson and Manning 2019, section 4.4.
    """
    true: dict[str, Counter[str]] = {}
    ours: dict[str, Counter[str]] = {}
    for question in questions:
        if question.balanced and question.group:
            true.setdefault(question.group, Counter())[normalise(question.answers[0])] += 1
            ours.setdefault(question.group, Counter())[normalise(given[question.key])] += 1
    sizes = {group: counts.total() for group, counts in true.items()}
    if not sizes:
        return None
    squares = {
        group: sum((ours[group][answer] - count) ** 2 / count for answer, count in counts.items())
        for group, counts in true.items()
    }
    return sum(squares[group] * size for group, size in sizes.items()) / sum(sizes.values())
