"""The paper's settings, by name."""

from __future__ import annotations

import dataclasses

import pytest

import tiny_model
from blip2.blip2 import Blip2
from blip2.errors import ConfigError
from blip2.evaluate import protocols
from blip2.evaluate.writing import write_captions


@pytest.fixture(scope="module")
def opt() -> Blip2:
    return tiny_model.build()


@pytest.fixture(scope="module")
def t5(opt: Blip2) -> Blip2:
    """What tells an encoder-decoder: it reads an end of its prompt."""
    assert opt.tokenizer is not None
    return dataclasses.replace(opt, tokenizer=dataclasses.replace(opt.tokenizer, end=tiny_model.SEP))


def test_captions_are_those_of_the_paper(opt: Blip2, t5: Blip2) -> None:
    how = protocols.captioning("paper", opt)
    assert (how.prompt, how.options) == (
        "a photo of",
        {"num_beams": 5, "max_new_tokens": 30, "min_new_tokens": 8, "length_penalty": 1.0},
    )
    assert protocols.captioning("lavis", t5).options["min_new_tokens"] == 7
    assert protocols.captioning("own", opt) == protocols.OWN


@pytest.mark.parametrize(
    ("name", "reads_first", "prompt", "penalty"),
    [
        ("paper", False, "Question: {} Answer:", -1.0),
        ("paper", True, "Question: {} Short answer:", -1.0),
        ("lavis", False, "Question: {} Short answer:", 0.0),
        ("lavis", True, "Question: {} Short answer:", -1.0),
    ],
)
def test_questions_are_asked_as_the_paper_or_its_code_does(
    opt: Blip2, t5: Blip2, name: protocols.Name, reads_first: bool, prompt: str, penalty: float
) -> None:
    how = protocols.answering(name, t5 if reads_first else opt)
    assert (how.prompt, how.options["length_penalty"]) == (prompt, penalty)
    assert (how.options["num_beams"], how.options["max_new_tokens"]) == (5, 10)
    assert how.question("What's (roughly) THIS?") == "what's roughly this?"


def test_retrieval_is_that_of_the_paper() -> None:
    assert protocols.ranking("paper") == protocols.Ranking("paper", 128, 1.0, "published")
    assert protocols.ranking("paper", top=16, weight=1.0).name == "paper, changed: top"
    assert protocols.ranking("own", top=16).name == "own"


def test_own_options_are_said_in_the_name(opt: Blip2) -> None:
    how = protocols.captioning("paper", opt)
    assert how.with_options({"num_beams": 5}) == how
    changed = how.with_options({"num_beams": 3})
    assert changed.name == "paper, changed: num_beams"
    assert changed.settings("own prompt")["num_beams"] == 3
    assert protocols.OWN.settings("own prompt")["prompt"] == "own prompt"


def test_a_protocol_that_is_not_there_is_an_error() -> None:
    with pytest.raises(ConfigError, match="no protocol 'fast'; there are own, paper, lavis"):
        protocols.ranking("fast")  # pyright: ignore[reportArgumentType]


def test_a_real_model_writes_by_the_protocol(opt: Blip2, tmp_path) -> None:
    from PIL import Image

    from blip2.data.sources import ImageRef, Sample

    Image.fromarray(tiny_model.picture(0)).save(tmp_path / "x.png")
    sample = Sample("x", ImageRef(tmp_path / "x.png"), ("a dog",))
    how = protocols.captioning("paper", opt).with_options({"num_beams": 2, "max_new_tokens": 9})
    (found,) = write_captions(opt, [sample], how)
    expected = opt.caption(
        tmp_path / "x.png",
        "a photo of",
        num_beams=2,
        max_new_tokens=9,
        min_new_tokens=8,
        length_penalty=1.0,
        details=True,
    )
    assert (found.text, found.score) == (expected.text, expected.score)
    assert len(expected.ids) >= 8
