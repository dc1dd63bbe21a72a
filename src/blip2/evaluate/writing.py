"""Captions and answers of a model for a whole set, kept as they come, and their scores."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from PIL.Image import Image

from blip2.blip2 import Blip2
from blip2.data.sources import Sample
from blip2.errors import DataError
from blip2.evaluate.answering import Accuracy, answers
from blip2.evaluate.captioning import captions, check_tools
from blip2.evaluate.estimate import Estimate
from blip2.evaluate.kept import Kept, Row
from blip2.evaluate.protocols import OWN, Writing
from blip2.evaluate.questions import Question
from blip2.evaluate.run import NamedProgress, of_readable, picture_of, silent
from blip2.results import Generation

BATCH = 16


@dataclass(frozen=True)
class Written:
    """A text that the model wrote.

    Attributes:
        score: what it was ranked by, see `Generation`; 0 for none.
        error: why the picture could not be read, where it could not: the text is then empty.
    """

    text: str = ""
    score: float = 0.0
    error: str = ""


def write_captions(
    model: Blip2,
    samples: Sequence[Sample],
    how: Writing = OWN,
    *,
    kept: Kept | None = None,
    batch_size: int = BATCH,
    progress: NamedProgress = silent,
) -> list[Written]:
    """One caption a sample.

    Args:
        kept: what an earlier run of the same has written is not written again.
    """

    def work(batch: Sequence[Sample]) -> list[Row]:
        def caption(rows: Sequence[Sample], pictures: Sequence[Image]) -> list[Row]:
            del rows
            return _rows(model.caption(pictures, how.prompt, details=True, **how.options))

        return of_readable(batch, lambda sample: picture_of(sample.id, sample.image), caption)

    rows = (kept or Kept()).complete(
        samples, lambda sample: sample.id, work, batch_size, lambda done, total: progress("captions", done, total)
    )
    return [Written(**row) for row in rows]


def write_answers(
    model: Blip2,
    questions: Sequence[Question],
    how: Writing = OWN,
    *,
    kept: Kept | None = None,
    batch_size: int = BATCH,
    progress: NamedProgress = silent,
) -> list[Written]:
    """One answer a question; a picture of several questions in a row is encoded once for them.

    Args:
        kept: what an earlier run of the same has answered is not asked again.
    """
    asked = model
    if how.prompt is not None:
        prompts = dataclasses.replace(model.config.prompts, question=how.prompt)
        asked = dataclasses.replace(model, config=dataclasses.replace(model.config, prompts=prompts))

    def work(batch: Sequence[Question]) -> list[Row]:
        opened: dict[str, Image] = {}

        def picture(question: Question) -> Image:
            if question.picture not in opened:
                opened[question.picture] = picture_of(question.picture, question.image)
            return opened[question.picture]

        def answer(rows: Sequence[Question], pictures: Sequence[Image]) -> list[Row]:
            del pictures
            place = {name: number for number, name in enumerate(dict.fromkeys(row.picture for row in rows))}
            features = asked.encode([opened[name] for name in place])
            texts = [how.question(row.text) for row in rows]
            return _rows(asked.ask(features[[place[row.picture] for row in rows]], texts, details=True, **how.options))

        return of_readable(batch, picture, answer)

    rows = (kept or Kept()).complete(
        questions, lambda question: question.key, work, batch_size, lambda done, total: progress("answers", done, total)
    )
    return [Written(**row) for row in rows]


def _rows(found: Sequence[Generation]) -> list[Row]:
    return [{"text": each.text, "score": each.score} for each in found]


def evaluate_captions(
    model: Blip2,
    samples: Sequence[Sample],
    how: Writing = OWN,
    *,
    java: bool = True,
    spice: bool = False,
    kept: Kept | None = None,
    batch_size: int = BATCH,
    progress: NamedProgress = silent,
) -> tuple[dict[str, Estimate], list[Written]]:
    """Scores by name, see `captions`, and the captions; a picture that could not be read has an empty one.

    A Java program that fails once the captions are there costs its own score only, and is a warning.

    Args:
        java, spice: see `captions`.
        kept: see `write_captions`.
    Raises:
        DataError: a sample has no caption to compare with.
        MissingExtraError: the metrics are not installed; both are said before the first caption is written.
    """
    check_tools(java=java, spice=spice)
    alone = next((sample.id for sample in samples if not sample.captions), None)
    if alone is not None:
        raise DataError(f"{alone!r} has no caption to compare with")
    written = write_captions(model, samples, how, kept=kept, batch_size=batch_size, progress=progress)
    failed: dict[str, str] = {}
    numbers = score_captions(samples, [found.text for found in written], java=java, spice=spice, failed=failed)
    for name, why in failed.items():
        warnings.warn(f"{name}: {why}", stacklevel=2)
    return numbers, written


def score_captions(
    samples: Sequence[Sample],
    written: Sequence[str],
    *,
    java: bool = True,
    spice: bool = False,
    failed: dict[str, str] | None = None,
) -> dict[str, Estimate]:
    """Scores of all, and after the domain's name those of each domain by itself, as NoCaps reports them.

    Args:
        java, spice, failed: see `captions`.
    """
    numbers = captions(written, [sample.captions for sample in samples], java=java, spice=spice, failed=failed)
    for domain in sorted({sample.domain for sample in samples} - {""}):
        rows = [row for row, sample in enumerate(samples) if sample.domain == domain]
        references = [samples[row].captions for row in rows]
        found = captions([written[row] for row in rows], references, java=java, spice=spice, failed=failed)
        numbers |= {f"{domain} {name}": estimate for name, estimate in found.items()}
    return numbers


def vqa_kind(_question: str, answer: str) -> str:
    """The three kinds of VQAv2, told by the true answer: `yes/no`, `number`, `other`."""
    if answer.lower() in ("yes", "no"):
        return "yes/no"
    return "number" if answer.isdecimal() else "other"


def score_answers(questions: Sequence[Question], given: Sequence[str]) -> dict[str, Accuracy]:
    """Accuracy of all that count towards it, `overall`, and by kind, such as `answer type: number`.

    Kinds that are called just `kind` go by their own name.

    Raises:
        DataError: a question has no true answer, or none counts.
    """
    rows = [row for row, question in enumerate(questions) if question.balanced]
    found = _accuracy(questions, given, rows, "overall")
    for name in dict.fromkeys(name for row in rows for name in questions[row].kinds):
        named = [row for row in rows if name in questions[row].kinds]
        parts = _accuracy(questions, given, named, name)
        found |= {kind if name == "kind" else f"{name}: {kind}": accuracy for kind, accuracy in parts.items()}
    return found


def _accuracy(
    questions: Sequence[Question], given: Sequence[str], rows: Sequence[int], name: str
) -> dict[str, Accuracy]:
    return answers(
        [given[row] for row in rows],
        [questions[row].answers for row in rows],
        [questions[row].kinds.get(name, name) for row in rows],
        [questions[row].picture for row in rows],
    )


def evaluate_answers(
    model: Blip2,
    questions: Sequence[Question],
    how: Writing = OWN,
    *,
    kept: Kept | None = None,
    batch_size: int = BATCH,
    progress: NamedProgress = silent,
) -> tuple[dict[str, Accuracy], list[Written]]:
    """Accuracy, see `score_answers`, and the answers; a picture that could not be read has an empty one."""
    written = write_answers(model, questions, how, kept=kept, batch_size=batch_size, progress=progress)
    return score_answers(questions, [found.text for found in written]), written
