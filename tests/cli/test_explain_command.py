"""`blip2 explain` on the tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from test_readme import blocks, commands
from test_verbs import run

import tiny_model
from blip2 import explain
from blip2.blip2 import Blip2
from blip2.errors import ConfigError, ImageError, PromptError

TEXT = (Path(__file__).parents[2] / "docs" / "explain.md").read_text(encoding="utf-8")
pytestmark = pytest.mark.usefixtures("photos")


def test_a_match_is_explained_word_by_word_and_drawn(model: Blip2):
    result = run("explain", "photo.jpg", "a red dog", "--out", "map.png")
    found = explain.match(model, "photo.jpg", "a red dog")
    lines = result.stdout.splitlines()
    assert lines[0] == f"a red dog\t{found.probability:.3g}"
    assert lines[1:] == [f"{word.text}\t{word.score:+.3f}" for word in found.words]
    with Image.open("map.png") as drawn:
        assert drawn.size == explain.draw(Image.open("photo.jpg"), found).size


def test_all_maps_as_numbers(model: Blip2):
    line = json.loads(run("explain", "photo.jpg", "a red dog", "--json").stdout)
    found = explain.match(model, "photo.jpg", "a red dog")
    assert found.evidence is not None
    assert (line["image"], line["kind"], line["text"]) == ("photo.jpg", "matched", "a red dog")
    grid = found.places.grid(found.evidence).flatten().tolist()
    assert [value for row in line["evidence"]["grid"] for value in row] == pytest.approx(grid, rel=1e-4)
    assert line["evidence"]["beside"] == [
        {"name": "class token", "value": pytest.approx(found.evidence[0].item(), rel=1e-4)}
    ]
    assert [word["word"] for word in line["words"]] == ["a", "red", "dog"]
    assert len(line["queries"]) == 4
    assert len(line["queries"][0]["grid"]) == 4


def test_without_a_text_the_queries_are_shown(model: Blip2):
    lines = run("explain", "photo.jpg", "--out", "queries.png").stdout.splitlines()
    rest = explain.queries(model, "photo.jpg").attention[:, 0]
    assert lines == [f"query {number}\t{1 - share:.3f}" for number, share in enumerate(rest.tolist())]
    assert Path("queries.png").exists()
    line = json.loads(run("explain", "photo.jpg", "--json").stdout)
    assert (line["kind"], line["evidence"], line["words"]) == ("queries", None, [])


def test_captions_and_answers_are_written_and_explained(model: Blip2):
    assert run("explain", "photo.jpg", "--caption").stdout.startswith(f"{model.caption('photo.jpg')}\t")
    said = run("explain", "photo.jpg", "--question", "what is this?", "--out", "a.webp").stdout
    assert said.startswith(f"{model.ask('photo.jpg', 'what is this?')}\t")


def test_the_layer_and_what_is_drawn_can_be_chosen():
    run("explain", "photo.jpg", "a red dog", "--out", "evidence.png")
    run("explain", "photo.jpg", "a red dog", "--attention", "--layer", "0", "--out", "attention.png")
    assert Path("evidence.png").read_bytes() != Path("attention.png").read_bytes()
    with pytest.raises(ConfigError, match="layer 5"):
        run("explain", "photo.jpg", "a red dog", "--layer", "5")


def test_a_long_text_is_cut_and_said_so():
    result = run("explain", "photo.jpg", "dog " * 10_000)
    assert "longer than what the model reads" in result.stderr
    assert len(result.stdout.splitlines()) == 34


def test_a_model_that_only_writes_says_what_it_can_show(monkeypatch: pytest.MonkeyPatch, model: Blip2):
    writer = tiny_model.build(heads=False)
    monkeypatch.setattr("blip2.cli.explain.open_model", lambda *_: writer)
    with pytest.raises(ConfigError, match="leave the text out"):
        run("explain", "photo.jpg", "a dog")
    assert len(run("explain", "photo.jpg").stdout.splitlines()) == model.config.qformer.queries


def test_what_makes_no_sense_is_refused_before_the_model_is_loaded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("blip2.cli.explain.open_model", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(ConfigError, match="do not go together"):
        run("explain", "photo.jpg", "a dog", "--caption")
    with pytest.raises(ConfigError, match="--attention is of the words"):
        run("explain", "photo.jpg", "--caption", "--attention")
    with pytest.raises(ConfigError, match="nowhere"):
        run("explain", "photo.jpg", "a dog", "--out", "nowhere/map.png")
    with pytest.raises(ConfigError, match=r"map\.xyz"):
        run("explain", "photo.jpg", "a dog", "--out", "map.xyz")
    with pytest.raises(ImageError, match=r"none\.jpg"):
        run("explain", "none.jpg", "a dog")
    Path("text.jpg").write_text("no picture")
    with pytest.raises(ImageError, match=r"text\.jpg"):
        run("explain", "text.jpg", "a dog")


def test_an_empty_text_is_refused(model: Blip2):
    del model
    with pytest.raises(PromptError, match="empty"):
        run("explain", "photo.jpg", " ")


def test_what_the_page_shows_is_run(model: Blip2):
    shown = list(commands(TEXT))
    assert len(shown) >= 5
    for words in shown:
        assert run(*words).exit_code == 0, words
    (snippet,) = blocks("python", TEXT)
    exec(compile(snippet, "explain.md", "exec"), {"model": model})
