"""Captions chosen by how well they fit their image: write several, keep what the head believes (CapFilt).

Letters: N images, E width of the image-text space.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from blip2.decoding import Options
from blip2.errors import ConfigError
from blip2.matching import probability
from blip2.results import Generation, ImageFeatures

if TYPE_CHECKING:
    from blip2.blip2 import Blip2

By: TypeAlias = Literal["itm", "itc"]
PAIRS = 256  # that go through the matching head together


@dataclass(frozen=True)
class Choice:
    """How captions are chosen once they are written.

    Attributes:
        best_of: how many are written for each image, of which the best are kept; as many as are kept where None.
        by: what is best: the probability that text and image match (`itm`), or the cosine of their vectors (`itc`).
        threshold: what a kept caption reaches at least; None keeps the best, however bad.
    Source: Li et al. 2022, "BLIP", section 3.3.
    """

    best_of: int | None = None
    by: By = "itm"
    threshold: float | None = None

    def __post_init__(self) -> None:
        if self.by not in get_args(By):
            raise ConfigError(f"by is {self.by!r}; use itm or itc")
        if self.best_of is not None and self.best_of < 1:
            raise ConfigError(f"best_of is {self.best_of}; write at least one caption to keep one")

    @property
    def chooses(self) -> bool:
        """Whether anything is chosen at all."""
        return self.best_of is not None or self.threshold is not None

    def widened(self, options: Options) -> Options:
        """The keywords of a call, with as many captions as are written.

        Raises:
            ConfigError: fewer than are kept.
        """
        kept = options.get("num_captions", 1)
        if self.best_of is None:
            return options
        if self.best_of < kept:
            raise ConfigError(f"best_of is {self.best_of}, but num_captions {kept} are to be kept: write more")
        return {**options, "num_captions": self.best_of}

    def kept(self, rows: Sequence[Sequence[Generation]], count: int) -> list[list[Generation]]:
        """Of judged captions of each image the best `count` that reach the threshold, each wording once."""
        return [self._kept(row)[:count] for row in rows]

    def _kept(self, row: Sequence[Generation]) -> list[Generation]:
        found = {text.text: text for text in reversed(row)}.values() if self.chooses else row
        reach = [text for text in found if self.threshold is None or self._worth(text) >= self.threshold]
        return sorted(reach, key=lambda text: (-self._worth(text), -text.score)) if self.chooses else reach

    def _worth(self, text: Generation) -> float:
        worth = text.match if self.by == "itm" else text.cosine
        return -1.0 if worth is None else worth  # an empty text fits nothing


def judged(
    model: Blip2,
    features: ImageFeatures,
    counts: Sequence[int],
    rows: list[list[Generation]],
    choice: Choice,
    details: bool,
) -> list[list[Generation]]:
    """Captions with how well each fits its own image, where it is wanted: to choose, or as a detail if it can be told.

    Args:
        features: of N images.
        counts: images of each prompt.
        rows: of each prompt its captions.
    Raises:
        ConfigError: the model does not match, or a prompt has several images.
    """
    several = len(counts) != len(features)
    if not choice.chooses and (not details or several or not _matches(model)):
        return rows
    if several:
        raise ConfigError(
            "captions of several images together cannot be matched with one: leave best_of and threshold out"
        )
    texts = [(number, text.text) for number, row in enumerate(rows) for text in row if text.text]
    match, cosine = fits(model, features, [text for _, text in texts], [number for number, _ in texts])
    found = iter(zip(match.tolist(), cosine.tolist(), strict=True))

    def with_fit(text: Generation) -> Generation:
        if not text.text:
            return text
        itm, itc = next(found)
        return dataclasses.replace(text, match=itm, cosine=itc)

    return [[with_fit(text) for text in row] for row in rows]


def _matches(model: Blip2) -> bool:
    return model.text_tokenizer is not None and model.bridge.heads is not None


@torch.inference_mode()
def fits(model: Blip2, features: ImageFeatures, texts: Sequence[str], images: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Texts, each with one image: probabilities float32[K] that they match (ITM) and cosines float32[K] (ITC).

    Args:
        texts: K, none of them empty.
        images: K places in `features`.
    Raises:
        ConfigError: the model has no text side or no matching head.
        PromptError: a text is empty.
    """
    match, cosine = [torch.empty(0)], [torch.empty(0)]
    for start in range(0, len(texts), PAIRS):
        ids = model.text_ids(texts[start : start + PAIRS])
        rows = torch.tensor(images[start : start + PAIRS])
        pairs = torch.stack([rows, torch.arange(len(rows))], dim=1)
        match.append(probability(model.match_logits(features, ids, pairs), model.calibration).cpu())
        own = model.embed_images(features)[rows.to(features.vectors.device)].to(model.device)  # (K, Q, E)
        cosine.append(torch.einsum("kqe,ke->kq", own, model.bridge.text_vectors(ids)).amax(1).cpu())
    return torch.cat(match), torch.cat(cosine)
