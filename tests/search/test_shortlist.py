"""The shortlist by FAISS, with limits so low that a few images need one."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pictures import QUERIES, WIDTH, Fake, names, paint, rainbow, unit
from PIL import Image

from blip2.search import Hit, ImageIndex, nearest, shortlist, sketch
from blip2.search.nearest import Query
from blip2.search.store import MANIFEST, Collection, Store


@pytest.fixture
def low(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shortlist, "SCAN_LIMIT", 20 * QUERIES)


@pytest.fixture
def many(tmp_path: Path, low: None) -> Path:  # noqa: ARG001
    return rainbow(tmp_path / "photos", 90)


def test_a_large_index_is_searched_through_its_shortlist(many: Path, tmp_path: Path) -> None:
    index = ImageIndex.build(Fake(), [many], tmp_path / "index")
    assert index.collection.shortlist is not None
    plain = ImageIndex.build(Fake(), [many])
    for text in ("a dog", "at night", "by the water"):
        assert index.search(text, 5) == plain.search(text, 5)
    hits = index.search(many / "33.png", 5)
    assert hits == plain.search(many / "33.png", 5)
    assert hits[0].path == many / "33.png"
    assert names(index.search("a dog", 99)) == names(plain.search("a dog", 99))  # more than a shortlist gives


def test_it_follows_what_is_added_changed_and_deleted(many: Path, tmp_path: Path) -> None:
    out = tmp_path / "index"
    first = ImageIndex.build(Fake(), [many], out).collection.shortlist
    for path in sorted(many.iterdir())[::3]:
        path.unlink()
    paint(many, {"01.png": (99, 98, 97), **{f"new-{n}.png": (n, n, n) for n in range(5)}})
    index = ImageIndex.build(Fake(), [many], out)
    assert index.collection.shortlist == first  # those few are compared one by one
    plain = ImageIndex.build(Fake(), [many])
    assert index.search("a dog", 7) == plain.search("a dog", 7)
    paint(many, {f"new-{n}.png": (n, 3, n) for n in range(5, 25)})
    index = ImageIndex.build(Fake(), [many], out)
    assert index.collection.shortlist != first  # now they are in it too
    assert index.search("a dog", 7) == ImageIndex.build(Fake(), [many]).search("a dog", 7)
    assert len(list(out.glob("*.faiss"))) == 1


def test_a_picture_and_a_text_with_a_picture_find_what_comparing_all_finds(many: Path, tmp_path: Path) -> None:
    """With a condition, after deletions and additions, and where the picture is none of the index."""
    out = tmp_path / "index"
    ImageIndex.build(Fake(), [many], out)
    for path in sorted(many.iterdir())[::5]:
        path.unlink()
    paint(many, {f"new-{n}.png": (n, n, n) for n in range(3)})
    index, plain = ImageIndex.build(Fake(), [many], out), ImageIndex.build(Fake(), [many])
    other = Image.new("RGB", (2, 2), (1, 2, 3))
    for where in ([], ['path ~ "[2-8]*.png"']):
        for weight in (0.0, 0.3, 0.5, 1.0):
            given = {"image": other, "weight": weight, "where": where}
            assert index.search("a dog", 6, **given) == plain.search("a dog", 6, **given)
        assert index.search(other, 6, where=where) == plain.search(other, 6, where=where)
    assert index.search(many / "new-1.png", 1)[0].path == many / "new-1.png"


def test_a_picture_s_candidates_are_the_best_by_the_main_directions() -> None:
    """Real widths, pictures of a hundred kinds: of 3,000 images the nearest are among the sketch's 512."""
    draw = torch.Generator().manual_seed(0)
    kinds = unit(torch.randn(100, 16, 64, generator=draw))
    vectors = unit(kinds[torch.arange(3000) % 100] + 0.8 * unit(torch.randn(3000, 16, 64, generator=draw))).half()
    files = [(f"/{row}", 0, 0) for row in range(3000)]
    (segment,) = Collection("fake").plus(files, vectors, torch.zeros(3000, 3).byte()).segments
    known = sketch.Sketch.learned([segment])
    known.add([(segment, np.arange(3000))])
    text = unit(torch.randn(64, generator=draw))
    for row in range(20):
        seen = nearest.rounded(vectors[row].float())
        for query in (Query(None, seen), Query(text, seen, 0.5)):
            best = nearest.scores(vectors, query).topk(10).indices.tolist()
            near = known.near(query, 16, None, 10)
            assert len(near) == sketch.DEPTH
            assert len({*best} & {*near.tolist()}) >= 9  # of ten; which of a kind's thirty is best, noise decides


def test_an_index_without_a_sketch_compares_all_and_gets_one(many: Path, tmp_path: Path) -> None:
    """As indexes were before there was one."""
    out = tmp_path / "index"
    index = ImageIndex.build(Fake(), [many], out)
    manifest = json.loads((out / MANIFEST).read_text())
    name = manifest.pop("sketch")["name"]
    (out / MANIFEST).write_text(json.dumps(manifest))
    before = ImageIndex.open(out, Fake())
    assert before.collection.sketch is None
    assert before.search(many / "33.png", 5) == index.search(many / "33.png", 5)
    again = ImageIndex.build(Fake(), [many], out)
    assert again.collection.sketch is not None
    assert not (out / name).exists()
    assert again.search(many / "33.png", 5) == index.search(many / "33.png", 5)


def test_conditions_hold_in_the_shortlist(many: Path, tmp_path: Path) -> None:
    index = ImageIndex.build(Fake(), [many], tmp_path / "index")
    plain = ImageIndex.build(Fake(), [many])
    for where in (['path ~ "[2-8]*.png"'], ['path ~ "1*.png"'], ["size > 1GB"]):
        hits = index.search("a dog", 6, where=where)
        assert hits == plain.search("a dog", 6, where=where)
        assert len(hits) == (0 if "size" in where[0] else 6)


def test_without_faiss_everything_is_compared_and_that_is_said(
    many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with_it = ImageIndex.build(Fake(), [many], tmp_path / "index")
    monkeypatch.setitem(sys.modules, "faiss", None)
    without = ImageIndex.build(Fake(), [many], tmp_path / "other")
    assert without.collection.shortlist is None
    assert "all vectors are compared one by one: searching so many images fast needs" in caplog.text
    caplog.clear()
    opened = ImageIndex.open(tmp_path / "index", Fake())
    assert opened.search("a dog", 5) == with_it.search("a dog", 5) == without.search("a dog", 5)
    assert "all vectors are compared one by one: searching so many images fast needs" in caplog.text


def test_a_damaged_shortlist_is_named_done_without_and_made_again(
    many: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "index"
    index = ImageIndex.build(Fake(), [many], out)

    def given(index: ImageIndex) -> list[Hit]:
        return index.search("a dog", 5, image=many / "33.png")

    for kind, content in itertools.product(("shortlist", "sketch"), (b"words" * 20, None)):
        known = getattr(index.collection, kind)
        path = out / known.name
        whole = path.read_bytes()
        path.write_bytes((content or b"") + whole[100:]) if content else path.unlink()
        caplog.clear()
        assert given(ImageIndex.open(out, Fake())) == given(index)
        assert f"{path}: is missing or damaged" in caplog.text
        if content:
            path.write_bytes(whole[:-1])
        index = ImageIndex.build(Fake(), [many], out)
        assert getattr(index.collection, kind) != known
    caplog.clear()
    assert given(ImageIndex.open(out, Fake())) == given(index)
    assert caplog.text == ""


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(st.integers(0, 30), st.integers(0, 200), st.booleans()), min_size=1, max_size=60
    ),
    st.integers(1, 12), st.booleans(),
)  # fmt: skip
@pytest.mark.usefixtures("low")
def test_any_additions_changes_and_deletions_give_what_brute_force_gives(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int, bool]], k: int, filtered: bool
) -> None:
    """Scores as numpy computes them from the half-precision vectors, to float32's rounding."""
    store = Store(tmp_path_factory.mktemp("property") / "index")
    truth: dict[str, np.ndarray] = {}
    collection = Collection("fake")
    with store.alone():
        for place, kind, removed in changes:
            path = f"/{place:02}.png"
            if removed:
                truth.pop(path, None)
                collection = collection.without({path})
            else:
                draw = torch.Generator().manual_seed(kind)
                vectors = unit(torch.randn(1, QUERIES, WIDTH, generator=draw)).half()
                truth[path] = vectors[0].double().numpy()
                collection = collection.plus([(path, kind, 0)], vectors, torch.zeros(1, 3).byte())
            collection = shortlist.renewed(store, store.write(collection))
    index = ImageIndex.open(store.directory, Fake())
    assert [str(path) for path in index.paths] == sorted(truth)
    text = Fake().embed_texts(["a dog"])[0].double().numpy()
    wanted = [path for path in truth if not filtered or path < "/15"]
    scores = {p: (truth[p] / np.linalg.norm(truth[p], axis=-1, keepdims=True) @ text).max() for p in wanted}
    expected = sorted(scores.items(), key=lambda item: (-item[1], item[0]))[:k]
    where = ['path ~ "[01]*"', 'path !~ "1[5-9]*"'] if filtered else []
    hits = index.search("a dog", k, where=where)
    np.testing.assert_allclose([hit.score for hit in hits], [score for _, score in expected], atol=1e-6)
    assert {str(hit.path) for hit in hits} <= set(wanted)
