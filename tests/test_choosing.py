"""Captions chosen by matching: the best of several, none below a threshold, and how sure the models are."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from blip2.blip2 import Blip2
from blip2.choosing import Choice, fits
from blip2.errors import ConfigError
from blip2.results import Generation
from tiny_model import build, picture

DRAWN = {"top_p": 0.9, "seed": 3, "max_new_tokens": 4}


@pytest.fixture(scope="module")
def model() -> Blip2:
    return build()


def said(text: str, match: float | None, cosine: float = 0.0, score: float = 0.0) -> Generation:
    return Generation(text, (), (), score, "stop", match, cosine)


@pytest.mark.parametrize("by", ["itm", "itc"])
def test_the_best_of_several_is_the_one_that_match_finds_best(model: Blip2, by: str):
    photos = [picture(seed) for seed in range(3)]
    several = model.caption(photos, num_captions=6, **DRAWN)
    chosen = model.caption(photos, best_of=6, by=by, **DRAWN)
    for photo, texts, best in zip(photos, several, chosen, strict=True):
        spoken = list(dict.fromkeys(text for text in texts if text))
        worth = getattr(model.match(photo, spoken), by)[0]
        assert worth[spoken.index(best)] >= worth.max() - 1e-5  # sums in another order
    two = model.caption(photos, best_of=6, by=by, num_captions=2, **DRAWN)
    assert [texts[0] for texts in two] == chosen
    assert model.caption(photos[0], best_of=6, by=by, **DRAWN) == chosen[0]
    beams = model.caption(photos[0], num_captions=7)
    assert model.caption(photos[0], best_of=7, by=by) in beams


def test_what_does_not_reach_the_threshold_is_left_out(model: Blip2):
    photos = [picture(seed) for seed in range(3)]
    found = model.caption(photos, num_captions=4, best_of=4, details=True)
    middle = sorted(text.match for texts in found for text in texts)[5]
    kept = model.caption(photos, num_captions=4, best_of=4, threshold=middle, details=True)
    assert [len(texts) for texts in kept] == [sum(text.match >= middle for text in texts) for texts in found]
    assert model.caption(photos, threshold=2.0) == [None] * 3
    assert model.caption(photos[0], threshold=2.0) is None
    assert model.caption(photos, threshold=0.0) == model.caption(photos)
    assert model.caption(photos[0], num_captions=2, threshold=2.0) == []


def test_each_wording_comes_once_and_an_empty_one_last():
    row = [said("a dog", 0.5, score=-2), said("", None), said("a cat", 0.7), said("a dog", 0.5, score=-1)]
    assert [text.text for text in Choice(best_of=4).kept([row], 4)[0]] == ["a cat", "a dog", ""]
    assert [text.text for text in Choice(threshold=0.6).kept([row], 4)[0]] == ["a cat"]
    assert Choice().kept([row], 4) == [row]
    by_cosine = [said("a dog", 0.1, 0.9), said("a cat", 0.9, 0.1)]
    assert Choice(best_of=2, by="itc").kept([by_cosine], 1)[0][0].text == "a dog"


def test_details_tell_how_sure_both_models_are(model: Blip2):
    found = model.caption([picture(0), picture(1)], details=True)
    for photo, text in zip((picture(0), picture(1)), found, strict=True):
        matches = model.match(photo, text.text)
        assert text.match == pytest.approx(matches.itm.item(), abs=1e-5)
        assert text.cosine == pytest.approx(matches.itc.item(), abs=1e-5)
        assert text.confidence == pytest.approx(math.exp(sum(text.log_probs) / len(text.log_probs)))
        assert 0 < text.confidence < 1
    assert said("", None).confidence == 0
    mute = build(heads=False)
    assert mute.caption(picture(0), details=True).match is None
    together = model.caption([[picture(0), picture(1)]], "<image> <image>", details=True)
    assert together[0].match is None


def test_fits_are_those_of_match_however_many_there_are(model: Blip2, monkeypatch: pytest.MonkeyPatch):
    features = model.encode([picture(seed) for seed in range(3)])
    texts, images = ["a dog", "a red cat", "the beach", "no", "yes"], [2, 0, 1, 1, 2]
    matches = model.match(features, texts)
    for together in (2, 256):
        monkeypatch.setattr("blip2.choosing.PAIRS", together)
        match, cosine = fits(model, features, texts, images)
        torch.testing.assert_close(match, matches.itm[images, range(5)], atol=1e-5, rtol=1e-4)  # sums in another order
        torch.testing.assert_close(cosine, matches.itc[images, range(5)], atol=1e-5, rtol=1e-4)
    assert [len(part) for part in fits(model, features, [], [])] == [0, 0]


def test_choices_that_cannot_be_are_refused(model: Blip2):
    for options, message in (
        ({"best_of": 0}, "best_of is 0"),
        ({"best_of": 2, "num_captions": 3}, "best_of is 2, but num_captions 3"),
        ({"by": "beauty"}, "by is 'beauty'; use itm or itc"),
        ({"best_of": 2, "stream": True}, "a choice are for whole texts|cannot stream"),
    ):
        with pytest.raises(ConfigError, match=message):
            model.caption(picture(0), **options)
    with pytest.raises(ConfigError, match="several images together"):
        model.caption([[picture(0), picture(1)]], "<image> <image>", best_of=2)
    with pytest.raises(ConfigError, match=r"no text side|no matching heads"):
        dataclasses.replace(build(heads=False), text_tokenizer=None).caption(picture(0), best_of=2)
