"""Evaluating a model: every picture encoded once, pairs instead of products, and nothing out of order."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from blip2.blip2 import Blip2
from blip2.data import sources
from blip2.data.sources import Prototype, Sample
from blip2.errors import ConfigError, DataError, ImageError
from blip2.evaluate import protocols, run, texts_of
from blip2.evaluate.kept import keeping
from blip2.evaluate.run import cosines, encode, evaluate_retrieval, match_pairs, published_texts, rank_pictures
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


def test_the_paper_takes_each_caption_as_a_query_of_its_own_in_the_words_of_its_training() -> None:
    samples = [Sample("x", Prototype(0), ("A dog!", "a dog")), Sample("y", Prototype(1), ("A dog: brown",))]
    texts, fits = published_texts(samples)
    assert texts == ["a dog", "a dog", "a dog brown"]
    assert fits.tolist() == [[True, True, False], [False, False, True]]


@pytest.mark.parametrize("room", [0, 1 << 30])
def test_a_stopped_retrieval_goes_on_to_the_same_ranks(
    model: Blip2, folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    monkeypatch.setattr(run, "PATCHES_KEPT", room)
    samples = sources.read(folder)
    how = protocols.ranking("paper", top=2)
    whole = rank_pictures(model, samples, how, batch_size=1)
    out = tmp_path_factory.mktemp("kept") / "run"

    class StoppedError(Exception):
        pass

    def stop(what: str, done: int, _total: int) -> None:
        if what == "pairs" and done > 2:
            raise StoppedError

    with pytest.raises(StoppedError), keeping(out, {}) as kept:
        rank_pictures(model, samples, how, kept=kept, batch_size=1, progress=stop)
    before = {path: path.stat().st_mtime_ns for path in (out / "blocks").iterdir()}
    with keeping(out, {}) as kept:
        found = rank_pictures(model, samples, how, kept=kept, batch_size=1)
    assert found.recalls == whole.recalls
    np.testing.assert_array_equal(found.for_images, whole.for_images)
    np.testing.assert_array_equal(found.for_texts, whole.for_texts)
    assert 0 < len(before) < len(list((out / "blocks").iterdir()))
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())


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
