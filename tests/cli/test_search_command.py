from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from test_readme import blocks, commands
from test_verbs import run

from blip2.blip2 import Blip2
from blip2.cli.dedupe import DUPLICATE
from blip2.errors import ConfigError, ImageError, PromptError
from blip2.search import ImageIndex
from blip2.search.index import DUPLICATE as DEFAULT

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

    monkeypatch.setattr(Blip2, "encode", encoded)
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


def test_some_query_is_wanted():
    with pytest.raises(PromptError, match="--image"):
        run("search", "holiday")


@pytest.mark.parametrize("place", ["holiday/*.jpg", "photo.jpg", "nowhere"])
@pytest.mark.parametrize("words", [("search", "a dog"), ("dedupe",)])
def test_what_is_no_folder_is_refused_before_the_model_is_loaded(
    place: str, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("blip2.cli.index.open_model", lambda *_: pytest.fail("the model was loaded"))
    command, *rest = words
    with pytest.raises(ImageError, match=rf"{re.escape(place)}: is neither an index nor a folder"):
        run(command, place, *rest)


# -- an index that is kept ---------------------------------------------------------------------------------------------


def test_an_index_is_made_and_searched(model: Blip2):
    made = run("index", "holiday", "--out", "kept")
    assert (made.stdout, made.stderr.splitlines()[-1]) == ("", "kept: 3 images")
    hits = ImageIndex.open("kept", model).search("a red dog")
    lines = run("search", "kept", "a red dog").stdout.splitlines()
    assert lines == [f"holiday/{hit.path.name}\t{hit.score:.3f}" for hit in hits]
    assert run("search", "holiday", "a red dog", "--no-cache").stdout.count("\n") == 3


@pytest.mark.usefixtures("model")
def test_indexing_again_takes_what_is_new_and_needs_no_paths(monkeypatch: pytest.MonkeyPatch):
    run("index", "holiday", "--out", "kept")
    Path("holiday/d.jpg").write_bytes(Path("photo.jpg").read_bytes())
    encoded: list[int] = []
    plain = Blip2.encode
    monkeypatch.setattr(
        Blip2, "encode", lambda self, images, *rest: encoded.append(len(images)) or plain(self, images, *rest)
    )
    assert json.loads(run("index", "--out", "kept", "--json").stdout) == {"index": "kept", "images": 4, "unreadable": 0}
    assert encoded[0] == 1


def test_an_index_knows_its_model(model: Blip2, monkeypatch: pytest.MonkeyPatch):
    asked: list[str] = []
    monkeypatch.setattr("blip2.cli.index.open_model", lambda name, *_: asked.append(name) or model)
    run("index", "holiday", "--out", "kept", "--model", "owner/name")
    run("search", "kept", "a dog")
    run("index", "--out", "kept")
    run("dedupe", "kept")
    run("search", "holiday", "a dog")
    run("search", "kept", "a dog", "--model", "other")
    assert asked == ["owner/name"] * 4 + ["mini", "other"]


@pytest.mark.usefixtures("model")
def test_an_unreadable_picture_is_recorded_and_named():
    Path("holiday/b.jpg").write_bytes(b"no picture")
    result = run("index", "holiday", "--out", "kept")
    assert result.exit_code == 1
    assert "b.jpg: is not an image" in result.stderr
    found = run("search", "kept", "a dog")
    assert (found.exit_code, len(found.stdout.splitlines())) == (1, 2)
    assert "b.jpg: is not an image" in found.stderr


@pytest.mark.usefixtures("model")
def test_what_cannot_be_indexed_is_refused_before_the_model_is_loaded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("blip2.cli.index.open_model", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(ImageError, match="nowhere: does not exist"):
        run("index", "nowhere", "--out", "kept")
    with pytest.raises(ImageError, match="no images found"):
        run("index", "--out", "kept")
    assert not Path("kept").exists()


@pytest.mark.usefixtures("model")
def test_words_and_a_picture_conditions_and_a_table_reach_the_index(model: Blip2):
    Path("table.csv").write_text("path,year\nholiday/a.jpg,2020\nholiday/b.jpg,2021\n")
    index = ImageIndex.build(model, ["holiday"])
    both = index.search("a dog", image="photo.jpg", weight=0.8)
    lines = run("search", "holiday", "a dog", "-i", "photo.jpg", "--weight", "0.8", "--json").stdout.splitlines()
    assert [json.loads(line)["score"] for line in lines] == pytest.approx([hit.score for hit in both])
    words = ("search", "holiday", "a dog", "--table", "table.csv")
    assert run(*words, "--where", "year >= 2021").stdout.startswith("holiday/b.jpg\t")
    assert run(*words, "--where", "year >= 2020", "--where", "path ~ [bc].jpg").stdout.count("\n") == 1
    assert run(*words, "--where", "year > 2021").stdout == ""
    with pytest.raises(ConfigError, match="'year': is no condition"):
        run(*words, "--where", "year")


@pytest.mark.usefixtures("model")
def test_a_long_text_is_cut_and_that_is_said(caplog: pytest.LogCaptureFixture):
    assert len(run("search", "holiday", "a dog on the beach " * 2000).stdout.splitlines()) == 3
    assert re.search(r"the text is too long for the model: its last \d+ tokens are not read", caplog.text)


@pytest.mark.usefixtures("model")
@pytest.mark.parametrize("text", ["Hund am Strand", "собака на пляже", "海辺の犬", "كلب على الشاطئ", "🐕🏖"])
def test_any_script_is_searched_for(text: str):
    assert len(run("search", "holiday", text).stdout.splitlines()) == 3


@pytest.mark.usefixtures("model")
@pytest.mark.parametrize("text", ["", "   "])
def test_a_search_for_nothing_is_refused(text: str):
    with pytest.raises(PromptError, match="the text to look for is empty"):
        run("search", "holiday", text)


@pytest.mark.usefixtures("model")
def test_a_page_shows_what_was_found():
    Path('holiday/a "b" <i>.jpg').write_bytes(Path("photo.jpg").read_bytes())
    result = run("search", "holiday", "a <b>dog</b>", "--top", "2", "--rerank", "2", "--html", "found.html")
    assert result.exit_code == 0
    content = Path("found.html").read_text(encoding="utf-8")
    assert content.count("data:image/jpeg;base64,") == 2
    assert "a &lt;b&gt;dog&lt;/b&gt;" in content
    assert "2 of 4 images, best first" in content
    assert "<b>dog" not in content
    assert "<i>" not in content
    for line in result.stdout.splitlines():
        assert f"{line.split()[-2]} · match {line.split()[-1]}" in content
    with pytest.raises(ConfigError, match="the folder nowhere does not exist"):
        run("search", "holiday", "a dog", "--html", "nowhere/found.html")


# -- near-duplicates ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("model")
def test_near_duplicates_are_printed_in_groups_and_stay():
    for name in ("d", "e"):
        Path(f"holiday/{name}.jpg").write_bytes(Path("holiday/b.jpg").read_bytes())
    before = sorted(Path("holiday").iterdir())
    result = run("dedupe", "holiday", "--threshold", "0.9999")
    assert result.stdout.splitlines() == [f"holiday/{name}.jpg\t1.000" for name in "bde"]
    assert result.stderr.splitlines()[-1] == "1 groups among 5 images"
    run("index", "holiday", "--out", "kept")
    (line,) = run("dedupe", "kept", "--threshold", "0.9999", "--json").stdout.splitlines()
    assert [Path(path).name for path in json.loads(line)["images"]] == ["b.jpg", "d.jpg", "e.jpg"]
    assert sorted(Path("holiday").iterdir()) == before


def test_the_command_and_the_verb_have_the_same_threshold():
    assert DUPLICATE == DEFAULT


@pytest.mark.usefixtures("model")
def test_what_the_page_about_search_shows_is_run():
    text = (Path(__file__).parents[2] / "docs" / "search.md").read_text(encoding="utf-8")
    shown = list(commands(text))
    assert len(shown) >= 9
    for words in shown:
        assert run(*words).exit_code == 0, words
    for snippet in blocks("python", text):
        exec(compile(snippet, "search.md", "exec"), {})
