"""The keywords of the verbs that write text, and the frozen values that they become."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TypedDict, Unpack

from blip2.errors import ConfigError
from blip2.generate import Beam, BeamSample, Greedy, Limits, Method, Sample

BEAMS = 5  # as published, for captions and answers


class Options(TypedDict, total=False):
    """Keywords of `caption`, `ask` and `chat`; each is explained in `Decoding`."""

    num_beams: int
    do_sample: bool
    temperature: float
    top_k: int
    top_p: float
    seed: int
    max_new_tokens: int
    min_new_tokens: int
    repetition_penalty: float
    no_repeat_ngram: int
    length_penalty: float
    early_stopping: bool
    num_captions: int


@dataclass(frozen=True)
class Decoding:
    """How text is chosen.

    Attributes:
        num_beams: hypotheses kept side by side; 1 is greedy.
        do_sample: draw tokens instead of taking the likeliest; on by itself where `temperature`, `top_k` or `top_p`
            is given.
        temperature: above 1 more varied, below 1 safer.
        top_k: draw among the k likeliest tokens only; 0 is all.
        top_p: draw among the likeliest tokens that together hold this probability.
        seed: of the draws; the same seed gives the same text, whatever else is in the batch. None draws anew each time.
        max_new_tokens, min_new_tokens: bounds of the text's length in tokens.
        repetition_penalty: above 1 makes tokens that were written less likely.
        no_repeat_ngram: no run of so many tokens comes twice; 0 is off.
        length_penalty: a beam's score is divided by length to this power.
        early_stopping: beams stop when enough are finished, even if a longer one could still score higher.
        num_captions: texts for each image, best first.
    """

    num_beams: int = 1
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    max_new_tokens: int = 30
    min_new_tokens: int = 0
    repetition_penalty: float = 1.0
    no_repeat_ngram: int = 0
    length_penalty: float = 1.0
    early_stopping: bool = False
    num_captions: int = 1

    @classmethod
    def of(cls, options: Options, **defaults: Unpack[Options]) -> Decoding:
        """The keywords of a call over a verb's defaults; drawing keywords switch the default beams off.

        Raises:
            ConfigError: a keyword that does not exist or does not fit with another, by name.
        """
        unknown = sorted(set(options) - set(cls.__dataclass_fields__))
        if unknown:
            raise ConfigError(f"unknown option {unknown[0]!r}; known are {', '.join(cls.__dataclass_fields__)}")
        drawing = [key for key in ("temperature", "top_k", "top_p") if key in options]
        draws = options.get("do_sample", bool(drawing))
        if drawing and not draws:
            raise ConfigError(f"{drawing[0]} is for drawing tokens, and do_sample is False: leave out one of the two")
        beams = 1 if draws else max(defaults.get("num_beams", 1), options.get("num_captions", 1))
        choice = dataclasses.replace(dataclasses.replace(cls(**defaults), num_beams=beams, do_sample=draws), **options)
        if not draws and choice.num_captions > choice.num_beams:
            raise ConfigError(
                f"num_captions is {choice.num_captions} but num_beams {choice.num_beams}: "
                "ask for at least as many beams, or draw with do_sample=True"
            )
        return choice

    @property
    def method(self) -> Method:
        """The decoding method as `generate` takes it."""
        if not self.do_sample:
            if self.num_beams == 1:
                return Greedy()
            return Beam(self.num_beams, self.length_penalty, self.early_stopping)
        sample = Sample(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=self.top_k or 0,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=self.seed,
        )
        if self.num_beams == 1:
            return sample
        return BeamSample(
            width=self.num_beams,
            length_penalty=self.length_penalty,
            early_stopping=self.early_stopping,
            **dataclasses.asdict(sample),
        )

    @property
    def limits(self) -> Limits:
        """The bounds as `generate` takes them."""
        return Limits(
            max_new_tokens=self.max_new_tokens,
            min_new_tokens=self.min_new_tokens,
            repetition_penalty=self.repetition_penalty,
            no_repeat_ngram=self.no_repeat_ngram,
            captions=self.num_captions,
        )
