"""Zero-shot classification: of some labels, the one whose sentences fit an image best.

A label's vector is the mean of its sentences' unit vectors, made unit length again: one direction for all its wordings,
so that an image is compared with each label once. The cosine is then the best query's, as everywhere.
Letters: N images, L labels, S sentences of each, Q queries, E width of the image-text space.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias, TypedDict, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from blip2.errors import ConfigError, DataError, PromptError
from blip2.matching import match_all, probability
from blip2.one_or_many import Images
from blip2.results import Classification

if TYPE_CHECKING:
    from blip2.blip2 import Blip2

By: TypeAlias = Literal["itc", "itm"]


class How(TypedDict, total=False):
    """Keywords of `Blip2.classify`; each is explained in `Classifier.of`."""

    templates: Sequence[str] | None
    by: By


TEMPLATES = (
    "{}",
    "a {}",
    "a photo of a {}",
    "a picture of a {}",
    "this is a {}",
    "here you can see a {}",
    "a {} in front of something else",
    "a {} seen from nearby",
)
BARE = ("{}",)
AT_ONCE = 16  # images whose cosines with all labels are in memory together


@dataclass(frozen=True)
class Classifier:
    """Labels, read once, for any number of images.

    Attributes:
        by: `itc` compares vectors, which costs next to nothing an image; `itm` asks the matching head about each image
            with each sentence.
        vectors: float32[L, E], unit length.
        ids: int64[L * S, T], tokens of all sentences; by `itm` only.
    """

    model: Blip2
    labels: tuple[str, ...]
    by: By
    vectors: Tensor
    ids: Tensor

    @classmethod
    @torch.inference_mode()
    def of(
        cls, model: Blip2, labels: Sequence[str], templates: Sequence[str] | None = None, by: By = "itc"
    ) -> Classifier:
        """Read the labels in every template.

        Args:
            by: see `Classifier`.
            templates: sentences with `{}` where the label stands (`a {}` becomes `an {}` before a vowel); see
                `own_templates` where None.
        Raises:
            PromptError: fewer than two labels, an empty or a doubled one, or a template without `{}`.
            ConfigError: the model has no text side, or there is no such `by`.
        """
        if by not in get_args(By):
            raise ConfigError(f"by is {by!r}; use itc or itm")
        names = checked_labels(labels)
        frames = checked_templates(own_templates(model) if templates is None else templates)
        sentences = [worded(frame, name) for name in names for frame in frames]
        empty = torch.empty(0, device=model.device)
        if by == "itm":
            return cls(model, names, by, empty, model.text_ids(sentences))
        vectors = model.embed_texts(sentences).unflatten(0, (len(names), len(frames)))  # (L, S, E)
        return cls(model, names, by, F.normalize(vectors.mean(1), dim=-1), empty)

    @torch.inference_mode()
    def scores(self, images: Images) -> Tensor:
        """float32[N, L]: cosines by `itc`; by `itm` the probability that they match, of the mean logits of a label."""
        features = self.model.encode(images)
        if self.by == "itm":
            logits = match_all(self.model.bridge, features.patches, self.ids)  # (N, L * S, 2)
            return probability(logits.unflatten(1, (len(self.labels), -1)).mean(2), self.model.calibration)
        rows = self.model.embed_images(features).to(self.vectors.device).split(AT_ONCE)
        return torch.cat([torch.einsum("nqe,le->nql", some, self.vectors).amax(1) for some in rows])

    def classify(self, images: Images) -> list[Classification]:
        """Each image's labels with their scores."""
        return [Classification(self.labels, tuple(row)) for row in self.scores(images).tolist()]


def own_templates(model: Blip2) -> tuple[str, ...]:
    """`TEMPLATES`; or the bare label where a text's vector is the mean of its words, those of a template among them.

    On `mini`, whose is such a mean, they gain nothing: docs/matching.md.
    """
    return TEMPLATES if model.config.qformer.text_pooling == "cls" else BARE


def checked_labels(labels: Sequence[str]) -> tuple[str, ...]:
    """Labels without the space around them.

    Raises:
        PromptError: fewer than two, an empty one, or one that comes twice; models do not tell upper from lower case.
    """
    if isinstance(labels, str) or len(labels) < 2:
        raise PromptError(f"give a list of at least two labels to choose from, not {labels!r}")
    names = tuple(label.strip() for label in labels)
    seen: set[str] = set()
    for number, name in enumerate(names, start=1):
        if not name:
            raise PromptError(f"label {number} of {len(names)} is empty")
        if name.casefold() in seen:
            raise PromptError(f"the label {name!r} comes twice: leave one out, or say how the two differ")
        seen.add(name.casefold())
    return names


def checked_templates(templates: Sequence[str]) -> tuple[str, ...]:
    """The templates themselves.

    Raises:
        PromptError: none, or one without a place for the label.
    """
    if isinstance(templates, str) or not templates:
        raise PromptError(f"give a list of templates, such as 'a photo of a {{}}', not {templates!r}")
    for template in templates:
        if "{}" not in template:
            raise PromptError(f"the template {template!r} has no {{}}, where the label stands")
    return tuple(templates)


def worded(template: str, label: str) -> str:
    """A label in its sentence; nothing in the label is read as a place."""
    if label[0].lower() in "aeiou":
        template = re.sub(r"\b([aA]) \{\}", r"\1n {}", template)
    return template.replace("{}", label)


def read_labels(path: Path) -> list[str]:
    """Labels of a text file, one a line; empty lines are left out.

    Raises:
        DataError: it cannot be read as UTF-8 text.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text, a label a line: {error}") from None
    return [line.strip() for line in lines if line.strip()]
