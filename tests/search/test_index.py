"""The index finds what a plain comparison finds, and encodes only what it has to."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import QUERIES, WIDTH, Fake, names, paint, unit
from PIL import Image
from torch import Tensor

from blip2.errors import ConfigError, ImageError
from blip2.results import ImageFeatures
from blip2.search import ImageIndex, folder_index, nearest
from blip2.search.nearest import Query
from blip2.search.store import Collection


def index_of(vectors: Tensor, segments: int = 1) -> ImageIndex:
    """An index of made-up images `/00.png`, ... with these vectors, in so many segments."""
    collection = Collection("fake")
    for rows in np.array_split(np.arange(len(vectors)), segments):
        files = [(f"/{row:02}.png", 0, 0) for row in rows]
        collection = collection.plus(files, vectors[torch.from_numpy(rows)].half(), torch.zeros(len(rows), 3).byte())
    return ImageIndex(Fake(), collection)


# -- finding ----------------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1), count=st.integers(1, 40), k=st.integers(1, 50), kinds=st.integers(1, 40),
    text=st.text(min_size=1, max_size=5), segments=st.integers(1, 5),
)  # fmt: skip
def test_a_text_finds_what_numpy_finds_with_ties_in_the_order_of_paths(
    seed: int, count: int, k: int, kinds: int, text: str, segments: int
) -> None:
    draw = np.random.default_rng(seed)
    different = draw.standard_normal((kinds, QUERIES, WIDTH)).astype(np.float32)
    different /= np.linalg.norm(different, axis=-1, keepdims=True)
    stored = different.astype(np.float16).astype(np.float64)
    stored /= np.linalg.norm(stored, axis=-1, keepdims=True)
    which = draw.integers(kinds, size=count)  # images may be equal, and then tie
    index = index_of(torch.from_numpy(different[which]), min(segments, count))
    scores = np.einsum("nqe,e->nq", stored, Fake().embed_texts([text])[0].double().numpy()).max(1)[which]
    expected = sorted(range(count), key=lambda row: (-scores[row], row))[:k]
    hits = index.search(text, k)
    assert [hit.path for hit in hits] == [Path(f"/{row:02}.png") for row in expected]
    np.testing.assert_allclose([hit.score for hit in hits], scores[expected], atol=1e-6)  # float32


def test_equal_images_tie_exactly_wherever_they_stand() -> None:
    """Real widths, and rows at every place of a block: a score depends on its row alone."""
    vector = unit(torch.randn(32, 256, generator=torch.Generator().manual_seed(0)))
    text = unit(torch.randn(256, generator=torch.Generator().manual_seed(1)))
    for query in (Query(text, None), Query(None, vector), Query(text, vector)):
        scores = nearest.scores(vector.half().expand(2500, 32, 256).contiguous(), query)
        assert len(scores.unique()) == 1
    assert torch.allclose(scores[0].double(), ((vector @ text).max() + 1).double() / 2, atol=1e-3)  # half precision


@pytest.mark.parametrize("kind", ["text", "image", "both"])
def test_a_scan_is_off_by_less_than_the_margin_allows(kind: str) -> None:
    draw = torch.Generator().manual_seed(0)
    vectors = unit(torch.randn(1000, 16, 64, generator=draw)).half()
    text = unit(torch.randn(64, generator=draw)) if kind != "image" else None
    query = Query(text, unit(torch.randn(16, 64, generator=draw)) if kind != "text" else None, 0.3)
    rows = np.arange(3, 997)
    off = nearest.scan(vectors, rows, query) - nearest.scores(vectors[3:997], query).numpy()
    assert 0 < np.abs(off).max() < nearest.MARGIN / 2


def test_an_image_finds_itself_first_with_a_score_of_one(photos: Path) -> None:
    index = ImageIndex.build(Fake(), [photos])
    for path in sorted(photos.iterdir()):
        for query in (path, Image.open(path), path.read_bytes()):
            best = index.search(query, 2)[0]
            assert best.path == path
            assert best.score == pytest.approx(1, abs=1e-6)


def test_images_are_compared_query_by_query_and_both_ways_alike(photos: Path) -> None:
    index = ImageIndex.build(Fake(), [photos])
    one, two = sorted(photos.iterdir())[:2]
    vectors = [Fake().embed_images([Image.open(path)])[0] for path in (one, two)]
    expected = torch.nn.functional.cosine_similarity(*vectors, dim=-1).mean()
    scores = {hit.path: hit.score for hit in index.search(one, 99)}
    assert scores[two] == pytest.approx(float(expected), abs=1e-3)  # half precision
    assert scores[two] == pytest.approx({hit.path: hit.score for hit in index.search(two, 99)}[one], abs=1e-7)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_a_text_with_an_image_is_the_weighted_mean_of_both(photos: Path, weight: float) -> None:
    index = ImageIndex.build(Fake(), [photos])
    by_text = {hit.path: hit.score for hit in index.search("a dog", 99)}
    by_image = {hit.path: hit.score for hit in index.search(photos / "03.png", 99)}
    both = index.search("a dog", 99, image=photos / "03.png", weight=weight)
    for hit in both:
        assert hit.score == pytest.approx(weight * by_text[hit.path] + (1 - weight) * by_image[hit.path], abs=1e-6)
    assert [hit.score for hit in both] == sorted((hit.score for hit in both), reverse=True)


@pytest.mark.parametrize("patches", [False, True])
def test_reranking_orders_the_best_by_match_and_keeps_the_rest(photos: Path, tmp_path: Path, patches: bool) -> None:
    index = ImageIndex.build(Fake(), [photos], tmp_path / "index", patches=patches)
    if patches:
        for path in photos.iterdir():
            path.unlink()  # what is kept is enough
    plain = index.search("a dog", 12)
    hits = index.search("a dog", 12, rerank=5)
    greens = {hit.path: int(hit.path.stem) * 20 / 255 for hit in plain}
    log_odds = {p: float(torch.tensor(g, dtype=torch.float64).logit(eps=1e-6)) for p, g in greens.items()}
    expected = sorted(plain[:5], key=lambda hit: -(log_odds[hit.path] + hit.score))
    assert names(hits) == names(expected) + names(plain[5:])
    assert [hit.itm for hit in hits[:5]] == pytest.approx([greens[hit.path] for hit in expected])
    assert all(hit.itm is None for hit in hits[5:])
    assert {hit.path: hit.score for hit in hits} == {hit.path: hit.score for hit in plain}


def test_reranking_can_bring_up_an_image_from_below_k(photos: Path) -> None:
    index = ImageIndex.build(Fake(), [photos])
    assert names(index.search("a dog", 1, rerank=99)) == ["11.png"]
    assert index.search("a dog", 1, rerank=99)[0].itm == pytest.approx(220 / 255)


def test_queries_that_make_no_sense_are_named(photos: Path) -> None:
    index = ImageIndex.build(Fake(), [photos])
    for k, rerank, weight in ((0, 0, 0.5), (1, -1, 0.5), (1, 0, 1.5)):
        with pytest.raises(ConfigError, match=f"k is {k}, rerank {rerank}, weight {weight}"):
            index.search("a dog", k, rerank=rerank, weight=weight)
    with pytest.raises(ConfigError, match="re-ranking"):
        index.search(photos / "01.png", rerank=3)
    for image in (None, photos / "02.png"):
        with pytest.raises(ConfigError, match="search for a text"):
            index.search(image and photos / "01.png", image=image)
    with pytest.raises(ImageError, match=r"absent\.png: does not exist"):
        index.search(Path("absent.png"))
    (photos / "11.png").unlink()
    with pytest.raises(ImageError, match=r"11\.png: does not exist"):
        index.search("a dog", rerank=12)


def test_a_text_that_is_too_long_is_cut_and_that_is_said(photos: Path, caplog: pytest.LogCaptureFixture) -> None:
    index = ImageIndex.build(Fake(), [photos])
    assert len(index.search("dog " * 10_000, 3)) == 3
    assert "its last 9965 tokens are not read" in caplog.text


# -- building ---------------------------------------------------------------------------------------------------------


def same(one: ImageIndex, other: ImageIndex) -> bool:
    """Whether they find the same images with the same scores."""
    return all(one.search(text, 999) == other.search(text, 999) for text in ("a dog", "at night"))


@pytest.mark.parametrize("batch_size", [1, 5, 100])
def test_an_index_depends_neither_on_batches_nor_on_the_order_of_its_paths(photos: Path, batch_size: int) -> None:
    plain = ImageIndex.build(Fake(), [photos])
    shuffled = [photos / "07.png", *sorted(photos.iterdir(), reverse=True)]
    other = ImageIndex.build(Fake(), shuffled, batch_size=batch_size)
    assert other.paths == plain.paths == sorted(photos.iterdir())
    assert same(plain, other)


@pytest.mark.parametrize("kept", [False, True])
def test_images_that_cannot_be_read_are_left_out_and_named(photos: Path, tmp_path: Path, kept: bool) -> None:
    out = tmp_path / "index" if kept else None
    (photos / "05.png").write_text("no picture")
    index = ImageIndex.build(Fake(), [photos], out)
    assert len(index) == 11
    assert [failure.image.name for failure in index.failed] == ["05.png"]
    assert "05.png" not in names(index.search("a dog", 99))
    if out:
        assert ImageIndex.open(out, Fake()).failed == index.failed
    paint(photos, {"05.png": (1, 2, 3)})
    assert index.update().failed == ()
    (photos / "05.png").write_text("no picture")
    (photos / "06.png").write_text("nor this")
    index = index.update().update()
    assert ([f.image.name for f in index.failed], len(index)) == (["05.png", "06.png"], 10)
    with pytest.raises(ImageError, match=r"none of 1 images can be read.*05\.png"):
        ImageIndex.build(Fake(), [photos / "05.png"])


def test_an_image_that_the_model_refuses_fails_alone(photos: Path) -> None:
    class Picky(Fake):
        def encode(self, images: Any) -> ImageFeatures:
            if isinstance(images, Tensor) and bool((images[:, 0, 0, 0] == 3).any()):
                raise ImageError("is not to my taste")
            return super().encode(images)

    index = ImageIndex.build(Picky(), [photos])
    assert len(index) == 11
    assert [failure.image.name for failure in index.failed] == ["03.png"]


def test_a_link_that_leads_nowhere_fails_alone(photos: Path) -> None:
    (photos / "zz.png").symlink_to(photos / "absent.png")
    index = ImageIndex.build(Fake(), [photos])
    assert (len(index), [failure.image.name for failure in index.failed]) == (12, ["zz.png"])


@pytest.mark.parametrize("kept", [False, True])
def test_an_update_encodes_only_what_is_new_or_changed(photos: Path, tmp_path: Path, kept: bool) -> None:
    model = Fake()
    index = ImageIndex.build(model, [photos], tmp_path / "index" if kept else None)
    assert model.encoded == 12
    paint(photos, {"03.png": (9, 9, 9), "20.png": (1, 2, 3)})
    os.utime(photos / "04.png", ns=(5, 5))
    (photos / "00.png").unlink()
    seen: list[tuple[int, int]] = []
    updated = index.update(batch_size=2, progress=lambda *now: seen.append(now))
    assert model.encoded == 12 + 3
    assert seen == [(9, 12), (11, 12), (12, 12)]
    assert same(updated, ImageIndex.build(Fake(), [photos]))
    assert updated.paths == sorted(photos.iterdir())
    assert len(index) == 12  # the old one is as it was
    assert "00.png" in names(index.search("a dog", 99))


def test_paths_are_added_and_a_folder_that_is_away_keeps_its_images(photos: Path, tmp_path: Path) -> None:
    other = paint(tmp_path / "disk", {"a.png": (7, 7, 7)})
    index = ImageIndex.build(Fake(), [photos]).update([other])
    assert len(index) == 13
    other.rename(tmp_path / "elsewhere")
    assert len(index.update()) == 13
    (tmp_path / "elsewhere").rename(other)
    (other / "a.png").unlink()
    assert len(index.update()) == 12
    with pytest.raises(ImageError, match="nowhere: does not exist"):
        index.update([tmp_path / "nowhere"])


def test_progress_counts_failures_too(photos: Path) -> None:
    (photos / "00.png").write_text("no picture")
    seen: list[tuple[int, int]] = []
    ImageIndex.build(Fake(), [photos], batch_size=6, progress=lambda *now: seen.append(now))
    assert seen == [(0, 12), (6, 12), (12, 12)]
    with pytest.raises(ConfigError, match="batch_size is 0"):
        ImageIndex.build(Fake(), [photos], batch_size=0)


# -- folders ----------------------------------------------------------------------------------------------------------


def test_a_folder_is_encoded_once_and_then_only_what_changed(photos: Path, tmp_path: Path) -> None:
    model = Fake()
    kept = tmp_path / "cache" / "indexes"
    written: set[int] = set()
    for _ in range(2):
        assert len(folder_index(model, photos)) == 12
        written |= {entry.stat().st_mtime_ns for entry in kept.glob("*/[!.]*")}
    assert model.encoded == 12
    assert len(written) == 2  # the segment and the manifest: nothing changed, nothing was written again
    paint(photos, {"12.png": (1, 2, 3)})
    assert len(folder_index(model, photos)) == 13
    assert model.encoded == 13
    other = Fake("other")
    folder_index(other, photos)
    assert other.encoded == 13
    folder_index(model, photos)
    assert model.encoded == 13  # each model keeps its own
    assert len(list(kept.iterdir())) == 2


def test_a_damaged_cache_is_made_anew_and_one_that_cannot_be_written_is_no_obstacle(
    photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.WARNING)
    folder_index(Fake(), photos)
    (kept,) = (tmp_path / "cache" / "indexes").iterdir()
    (kept / "blip2-index.json").write_text("damaged")
    for expected in (12, 0):
        model = Fake()
        assert len(folder_index(model, photos)) == 12
        assert model.encoded == expected
    assert caplog.text == ""
    blocked = tmp_path / "file"
    blocked.touch()
    monkeypatch.setenv("BLIP2_CACHE", str(blocked))
    assert len(folder_index(Fake(), photos)) == 12
    assert "not kept for next time" in caplog.text


def test_without_the_cache_nothing_is_written(photos: Path, tmp_path: Path) -> None:
    assert len(folder_index(Fake(), photos, cache=False)) == 12
    assert not (tmp_path / "cache").exists()
