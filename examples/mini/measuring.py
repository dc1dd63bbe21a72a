"""What `baselines.py` and `evaluate.py` share: the prepared data to measure on, and how numbers are written down."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from blip2.data import sources
from blip2.data.sources import Sample
from blip2.errors import DataError
from blip2.evaluate import Accuracy, Estimate, Recall


@dataclass(frozen=True)
class Data:
    """The data that `prepare.py` made.

    Attributes:
        shards: folder of Flickr8k as WebDataset shards.
        made: folder of questions and of `stamps/`.
        limit: at most so many pictures of each set, for a quick look.
    """

    shards: Path
    made: Path
    limit: int | None = None

    def flickr8k(self, split: str) -> list[Sample]:
        """A split with its captions."""
        return sources.read(f"{self.shards}/{split}-*.tar")[: self.limit]

    def stamps(self, name: str) -> list[Sample]:
        """`train`, `unseen` (held-out concepts) or `named` (held-out pictures of trained names)."""
        return sources.read(self.made / "stamps" / f"{name}.jsonl")[: self.limit]

    def things(self, name: str) -> dict[str, str]:
        """The noun that each stamp of a set shows, by its id."""
        return {row["id"]: row["noun"] for _, row in sources.json_lines(self.made / "stamps" / f"{name}.jsonl")}

    def concepts(self, name: str) -> dict[str, str]:
        """The concept of each stamp of a set, by its id."""
        return {row["id"]: row["concept"] for _, row in sources.json_lines(self.made / "stamps" / f"{name}.jsonl")}

    def classes(self) -> list[Sample]:
        """The names of the classes that may be trained on, in the place of pictures their prototypes."""
        return sources.read(self.made / "stamps" / "classes.jsonl", "classes", templates=("{}",))[: self.limit]

    def questions(self, split: str) -> list[Sample]:
        """Pictures of a Flickr8k split with the questions made of their captions."""
        path = self.made / f"questions-{split}.jsonl"
        return sources.read(f"{self.shards}/{split}-*.tar", questions=path)[: self.limit]

    @cached_property
    def _kinds(self) -> dict[str, str]:
        kinds: dict[str, str] = {}
        for split in ("train", "test"):
            for place, row in sources.json_lines(self.made / f"questions-{split}.jsonl"):
                for (question, _), kind in zip(row["questions"], row["kinds"], strict=True):
                    if kinds.setdefault(question, kind) != kind:
                        raise DataError(f"{place}: {question!r} is of two kinds: {kind} and {kinds[question]}")
        return kinds

    def kind(self, question: str, _answer: str) -> str:
        """What, color, how many, where or yes/no."""
        return self._kinds[question]


Numbers = dict[str, dict[str, Estimate | float]]
"""By section of the table, then by measure: with an interval where there is one."""


def recall_numbers(found: Recall) -> dict[str, Estimate | float]:
    """Rows of the table for a retrieval."""
    return {
        f"{way} R@{depth}": estimate
        for way, depths in (("text to image", found.text_to_image), ("image to text", found.image_to_text))
        for depth, estimate in depths.items()
    }


def answer_numbers(found: Mapping[str, Accuracy]) -> dict[str, Estimate | float]:
    """Rows of the table for answers, and what the best single answer to the same questions gets."""
    rows: dict[str, Estimate | float] = {}
    for kind, result in found.items():
        rows[kind] = result.accuracy
        rows[f'{kind}, always "{result.answer}"'] = result.floor
    return rows


def show(number: Estimate | float) -> str:
    """`0.203 (0.190 to 0.216)`, or `0.203` without an interval."""
    return str(number) if isinstance(number, Estimate) else f"{number:.3f}"


def markdown(numbers: Numbers) -> str:
    """One table of all sections."""
    lines = ["| | measure | value (95% interval) |", "|---|---|---|"]
    for section, rows in numbers.items():
        for place, (measure, number) in enumerate(rows.items()):
            lines.append(f"| {'' if place else section} | {measure} | {show(number)} |")
    return "\n".join(lines) + "\n"


def write(out: Path, numbers: Numbers, command: Sequence[str], seconds: float, **more: Any) -> None:
    """`OUT.json` with everything, `OUT.md` with the table."""
    shown = {
        section: {name: asdict(number) if isinstance(number, Estimate) else number for name, number in rows.items()}
        for section, rows in numbers.items()
    }
    report = {"numbers": shown, "command": " ".join(command), "seconds": round(seconds, 1), **more}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    out.with_suffix(".md").write_text(markdown(numbers), encoding="utf-8")
