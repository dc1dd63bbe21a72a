"""The index finds what a plain comparison finds, and knows what it may keep."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from blip2 import search
from blip2.errors import ConfigError, DataError, ImageError
from blip2.results import Matches
from blip2.search import Hit, ImageIndex, folder_index

QUERIES, WIDTH = 3, 8


def unit(values: Tensor) -> Tensor:
    return torch.nn.functional.normalize(values, dim=-1)


class Fake:
    """Vectors drawn from an image's colour or a text's letters; a match is likelier the greener the image."""

    def __init__(self, identity: str = "fake") -> None:
        self.identity = identity
        self.encoded = 0

    def embed_images(self, images: list[Image.Image]) -> Tensor:
        self.encoded += len(images)
        seeds = [int.from_bytes(bytes(picture.getpixel((0, 0))), "big") for picture in images]  # pyright: ignore
        return torch.stack(
            [unit(torch.randn(QUERIES, WIDTH, generator=torch.Generator().manual_seed(s))) for s in seeds]
        )

    def embed_texts(self, texts: list[str]) -> Tensor:
        seeds = [sum(text.encode()) for text in texts]
        return torch.stack([unit(torch.randn(WIDTH, generator=torch.Generator().manual_seed(s))) for s in seeds])

    def match(self, images: list[Image.Image], texts: list[str]) -> Matches:
        green = [picture.getpixel((0, 0))[1] / 255 for picture in images]  # pyright: ignore
        itm = torch.tensor(green)[:, None].expand(-1, len(texts))
        return Matches(itm, torch.zeros_like(itm))


def paint(folder: Path, colours: dict[str, tuple[int, int, int]]) -> Path:
    for name, colour in colours.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (2, 2), colour).save(folder / name)
    return folder


def rainbow(folder: Path, count: int = 12) -> Path:
    return paint(folder, {f"{n:02}.png": (n, 20 * n, 255 - n) for n in range(count)})


def names(hits: list[Hit]) -> list[str]:
    return [hit.path.name for hit in hits]


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BLIP2_CACHE", str(tmp_path / "cache"))
    return rainbow(tmp_path / "photos")


# -- finding ----------------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1), count=st.integers(1, 40), k=st.integers(1, 50), kinds=st.integers(1, 40),
    text=st.text(min_size=1, max_size=5),
)  # fmt: skip
def test_a_text_finds_what_numpy_finds_with_ties_in_the_order_of_paths(
    seed: int, count: int, k: int, kinds: int, text: str
) -> None:
    draw = np.random.default_rng(seed)
    different = draw.standard_normal((kinds, QUERIES, WIDTH)).astype(np.float32)
    different /= np.linalg.norm(different, axis=-1, keepdims=True)
    which = draw.integers(kinds, size=count)  # images may be equal, and then tie
    stamps = {Path(f"/{n:02}.png"): (0, 0) for n in range(count)}
    index = ImageIndex(Fake(), stamps, torch.from_numpy(different[which]))
    cosines = np.einsum("nqe,e->nq", different.astype(np.float64), Fake().embed_texts([text])[0].double().numpy())
    scores = cosines.max(1)[which]
    expected = sorted(range(count), key=lambda row: (-scores[row], row))[:k]
    hits = index.search(text, k)
    assert [hit.path for hit in hits] == [Path(f"/{row:02}.png") for row in expected]
    np.testing.assert_allclose([hit.score for hit in hits], scores[expected], atol=1e-6)


def test_equal_images_tie_exactly_wherever_they_stand() -> None:
    """Real widths, and rows at every place of a block: a score depends on its row alone."""
    vector = unit(torch.randn(32, 256, generator=torch.Generator().manual_seed(0)))
    text = unit(torch.randn(256, generator=torch.Generator().manual_seed(1)))
    cosines = search._rows_dot(vector.expand(2500, 32, 256).contiguous(), text)  # pyright: ignore
    assert cosines.unique(dim=0).shape[0] == 1
    assert torch.allclose(cosines[0].double(), vector.double() @ text.double(), atol=1e-6)


def test_an_image_finds_itself_first_with_a_score_of_one(photos: Path) -> None:
    index = ImageIndex.build(Fake(), [photos])
    for path in sorted(photos.iterdir()):
        for query in (path, Image.open(path), path.read_bytes()):
            best = index.search(query, 2)[0]
            assert best.path == path
            assert best.score == pytest.approx(1, abs=1e-6)


def test_an_image_is_compared_query_by_query(photos: Path) -> None:
    index = ImageIndex.build(Fake(), [photos])
    one, two = sorted(photos.iterdir())[:2]
    vectors = [Fake().embed_images([Image.open(path)])[0] for path in (one, two)]
    expected = torch.nn.functional.cosine_similarity(*vectors, dim=-1).mean()
    scores = {hit.path: hit.score for hit in index.search(one, 99)}
    assert scores[two] == pytest.approx(float(expected), abs=1e-6)


def test_reranking_orders_the_best_by_match_and_keeps_the_rest(photos: Path) -> None:
    index = ImageIndex.build(Fake(), [photos])
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
    for k, rerank in ((0, 0), (1, -1)):
        with pytest.raises(ConfigError, match=f"k is {k} and rerank {rerank}"):
            index.search("a dog", k, rerank=rerank)
    with pytest.raises(ConfigError, match="re-ranking"):
        index.search(photos / "01.png", rerank=3)
    with pytest.raises(ImageError, match=r"absent\.png: does not exist"):
        index.search(Path("absent.png"))
    (photos / "11.png").unlink()
    with pytest.raises(ImageError, match=r"11\.png: does not exist"):
        index.search("a dog", rerank=12)


# -- building ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 5, 100])
def test_an_index_depends_neither_on_batches_nor_on_the_order_of_its_paths(photos: Path, batch_size: int) -> None:
    plain = ImageIndex.build(Fake(), [photos])
    other = ImageIndex.build(
        Fake(), [photos / "07.png", *sorted(photos.iterdir(), reverse=True)], batch_size=batch_size
    )
    assert list(other.stamps) == list(plain.stamps) == sorted(photos.iterdir())
    assert torch.equal(other.vectors, plain.vectors)


def test_images_that_cannot_be_read_are_left_out_and_named(photos: Path) -> None:
    (photos / "05.png").write_text("no picture")
    index = ImageIndex.build(Fake(), [photos])
    assert len(index) == 11
    assert [failure.image.name for failure in index.failed] == ["05.png"]
    assert "05.png" not in names(index.search("a dog", 99))
    with pytest.raises(ImageError, match=r"none of 1 images can be read.*05\.png"):
        ImageIndex.build(Fake(), [photos / "05.png"])


def test_a_link_that_leads_nowhere_fails_alone(photos: Path) -> None:
    (photos / "zz.png").symlink_to(photos / "absent.png")
    index = ImageIndex.build(Fake(), [photos])
    assert (len(index), [failure.image.name for failure in index.failed]) == (12, ["zz.png"])


def test_an_update_encodes_only_what_is_new_or_changed(photos: Path) -> None:
    model = Fake()
    index = ImageIndex.build(model, [photos])
    assert model.encoded == 12
    paint(photos, {"03.png": (9, 9, 9), "20.png": (1, 2, 3)})
    os.utime(photos / "04.png", ns=(5, 5))
    (photos / "00.png").unlink()
    seen: list[tuple[int, int]] = []
    updated = index.update([photos], batch_size=2, progress=lambda *now: seen.append(now))
    assert model.encoded == 12 + 3
    assert seen == [(9, 12), (11, 12), (12, 12)]
    anew = ImageIndex.build(Fake(), [photos])
    assert updated.stamps == anew.stamps
    assert torch.equal(updated.vectors, anew.vectors)
    assert len(index) == 12  # the old one is as it was
    assert "00.png" in names(index.search("a dog", 99))


def test_progress_counts_failures_too(photos: Path) -> None:
    (photos / "00.png").write_text("no picture")
    seen: list[tuple[int, int]] = []
    ImageIndex.build(Fake(), [photos], batch_size=6, progress=lambda *now: seen.append(now))
    assert seen == [(0, 12), (6, 12), (12, 12)]
    with pytest.raises(ConfigError, match="batch_size is 0"):
        ImageIndex.build(Fake(), [photos], batch_size=0)


# -- keeping ----------------------------------------------------------------------------------------------------------


def test_a_saved_index_comes_back_equal(photos: Path, tmp_path: Path) -> None:
    (photos / "ünïcode name.png").write_bytes((photos / "01.png").read_bytes())
    index = ImageIndex.build(Fake(), [photos])
    index.save(tmp_path / "photos.index")
    loaded = ImageIndex.load(tmp_path / "photos.index", Fake())
    assert loaded.stamps == index.stamps
    assert torch.equal(loaded.vectors, index.vectors)
    assert loaded.search("a dog", 5) == index.search("a dog", 5)
    assert loaded.update([photos]).model.encoded == 0  # pyright: ignore


def test_an_index_of_another_model_is_refused(photos: Path, tmp_path: Path) -> None:
    ImageIndex.build(Fake(), [photos]).save(tmp_path / "photos.index")
    with pytest.raises(DataError, match=r"photos\.index: was made by another model"):
        ImageIndex.load(tmp_path / "photos.index", Fake("other"))


def test_what_is_no_index_is_refused(photos: Path, tmp_path: Path) -> None:
    path = tmp_path / "photos.index"
    with pytest.raises(DataError, match=r"photos\.index: no such index"):
        ImageIndex.load(path, Fake())
    ImageIndex.build(Fake(), [photos]).save(path)
    whole = path.read_bytes()
    for content in (b"", b"words", whole[: len(whole) // 2], whole[:-1]):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"photos\.index: is no image index, or damaged"):
            ImageIndex.load(path, Fake())
    safetensors.torch.save_file({"vectors": torch.zeros(1, 1, 1)}, path)  # no metadata
    with pytest.raises(DataError, match="is no image index"):
        ImageIndex.load(path, Fake())
    about = '{"format": %d, "model": "fake", "images": [["/a.png", 1, 2]]}'
    for form, shape, problem in ((2, (1, 1, 1), "has format 2"), (1, (2, 1, 1), r"vectors \(2, 1, 1\) for 1 images")):
        safetensors.torch.save_file({"vectors": torch.zeros(shape)}, path, metadata={"index": about % form})
        with pytest.raises(DataError, match=problem):
            ImageIndex.load(path, Fake())


def test_an_index_is_written_whole_or_not_at_all(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = ImageIndex.build(Fake(), [photos])
    path = tmp_path / "photos.index"
    index.save(path)
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match=r"photos\.index: the index cannot be written \(No space left"):
        index.update([photos / "01.png"]).save(path)
    assert path.read_bytes() == before
    assert {entry.name for entry in tmp_path.iterdir()} == {"photos", "photos.index"}


def test_a_folder_is_encoded_once_and_then_only_what_changed(photos: Path, tmp_path: Path) -> None:
    model = Fake()
    written: set[int] = set()
    for _ in range(2):
        assert len(folder_index(model, photos)) == 12
        written |= {entry.stat().st_mtime_ns for entry in (tmp_path / "cache" / "indexes").iterdir()}
    assert model.encoded == 12
    assert len(written) == 1  # nothing changed: not written again
    paint(photos, {"12.png": (1, 2, 3)})
    assert len(folder_index(model, photos)) == 13
    assert model.encoded == 13
    other = Fake("other")
    folder_index(other, photos)
    assert other.encoded == 13
    folder_index(model, photos)
    assert model.encoded == 13  # each model keeps its own
    assert len(list((tmp_path / "cache" / "indexes").iterdir())) == 2


def test_a_damaged_cache_is_made_anew_and_one_that_cannot_be_written_is_no_obstacle(
    photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder_index(Fake(), photos)
    (kept,) = (tmp_path / "cache" / "indexes").iterdir()
    kept.write_text("damaged")
    model = Fake()
    assert len(folder_index(model, photos)) == 12
    assert model.encoded == 12
    blocked = tmp_path / "file"
    blocked.touch()
    monkeypatch.setenv("BLIP2_CACHE", str(blocked))
    assert len(folder_index(Fake(), photos)) == 12
    assert "not kept for next time" in caplog.text


def test_without_the_cache_nothing_is_written(photos: Path, tmp_path: Path) -> None:
    assert len(folder_index(Fake(), photos, cache=False)) == 12
    assert not (tmp_path / "cache").exists()
