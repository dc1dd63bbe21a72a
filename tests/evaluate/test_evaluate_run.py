"""Evaluating a model: every picture encoded once, pairs instead of products, and nothing out of order."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from blip2.blip2 import Blip2
from blip2.data import sources
from blip2.data.sources import Prototype, Sample
from blip2.errors import ConfigError, DataError, ImageError
from blip2.evaluate import texts_of
from blip2.evaluate.run import cosines, encode, evaluate_answers, evaluate_retrieval, match_pairs
from blip2.results import ImageFeatures


def test_identical_captions_are_one_text_that_fits_all_its_pictures() -> None:
    samples = [Sample("x", Prototype(0), ("A dog .", "a dog", "a cat")), Sample("y", Prototype(1), ("A  dog",))]
    texts, fits = texts_of(samples)
    assert texts == ["a dog", "a cat"]
    assert fits.tolist() == [[True, True], [True, False]]
    assert texts_of(samples, clean=False)[0] == ["A dog .", "a dog", "a cat", "A  dog"]


def test_cosines_and_logits_of_pairs_are_those_of_match(model: Blip2, folder: Path) -> None:
    samples = sources.read(folder)
    texts, _ = texts_of(samples)
    features = encode(model, samples, batch_size=3)
    whole = model.match(features, texts)
    np.testing.assert_allclose(cosines(model, features, texts, batch_size=3), whole.itc, atol=1e-5)
    images, columns = (index.ravel() for index in np.indices((len(samples), len(texts))))
    for batch_size in (1, 5, 100):
        logits = match_pairs(model, features, texts, images, columns, batch_size=batch_size)
        ids = model.text_tokenizer.batch(texts)
        expected = model.match_logits(features, ids, torch.from_numpy(np.stack([images, columns], 1)))[:, 1]
        np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_retrieval_ranks_by_cosine_and_then_by_matching(model: Blip2, folder: Path) -> None:
    samples = sources.read(folder)
    seen: list[tuple[str, int, int]] = []
    found = evaluate_retrieval(
        model, samples, top=2, batch_size=3, progress=lambda what, done, total: seen.append((what, done, total))
    )
    assert list(found) == ["itc", "itm"]
    texts, fits = texts_of(samples)
    best = model.match(encode(model, samples), texts).itc.argmax(0)
    assert found["itc"].text_to_image[1].value == fits[best, np.arange(len(texts))].mean()
    assert [last for last in seen if last[0] == "images"] == [("images", 3, 4), ("images", 4, 4)]
    assert {what for what, _, _ in seen} == {"images", "texts", "pairs"}
    assert all(done <= total for _, done, total in seen)
    assert evaluate_retrieval(model, samples, top=2) == found


def test_answers_are_asked_in_the_order_of_samples_whatever_the_batch(model: Blip2, folder: Path) -> None:
    questions = folder / "questions.jsonl"
    names = ("white", "red", "green", "blue")
    rows = [{"id": name, "questions": [["what color is it?", name], ["is it square?", "yes"]]} for name in names]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    samples = sources.read(folder, questions=questions)
    for batch_size in (1, 3, 100):
        found, given = evaluate_answers(model, samples, batch_size=batch_size)
        assert given == [sample.id for sample in samples for _ in range(2)]
        assert found["other"].accuracy.value == 1.0
        assert (found["yes/no"].accuracy.value, found["yes/no"].floor) == (0.0, 1.0)


def test_a_picture_that_cannot_be_opened_is_named(model: Blip2, folder: Path) -> None:
    (folder / "green.png").write_bytes(b"no picture")
    with pytest.raises(ImageError, match=r"'green' .*green\.png"):
        encode(model, sources.read(folder))


def test_what_cannot_be_evaluated_is_an_error(model: Blip2) -> None:
    with pytest.raises(DataError, match="no samples"):
        encode(model, [])
    with pytest.raises(DataError, match="'x' is a class prototype"):
        encode(model, [Sample("x", Prototype(3), ("a dog",))])
    empty = torch.empty(0)
    mute = dataclasses.replace(model, text_tokenizer=None)
    with pytest.raises(ConfigError, match="no text side"):
        match_pairs(mute, ImageFeatures(empty, empty, empty), ["a"], np.zeros(1, np.int64), np.zeros(1, np.int64))
