"""What an evaluation came to, as one page: numbers, how they were made, the worst and the best cases with pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from blip2.data.sources import ImageRef, Prototype, Sample
from blip2.errors import DataError, ImageError
from blip2.evaluate.answering import score
from blip2.evaluate.captioning import cider_of_each
from blip2.evaluate.estimate import Estimate, Floats
from blip2.evaluate.questions import Question
from blip2.evaluate.ranking import ranks
from blip2.evaluate.run import Ranked, picture_of
from blip2.evaluate.writing import Written
from blip2.files import replacing
from blip2.page import page, text, thumbnail

CASES = 12  # of the worst, and of the best

_STYLE = """
table { border-collapse: collapse; margin: 0 0 1rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .2rem 1rem .2rem 0; vertical-align: top; overflow-wrap: anywhere; }
th { font-weight: 600; }
h2 { font-size: 1.05rem; margin: 1.5rem 0 .5rem; }
main { grid-template-columns: repeat(auto-fill, minmax(min(15rem, 100%), 1fr)); }
dl { margin: .25rem 0 0; font-size: .8125rem; }
dt { color: GrayText; margin-top: .25rem; }
dd { margin: 0; overflow-wrap: anywhere; }
"""


@dataclass(frozen=True)
class Case:
    """One picture, and what is to be said of it: pairs of a label and a text."""

    name: str
    image: ImageRef | Prototype
    lines: tuple[tuple[str, str], ...]


def write(
    path: Path,
    title: str,
    numbers: Mapping[str, Estimate | float],
    settings: Mapping[str, object],
    cases: Mapping[str, Sequence[Case]],
) -> None:
    """The page, whole or not at all.

    Args:
        settings: what the numbers depend on, and the command.
        cases: by their heading.
    Raises:
        DataError: it cannot be written.
    """
    rows = "".join(
        f"<tr><th>{text(name)}</th><td>{found.value:.4f}</td><td>{found.low:.4f} to {found.high:.4f}</td></tr>\n"
        if isinstance(found, Estimate)
        else f"<tr><th>{text(name)}</th><td>{found:.4f}</td><td></td></tr>\n"
        for name, found in numbers.items()
    )
    made = "".join(f"<tr><th>{text(name)}</th><td>{text(str(value))}</td></tr>\n" for name, value in settings.items())
    shown = "".join(
        f"<h2>{text(heading)}</h2>\n<main>\n{''.join(map(_figure, some))}</main>\n" for heading, some in cases.items()
    )
    head = "<tr><th>measure</th><th>value</th><th>95% interval</th></tr>\n"
    body = f"<table>\n{head}{rows}</table>\n{shown}<h2>How it was made</h2>\n<table>\n{made}</table>\n"
    try:
        with replacing(path) as partial:
            partial.write_text(page(title, body, _STYLE), encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path}: the report cannot be written ({error.strerror})") from error


def of_captions(samples: Sequence[Sample], written: Sequence[Written], *, java: bool = True) -> dict[str, list[Case]]:
    """The captions of the lowest and of the highest CIDEr."""
    scores = cider_of_each([found.text for found in written], [sample.captions for sample in samples], java=java)

    def case(row: int) -> Case:
        sample, found = samples[row], written[row]
        lines = [("caption", found.text or f"none: {found.error}"), ("CIDEr", f"{scores[row]:.2f}")]
        return Case(sample.id, sample.image, (*lines, *(("reference", reference) for reference in sample.captions)))

    return _ends(scores, [found.score for found in written], case)


def of_answers(questions: Sequence[Question], written: Sequence[Written]) -> dict[str, list[Case]]:
    """The wrong answers and the right ones that the model was surest of."""
    scores = np.array([score(found.text, question.answers) for question, found in zip(questions, written, strict=True)])

    def case(row: int) -> Case:
        question, found = questions[row], written[row]
        true = ", ".join(dict.fromkeys(question.answers))
        lines = [("question", question.text), ("answer", found.text or f"none: {found.error}"), ("true", true)]
        return Case(question.key, question.image, (*lines, ("score", f"{scores[row]:.2f}")))

    return _ends(scores, [found.score for found in written], case)


def of_ranking(samples: Sequence[Sample], found: Ranked) -> dict[str, list[Case]]:
    """The captions whose own picture stands lowest among all, and the pictures that found one of theirs first."""
    of_texts = ranks(found.for_texts.T, found.fits.T)
    described = np.flatnonzero(found.fits.any(axis=1))
    of_images = ranks(found.for_images[described], found.fits[described])

    def lost(column: int) -> Case:
        own, first = int(found.fits[:, column].argmax()), int(found.for_texts[:, column].argmax())
        lines = [("caption", found.texts[column]), ("its picture stands", f"{of_texts[column] + 1} of {len(samples)}")]
        return Case(samples[own].id, samples[own].image, (*lines, ("first stands", samples[first].id)))

    def seen(place: int) -> Case:
        row = int(described[place])
        best = found.texts[int(found.for_images[row].argmax())]
        lines = [("first caption", best), ("its first own stands", f"{of_images[place] + 1} of {len(found.texts)}")]
        return Case(samples[row].id, samples[row].image, tuple(lines))

    worst = np.argsort(-of_texts, kind="stable")[:CASES].tolist()
    best = np.argsort(of_images, kind="stable")[:CASES].tolist()
    return {
        "captions that find their picture last": list(map(lost, worst)),
        "pictures that find their caption first": list(map(seen, best)),
    }


def _ends(scores: Floats, sureness: Sequence[float], case: Callable[[int], Case]) -> dict[str, list[Case]]:
    """The worst and the best; of equals those that the model was surest of, and none twice."""
    rows = range(len(scores))
    worst = sorted(rows, key=lambda row: (scores[row], -sureness[row]))[: min(CASES, len(scores) // 2)]
    rest = set(rows) - set(worst)
    best = sorted(rest, key=lambda row: (-scores[row], -sureness[row]))[:CASES]
    return {"the worst": [case(row) for row in worst], "the best": [case(row) for row in best]}


def _figure(case: Case) -> str:
    try:
        picture = f'<img alt="{text(case.name)}" src="{thumbnail(picture_of(case.name, case.image))}">'
    except ImageError as error:
        picture = f"<p>{text(str(error))}</p>"
    labels = ["", *(label for label, _ in case.lines)]
    lines = "".join(
        ("" if label == before else f"<dt>{text(label)}</dt>") + f"<dd>{text(line)}</dd>"
        for before, (label, line) in zip(labels, case.lines, strict=False)
    )
    return f"<figure>{picture}<dl>{lines}</dl></figure>\n"
