from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from test_verbs import run

from blip2.blip2 import Blip2
from blip2.errors import ImageError, PromptError
from blip2.search import ImageIndex

pytestmark = pytest.mark.usefixtures("photos")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLIP2_CACHE", str(tmp_path / "cache"))


def test_a_text_finds_the_pictures_of_a_folder_best_first(model: Blip2):
    hits = ImageIndex.build(model, ["holiday"]).search("a red dog")
    lines = run("search", "holiday", "a red dog").stdout.splitlines()
    assert lines == [f"holiday/{hit.path.name}\t{hit.score:.3f}" for hit in hits]


def test_a_picture_finds_itself(model: Blip2):
    lines = run("search", "holiday/", "--image", "holiday/b.jpg", "--top", "1", "--json").stdout.splitlines()
    assert [json.loads(line)["image"] for line in lines] == ["holiday/b.jpg"]
    assert model.identity == "tiny"


def test_the_best_are_judged_once_more(model: Blip2):
    hits = ImageIndex.build(model, ["holiday"]).search("a dog", 3, rerank=2)
    lines = run("search", "holiday", "a dog", "-k", "3", "--rerank", "2").stdout.splitlines()
    assert [len(line.split("\t")) for line in lines] == [3, 3, 2]
    assert lines[0].endswith(f"{hits[0].itm:.3f}")


@pytest.mark.usefixtures("model")
def test_a_second_search_encodes_no_image_again(monkeypatch: pytest.MonkeyPatch):
    first = run("search", "holiday", "a red dog").stdout

    def encoded(self: Blip2, images: object) -> None:
        raise AssertionError(f"{self.identity} encoded {images}")

    monkeypatch.setattr(Blip2, "embed_images", encoded)
    assert run("search", "holiday", "a red dog").stdout == first
    with pytest.raises(AssertionError, match="tiny encoded"):
        run("search", "holiday", "a red dog", "--no-cache")


@pytest.mark.usefixtures("model")
def test_a_broken_picture_is_named_and_the_exit_code_is_1():
    Path("holiday/b.jpg").write_bytes(b"no picture")
    result = run("search", "holiday", "a dog")
    assert result.exit_code == 1
    assert "b.jpg" in result.stderr
    assert len(result.stdout.splitlines()) == 2


@pytest.mark.parametrize("words", [[], ["a dog", "--image", "photo.jpg"]])
def test_exactly_one_query_is_wanted(words: list[str]):
    with pytest.raises(PromptError, match="--image"):
        run("search", "holiday", *words)


@pytest.mark.parametrize("place", ["holiday/*.jpg", "photo.jpg", "nowhere"])
def test_what_is_no_folder_is_refused_before_the_model_is_loaded(place: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("blip2.cli.search.open_model", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(ImageError, match=rf"{re.escape(place)}: is no folder"):
        run("search", place, "a dog")
