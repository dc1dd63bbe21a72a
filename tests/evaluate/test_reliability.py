"""Pairs are drawn as they should be, judged as the model judges them, and counted right."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from blip2.blip2 import Blip2
from blip2.data import sources
from blip2.errors import DataError
from blip2.evaluate.reliability import Pairs, drawn_pairs, judged, reliability


def made(probabilities: torch.Tensor, seed: int = 0) -> Pairs:
    """Pairs that match as often as is said of them, two a picture."""
    matches = torch.rand(len(probabilities), generator=torch.Generator().manual_seed(seed)) < probabilities
    return Pairs(torch.empty(len(matches), 2), matches, np.arange(len(matches)) // 2)


def test_half_of_the_pairs_match_and_the_others_never_do():
    fits = np.zeros((30, 60), dtype=bool)
    fits[np.arange(60) // 2, np.arange(60)] = True
    fits[:29, 7] = True  # a text of nearly all pictures
    rows, columns = drawn_pairs(fits)
    assert (np.diff(rows) >= 0).all()
    assert fits[rows, columns].sum() == fits.sum() == len(rows) / 2
    assert (drawn_pairs(fits, seed=1)[1] != columns).any()
    fits[3] = True
    with pytest.raises(DataError, match="no strangers"):
        drawn_pairs(fits)


def test_pairs_are_judged_as_match_does(model: Blip2, folder: Path):
    samples = sources.read(folder)
    calls: list[tuple[str, int, int]] = []
    found = judged(model, samples, batch_size=3, progress=lambda *call: calls.append(call))
    assert calls == [("pictures", 3, 4), ("pictures", 4, 4)]
    assert len(found.logits) == 4 * len(samples)  # two texts a picture, and as many others
    texts = {text for sample in samples for text in sample.captions}
    everything = model.match([str(sample.image) for sample in samples], sorted(texts)).itm.numpy()
    for row, logits, fits in zip(found.pictures, found.logits, found.matches, strict=True):
        own = [sorted(texts).index(text) for text in samples[row].captions]
        allowed = everything[row][own] if fits else np.delete(everything[row], own)
        assert min(abs(float(logits.softmax(-1)[1]) - float(each)) for each in allowed) < 1e-5
    with pytest.raises(DataError, match="'blue' has no text"):
        judged(model, [dataclasses.replace(samples[0], captions=())])


def test_numbers_are_those_worked_out_by_hand():
    said = torch.tensor([0.9, 0.9, 0.3, 0.3])
    pairs = Pairs(torch.empty(4, 2), torch.tensor([True, False, True, False]), np.array([0, 0, 1, 1]))
    found = reliability(said, pairs)
    assert found.nll.value == pytest.approx(-np.log([0.9, 0.1, 0.3, 0.7]).mean(), abs=1e-6)
    assert found.ece.value == pytest.approx((0.4 + 0.2) / 2, abs=1e-6)
    assert found.bins == ()  # of two pictures there is nothing to draw
    weighed = reliability(said, pairs, base_rate=0.75)
    assert weighed.ece.value == pytest.approx((abs(0.9 - 0.75) + abs(0.3 - 0.75)) / 2, abs=1e-6)
    assert reliability(torch.tensor([1.0, 0.0, 1.0, 1.0]), pairs).nll.value < 100  # wrong for certain, and yet finite


def test_probabilities_that_are_right_have_little_error_and_bins_on_the_diagonal():
    said = torch.rand(20_000, generator=torch.Generator().manual_seed(1))
    pairs = made(said)
    share = pairs.matches.double().mean().item()
    found = reliability(said, pairs, share)
    assert found.ece.value < 0.015  # 15 bins of 1,300 pairs: the mean absolute error of a share is 0.01
    assert len(found.bins) == 15
    assert all(each.share.low - 0.02 <= each.probability <= each.share.high + 0.02 for each in found.bins)
    wrong = reliability(said**3, pairs, share)
    assert wrong.ece.low > found.ece.high
    assert wrong.nll.value > found.nll.value
