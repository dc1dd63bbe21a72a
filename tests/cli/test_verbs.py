"""ask, chat, match, embed: what a user types, what comes out of which stream, with which exit code."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from typer.testing import CliRunner, Result

import blip2
from blip2.blip2 import Blip2
from blip2.cli import app
from blip2.cli.options import decoding
from blip2.decoding import Decoding
from blip2.errors import ConfigError, DataError, ImageError, PromptError

pytestmark = pytest.mark.usefixtures("model", "photos")


def run(*words: str, typed: str | None = None) -> Result:
    result = CliRunner().invoke(app, words, input=typed)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_one_question_prints_its_answer_alone(model: Blip2):
    answer = model.ask("photo.jpg", "what is the dog?")
    assert run("ask", "photo.jpg", "what is the dog?").stdout == f"{answer}\n"


def test_several_questions_print_beside_their_answers(model: Blip2):
    asked = ["what is the dog?", "is the house red?"]
    lines = run("ask", "photo.jpg", *asked).stdout.splitlines()
    assert lines == [f"{question}\t{model.ask('photo.jpg', question)}" for question in asked]


def test_decoding_options_reach_the_verb(model: Blip2):
    chosen = {
        "num_beams": 2,
        "max_new_tokens": 3,
        "min_new_tokens": 3,
        "repetition_penalty": 1.5,
        "length_penalty": 0.5,
    }
    words = [word for name, value in chosen.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    expected = model.ask("photo.jpg", "what is the dog?", no_repeat_ngram=2, **chosen)
    assert run("ask", "photo.jpg", "what is the dog?", "--no-repeat-ngram", "2", *words).stdout == f"{expected}\n"


def test_every_keyword_of_the_verbs_is_an_option():
    offered = set(inspect.signature(decoding).parameters)
    assert set(Decoding.__dataclass_fields__) - offered == {"num_captions", "early_stopping"}  # --num; left to Python
    assert offered <= set(Decoding.__dataclass_fields__)


def test_drawing_options_draw_and_the_seed_decides():
    words = ("ask", "photo.jpg", "what is the dog?", "--temperature", "5", "--top-p", "0.99", "--top-k", "20")
    texts = {run(*words, "--seed", str(seed)).stdout for seed in range(8)}
    assert len(texts) > 1
    assert run(*words, "--seed", "3").stdout == run(*words, "--seed", "3").stdout


def test_choices_are_ranked(model: Blip2):
    line = json.loads(run("ask", "photo.jpg", "is it red?", "--choices", "yes, no,dog", "--json").stdout)
    ranking = model.ask("photo.jpg", "is it red?", choices=["yes", "no", "dog"], details=True)
    assert line["answer"] == ranking.best
    assert line["probabilities"] == pytest.approx(dict(zip(ranking.choices, ranking.probabilities, strict=True)))


def test_choices_refuse_decoding_options_by_name():
    with pytest.raises(PromptError, match="num_beams"):
        run("ask", "photo.jpg", "is it red?", "--choices", "yes,no", "--num-beams", "3")


def test_details_hold_tokens_and_probabilities(model: Blip2):
    line = json.loads(run("ask", "photo.jpg", "what is it?", "--details").stdout)
    details = model.ask("photo.jpg", "what is it?", details=True)
    assert line["answer"] == details.text
    assert line["ids"] == list(details.ids)
    assert line["finish"] == details.finish


def test_a_piped_chat_answers_line_by_line_in_the_light_of_the_turns_before(model: Blip2):
    talk = model.chat("photo.jpg")
    expected = [talk.say("what is it?", max_new_tokens=5), talk.say("what colour?", max_new_tokens=5)]
    result = run("chat", "photo.jpg", "--max-new-tokens", "5", typed="what is it?\n\nwhat colour?\n")
    assert result.stdout.splitlines() == expected
    assert result.stderr == ""


def test_new_forgets_the_conversation_and_quit_ends_it(model: Blip2):
    first = model.chat("photo.jpg").say("what is it?")
    result = run("chat", "photo.jpg", typed="what is it?\n/new\nwhat is it?\n/quit\nwhat colour?\n")
    assert result.stdout.splitlines() == [first, first]


def test_an_unknown_chat_command_tells_the_known_ones():
    result = run("chat", "photo.jpg", typed="/help\n")
    assert result.stdout == ""
    assert "/help" in result.stderr
    assert "/new" in result.stderr


def test_chat_notes_that_old_turns_leave():
    result = run("chat", "photo.jpg", "--max-new-tokens", "20", typed="what is the red dog on the boat?\n" * 6)
    assert len(result.stdout.splitlines()) == 6
    assert "oldest turns have left" in result.stderr


def test_a_question_that_is_too_long_is_named_and_the_chat_goes_on(model: Blip2):
    first = model.chat("photo.jpg").say("what is it?")
    result = run("chat", "photo.jpg", typed=f"{'red dog ' * 200}\nwhat is it?\n")
    assert result.stdout.splitlines() == [first]
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1
    assert result.exit_code == 1


def test_match_prints_every_image_with_every_text(model: Blip2):
    found = model.match(["photo.jpg", "holiday/a.jpg"], ["a dog", "a red house"])
    lines = run("match", "photo.jpg", "holiday/a.jpg", "-t", "a dog", "-t", "a red house").stdout.splitlines()
    assert lines[1] == f"photo.jpg\ta red house\t{found.itm[0, 1]:.3f}\t{found.itc[0, 1]:.3f}"
    assert len(lines) == 4
    last = json.loads(run("match", "photo.jpg", "--text", "a dog", "--json").stdout)
    assert (last["image"], last["text"]) == ("photo.jpg", "a dog")
    assert (last["itm"], last["itc"]) == pytest.approx((found.itm[0, 0].item(), found.itc[0, 0].item()), abs=1e-5)


def test_match_takes_folders_and_a_broken_picture_costs_no_other():
    Path("holiday/b.jpg").write_bytes(b"no picture")
    result = run("match", "holiday", "photo.jpg", "-t", "a dog", "--batch-size", "2")
    assert result.exit_code == 1
    assert [line.split("\t")[0] for line in result.stdout.splitlines()] == [
        "holiday/a.jpg", "holiday/c.jpg", "photo.jpg"
    ]  # fmt: skip
    assert "error: holiday/b.jpg: is not an image" in result.stderr
    long = run("match", "photo.jpg", "-t", "dog " * 100)
    assert "is too long for the model: its last" in long.stderr
    assert long.exit_code == 0


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (("ask", "photo.jpg", "what?", " "), PromptError, "a question is empty"),
        (("ask", "holiday", "what?"), ImageError, "holiday: is a folder, not a picture; name a file in it"),
        (("chat", "none.jpg"), ImageError, "none.jpg: does not exist"),
        (("match", "photo.jpg", "-t", ""), PromptError, "a text to match is empty"),
        (("match", "none.jpg", "-t", "a dog"), ImageError, "none.jpg: does not exist"),
        (("explain", "photo.jpg", ""), PromptError, "the text is empty"),
        (("explain", "photo.jpg", "-q", ""), PromptError, "the question is empty"),
        (("search", "holiday", ""), PromptError, "the text to look for is empty"),
        (("search", "holiday", "--image", "none.jpg"), ImageError, "none.jpg: does not exist"),
        (("index", "holiday", "-o", "photo.jpg"), DataError, "photo.jpg: is a file, and an index is a folder"),
    ],
)
def test_what_cannot_be_is_said_before_a_model_is_loaded(
    words: tuple[str, ...], error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(blip2, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    with pytest.raises(error, match=message):
        run(*words)


@pytest.mark.parametrize("name", ["v.npz", "v.safetensors"])
def test_embed_writes_vectors_and_paths(model: Blip2, name: str):
    run("embed", "holiday", "--out", name, "--batch-size", "2")
    if name.endswith("npz"):
        with np.load(name) as file:
            vectors, paths = file["vectors"], file["paths"].tolist()
    else:
        with safe_open(name, "np") as file:
            vectors, paths = file.get_tensor("vectors"), json.loads(file.metadata()["paths"])
    assert paths == ["holiday/a.jpg", "holiday/b.jpg", "holiday/c.jpg"]
    np.testing.assert_allclose(vectors, model.embed_images(paths).numpy(), atol=1e-6)


def test_embed_names_what_it_leaves_out_and_exits_with_1():
    Path("holiday/b.jpg").write_bytes(b"no picture")
    result = run("embed", "holiday", "--out", "v.npz")
    assert result.exit_code == 1
    assert "holiday/b.jpg" in result.stderr
    with np.load("v.npz") as file:
        assert file["paths"].tolist() == ["holiday/a.jpg", "holiday/c.jpg"]


def test_an_interrupted_embed_keeps_what_is_done(monkeypatch: pytest.MonkeyPatch):
    whole = Blip2.embed_images

    def stopped_at_the_second(self: Blip2, images: list[object]):
        if Path("seen").exists():
            raise KeyboardInterrupt
        Path("seen").touch()
        return whole(self, images)

    monkeypatch.setattr(Blip2, "embed_images", stopped_at_the_second)
    result = CliRunner().invoke(app, ["embed", "holiday", "--out", "v.npz", "--batch-size", "1"])
    assert result.exit_code == 130
    with np.load("v.npz") as file:
        assert file["paths"].tolist() == ["holiday/a.jpg"]


def test_embed_refuses_a_name_before_it_works(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("blip2.cli.embed.open_model", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(ConfigError, match=r"\.safetensors"):
        run("embed", "holiday", "--out", "vectors.csv")
    with pytest.raises(ConfigError, match="nowhere"):
        run("embed", "holiday", "--out", "nowhere/v.npz")


def test_a_missing_image_is_named():
    with pytest.raises(ImageError, match=r"none\.jpg"):
        run("ask", "none.jpg", "what is it?")
