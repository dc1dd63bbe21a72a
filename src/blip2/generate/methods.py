"""What a caller chooses and what comes back: frozen values."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from blip2.errors import ConfigError

EarlyStopping = bool | Literal["never"]


@dataclass(frozen=True)
class Greedy:
    """The most probable token at each step."""


@dataclass(frozen=True)
class Sample:
    """A token drawn from the distribution at each step.

    Attributes:
        temperature: divides the logits; below 1 is bolder, above 1 wilder.
        top_k: only the k most probable tokens, 0 for all.
        top_p: only the most probable tokens that together reach this probability (nucleus).
        seed: the same seed gives the same text for the same image, whatever else is in the batch; None for a fresh
            one a row, drawn from torch's global generator.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        _require(
            self.temperature > 0,
            f"temperature must be above 0, not {self.temperature}: leave it out for greedy decoding",
        )
        _require(self.top_k >= 0, f"top_k must be 0 (all tokens) or more, not {self.top_k}")
        _require(0 < self.top_p <= 1, f"top_p must be above 0 and at most 1, not {self.top_p}")


@dataclass(frozen=True)
class Beam:
    """Beam search with the semantics of transformers' `generate`.

    Attributes:
        width: number of beams.
        length_penalty: texts are ranked by the sum of their log-probabilities over length ** length_penalty: above 0
            favours longer texts, below 0 shorter ones.
        early_stopping: True ends a row at `width` finished texts; False when the best open beam, at its present
            length, no longer beats the worst of them; "never" when it could not at any length.
    """

    width: int = 5
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = False

    def __post_init__(self) -> None:
        _require(self.width >= 1, f"width must be at least 1, not {self.width}")
        _require(abs(self.length_penalty) <= 50, f"length_penalty must be from -50 to 50, not {self.length_penalty}")


@dataclass(frozen=True)
class BeamSample(Sample, Beam):
    """Beam search whose candidates are drawn, without replacement, instead of being the best."""

    def __post_init__(self) -> None:
        Sample.__post_init__(self)
        Beam.__post_init__(self)


Method = Greedy | Sample | Beam | BeamSample


@dataclass(frozen=True)
class Limits:
    """What holds for every method. Penalties see generated tokens only: a visual prefix has no ids.

    Attributes:
        max_new_tokens: where a text ends at the latest.
        min_new_tokens: how many tokens stand before one that ends the text.
        repetition_penalty: divides the positive and multiplies the negative scores of tokens that were generated
            (Keskar et al. 2019); 1 for none.
        no_repeat_ngram: no n tokens in a row occur twice; 0 for no such rule.
        captions: texts a row; at most the number of beams, and one for `Greedy`.
    """

    max_new_tokens: int = 30
    min_new_tokens: int = 0
    repetition_penalty: float = 1.0
    no_repeat_ngram: int = 0
    captions: int = 1

    def __post_init__(self) -> None:
        _require(self.max_new_tokens >= 1, f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        _require(
            0 <= self.min_new_tokens <= self.max_new_tokens,
            f"min_new_tokens must be between 0 and max_new_tokens ({self.max_new_tokens}), not {self.min_new_tokens}",
        )
        _require(self.repetition_penalty > 0, f"repetition_penalty must be above 0, not {self.repetition_penalty}")
        _require(self.no_repeat_ngram >= 0, f"no_repeat_ngram must be 0 (no rule) or more, not {self.no_repeat_ngram}")
        _require(self.captions >= 1, f"captions must be at least 1, not {self.captions}")


@dataclass(frozen=True)
class Tokens:
    """One generated sequence.

    Attributes:
        ids: without the token that ended it.
        log_probs: one a generated token, the ending one included, as `compute_transition_scores` of transformers
            gives them: under the distribution that the token was chosen from, after penalties, temperature, top-k
            and top-p. With beams they are not normalised again after those, so that they add up to the score.
        score: the sum of `log_probs` over length ** length_penalty; without beams the penalty is 1 (the mean).
        finish: `stop` where a stop token ended it, `length` where the limit did.
        end: that stop token, None where the limit did.
    """

    ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    score: float
    finish: Literal["stop", "length"]
    end: int | None


def tokens(ids: list[int], log_probs: list[float], stop_ids: tuple[int, ...], length_penalty: float = 1.0) -> Tokens:
    """A finished sequence from all its tokens, the ending one included."""
    score = math.fsum(log_probs) / len(ids) ** length_penalty
    if ids[-1] in stop_ids:
        return Tokens(tuple(ids[:-1]), tuple(log_probs), score, "stop", ids[-1])
    return Tokens(tuple(ids), tuple(log_probs), score, "length", None)


def check(method: Method, limits: Limits) -> None:
    """Raises ConfigError where method and limits do not fit together."""
    if isinstance(method, Beam):
        _require(
            limits.captions <= method.width,
            f"{limits.captions} captions need as many beams, and there are {method.width}: raise the number of beams",
        )
    elif isinstance(method, Greedy):
        _require(
            limits.captions == 1, f"greedy decoding gives one caption, not {limits.captions}: use beams or sampling"
        )


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)
