"""How texts are asked for when a model is measured: the paper's prompts and settings, by name.

`own` is the model as it is. `paper` is what the paper says, `lavis` what the public code does where that differs; both
give the words as the published models were trained to read them. Numbers are comparable within one protocol only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from blip2.errors import ConfigError
from blip2.text import published_question

if TYPE_CHECKING:
    from blip2.blip2 import Blip2

Name: TypeAlias = Literal["own", "paper", "lavis"]
NAMES: tuple[Name, ...] = ("own", "paper", "lavis")
TOP = 128  # of each query's best that the paper's retrieval re-ranks by matching


@dataclass(frozen=True)
class Writing:
    """How captions or answers are written.

    Attributes:
        prompt: what a caption starts from, or the template of a question; the model's own where None.
        options: keywords of `caption` and `ask`.
        published: whether questions are given as the published models were trained to read them.
    """

    name: str
    prompt: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    published: bool = False

    def settings(self, own: str) -> dict[str, Any]:
        """What a report says of it.

        Args:
            own: the model's own prompt.
        """
        return {"protocol": self.name, "prompt": own if self.prompt is None else self.prompt, **self.options}

    def question(self, text: str) -> str:
        """A question in the words that the model is asked."""
        return published_question(text) if self.published else text

    def with_options(self, options: Mapping[str, Any]) -> Writing:
        """With some options of a caller's own; the protocol's name says so."""
        changed = {name: value for name, value in options.items() if self.options.get(name) != value}
        if not changed:
            return self
        name = self.name if self.name == "own" else f"{self.name}, changed: {', '.join(sorted(changed))}"
        return dataclasses.replace(self, name=name, options={**self.options, **changed})


OWN = Writing("own")


def captioning(name: Name, model: Blip2) -> Writing:
    """Of captions: five beams, 8 to 30 tokens after "a photo of" (for models that were fine-tuned on COCO).

    Raises:
        ConfigError: no such protocol.
    Source: BLIP-2, table 7; LAVIS before December 2023, whose T5 counts the decoder's start token among the eight.
    """
    if _is_own(name):
        return OWN
    least = 7 if _reads_first(model) else 8
    options = {"num_beams": 5, "max_new_tokens": 30, "min_new_tokens": least, "length_penalty": 1.0}
    return Writing(name, "a photo of", options)


def answering(name: Name, model: Blip2) -> Writing:
    """Of short answers, zero-shot: five beams, at most 10 tokens, and a length penalty that favours short ones.

    The paper asks an OPT "Question: {} Answer:" and a Flan-T5 "Question: {} Short answer:", both at length penalty -1;
    LAVIS asks both the second, and OPT at 0.

    Raises:
        ConfigError: no such protocol.
    Source: BLIP-2, section 4.1; LAVIS, its evaluation of VQAv2.
    """
    if _is_own(name):
        return OWN
    t5 = _reads_first(model)
    short = t5 or name == "lavis"
    options = {
        "num_beams": 5,
        "max_new_tokens": 10,
        "min_new_tokens": 0 if t5 else 1,
        "length_penalty": -1.0 if t5 or name == "paper" else 0.0,
    }
    prompt = "Question: {} Short answer:" if short else "Question: {} Answer:"
    return Writing(name, prompt, options, published=True)


@dataclass(frozen=True)
class Ranking:
    """How pictures and texts are ranked.

    Attributes:
        top: how many of each query's best are ranked anew by matching; 0 for none.
        weight: of a match's logit beside the cosine.
        texts: `plain` as the model's own training reads captions, one for all that say the same; `published` as the
            published models read them, each caption a query of its own.
    """

    name: str
    top: int = 0
    weight: float = 1.0
    texts: Literal["plain", "published"] = "plain"


def ranking(name: Name, top: int | None = None, weight: float | None = None) -> Ranking:
    """Of retrieval: the cosine (ITC), then of each query's best 128 the matching logit (ITM) added to it.

    Args:
        top, weight: a caller's own.
    Raises:
        ConfigError: no such protocol.
    Source: BLIP-2, section 4.4.
    """
    base = Ranking(name) if _is_own(name) else Ranking(name, TOP, 1.0, "published")
    own = {key: value for key, value in (("top", top), ("weight", weight)) if value not in (None, getattr(base, key))}
    called = name if name == "own" or not own else f"{name}, changed: {', '.join(own)}"
    return dataclasses.replace(base, name=called, **own)


def _reads_first(model: Blip2) -> bool:
    """Whether its language model is an encoder-decoder, such as Flan-T5."""
    return model.tokenizer is not None and model.tokenizer.end is not None


def _is_own(name: str) -> bool:
    if name not in NAMES:
        raise ConfigError(f"no protocol {name!r}; there are {', '.join(NAMES)}")
    return name == "own"
