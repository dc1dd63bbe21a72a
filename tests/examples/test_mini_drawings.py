"""Drawings with names, from a small made-up copy of Open Clip Art."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "mini"))

import drawings
import prepare
from drawings import Drawing, emoji_name, read_clip_art, read_emoji, with_article, write_drawings
from wordnet import WordNet

from blip2.data import sources

SVG = """<svg xmlns="http://www.w3.org/2000/svg" xmlns:dc="http://purl.org/dc/elements/1.1/"
 xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><metadata><rdf:RDF><dc:title>{title}</dc:title>
<dc:publisher><dc:title>dog key</dc:title></dc:publisher><dc:description>{text}</dc:description>
<dc:subject><rdf:Bag>{keywords}</rdf:Bag></dc:subject></rdf:RDF></metadata></svg>
"""


def square() -> Image.Image:
    """A red square in the middle of nothing."""
    picture = Image.new("RGBA", (60, 40))
    picture.paste((200, 0, 0, 255), (20, 10, 40, 30))
    return picture


def draw(root: Path, name: str, title: str, text: str = "", keywords: Sequence[str] = ()) -> None:
    """One drawing as the two packages lay it out."""
    svg, png = root / "svg" / f"{name}.svg", root / "png" / f"{name}.png"
    svg.parent.mkdir(parents=True, exist_ok=True)
    png.parent.mkdir(parents=True, exist_ok=True)
    bag = "".join(f"<rdf:li>{word}</rdf:li>" for word in keywords)
    svg.write_text(SVG.format(title=title, text=text, keywords=bag))
    square().save(png)


@pytest.fixture
def clip_art(tmp_path: Path) -> Path:
    root = tmp_path / "openclipart"
    draw(root, "animals/dog_01", "Dog 01", keywords=["animal"])
    draw(root, "animals/birds/goose", "goose", text="as the lion saw it")
    draw(root, "animals/leone", "leone felice")
    draw(root, "animals/long", "dog dog dog dog dog")
    draw(root, "food/cherry", "cherries")
    draw(root, "food/apple.2", "apple")
    draw(root, "shapes/heart", "apple")
    draw(root, "food/apple_v1.2", "")
    draw(root, "tools/none", "hammer")
    (root / "png/tools/none.png").unlink()
    draw(root, "tools/broken", "key")
    (root / "svg/tools/broken.svg").write_text("<svg")
    return root


def test_clip_art_is_what_has_a_short_english_name_and_a_picture(clip_art: Path, wordnet: WordNet):
    found = {drawing.id: (drawing.name, drawing.about) for drawing in read_clip_art(clip_art, wordnet)}
    assert {name for name, _ in found.values()} == {"dog", "goose", "cherries", "apple"}
    assert found["animals-birds-goose"] == ("goose", "animals birds goose as the lion saw it")
    assert "animal" in found["animals-dog_01"][1].split()


def test_nothing_is_drawn_that_names_what_is_held_out(clip_art: Path, wordnet: WordNet, tmp_path: Path):
    found = list(read_clip_art(clip_art, wordnet))
    rows = write_drawings(found, {"lion", "cherry"}, tmp_path, wordnet)
    assert sorted(row["noun"] for row in rows) == ["apple", "dog"]  # the goose's description mentions the lion
    assert rows[1]["captions"] == ["an apple", "a drawing of an apple"]


def test_the_drawing_fills_a_white_square(tmp_path: Path, wordnet: WordNet):
    (row,) = write_drawings([Drawing("d", "dog", "", square())], (), tmp_path, wordnet)
    with Image.open(tmp_path / "d.jpg") as picture:
        assert picture.size == (288, 288)
        assert picture.getpixel((2, 2)) == (255, 255, 255)
        red, green, blue = picture.getpixel((144, 144))
        assert red > 190
        assert max(green, blue) < 10
    assert row["id"] == "d"


def test_no_name_is_drawn_too_often_and_nothing_that_is_empty(tmp_path: Path, wordnet: WordNet):
    many = [Drawing(f"d{number}", "dog", "", square()) for number in range(drawings.PER_NAME + 3)]
    empty = Drawing("e", "frog", "", Image.new("RGBA", (9, 9)))
    assert len(write_drawings([empty, *many], (), tmp_path, wordnet)) == drawings.PER_NAME


def test_a_picture_of_too_many_pixels_is_left_out(tmp_path: Path, wordnet: WordNet, monkeypatch: pytest.MonkeyPatch):
    square().save(tmp_path / "large.png")
    found = [Drawing("d", "dog", "", tmp_path / "large.png")]
    monkeypatch.setattr(drawings, "_LARGEST", 60 * 40)
    assert len(write_drawings(found, (), tmp_path, wordnet)) == 1
    monkeypatch.setattr(drawings, "_LARGEST", 60 * 40 - 1)
    assert write_drawings(found, (), tmp_path, wordnet) == []
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60 * 20 - 1)  # Pillow refuses from twice as many on
    assert write_drawings(found, (), tmp_path, wordnet) == []


@pytest.mark.parametrize(
    "said",
    [
        "a dog",
        "an old dog",
        "a unicorn",
        "a one eyed frog",
        "red cherries",
        "scissors",
        "a lens",
        "a gas",
        "keys",
        "geese",
        "two dog in sunset",
        "a rose in geese",
        "roses in bloom",
        "key and hammer",
    ],
)
def test_one_thing_has_an_article(said: str, wordnet: WordNet):
    assert with_article(said.removeprefix("a ").removeprefix("an "), wordnet) == said


@pytest.mark.parametrize(
    ("letter", "name"),
    [("🐕", "dog"), ("🐶", "dog"), ("🚒", "fire engine"), ("🎺", "trumpet"), ("🩹", "adhesive bandage")]
    + [(letter, None) for letter in "😀😭👍🕐➡♈\u0378"],
)
def test_emoji_of_things_have_names(letter: str, name: str | None):
    assert emoji_name(ord(letter)) == name


def test_what_is_missing_says_what_to_install(tmp_path: Path, wordnet: WordNet):
    with pytest.raises(FileNotFoundError, match="apt install openclipart-svg openclipart-png"):
        list(read_clip_art(tmp_path, wordnet))
    with pytest.raises(FileNotFoundError, match="apt install fonts-noto-color-emoji"):
        list(read_emoji(tmp_path / "font.ttf"))


def test_the_command_writes_rows_that_train(
    clip_art: Path, wordnet: WordNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    emoji = [Drawing(f"emoji-{name}", name, "", square()) for name in ("frog", "apple frog", "key")]
    monkeypatch.setattr(prepare, "read_emoji", lambda _: emoji)
    monkeypatch.setattr(prepare, "HELD_OUT", 0.5)  # apple and key, of which a frog that is trained on names one
    held, out = tmp_path / "stamps", tmp_path / "out"
    held.mkdir()
    (held / "held-out-names.txt").write_text("lion\n")
    options = ["--source", str(clip_art), "--stamps", str(held), "--wordnet", str(wordnet.root), "--out", str(out)]
    prepare.main(["drawings", *options])
    rows, held_out = (
        [json.loads(line) for line in (out / name).read_text().splitlines()]
        for name in ("train.jsonl", "held-out.jsonl")
    )
    assert sorted(row["noun"] for row in rows) == ["cherry", "dog", "frog", "frog"]
    assert [row["noun"] for row in held_out] == ["key"]
    samples = sources.read(str(out / "train.jsonl"))
    assert [sample.id for sample in samples] == [row["id"] for row in rows]
    assert all(sample.captions for sample in samples)
