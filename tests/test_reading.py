"""An image is read once by a language model, whatever is asked about it and when."""

from __future__ import annotations

import dataclasses
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from blip2.blip2 import Blip2
from blip2.config import GemmaConfig, OPTConfig, PromptConfig
from blip2.model.gemma import Gemma
from blip2.model.opt import OPT
from blip2.results import ImageFeatures
from tests.tiny_model import CONTEXT, QFORMER, WORDS, build, picture

QUESTIONS = ["what is this ?", "how many dogs ?", "is the cat red ?", "what is this ?"]
SIZES: dict[str, Any] = {"width": 16, "layers": 2, "heads": 2, "mlp_width": 32, "vocab_size": len(WORDS)}


def _language(kind: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    if kind == "opt":
        made: Any = OPT(OPTConfig(context=CONTEXT, **SIZES))
    else:
        shape: dict[str, Any] = {"key_heads": 1, "head_width": 8, "query_scale": 8, "window": 6, "global_every": 2}
        made = Gemma(GemmaConfig(context=CONTEXT, **shape, **SIZES))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.4 if parameter.ndim > 1 else 0.1))
    return made


@pytest.fixture(params=["opt", "gemma"])
def model(request: pytest.FixtureRequest) -> Blip2:
    """Images before the begin token (OPT), and after it (Gemma)."""
    prompts = PromptConfig(visual="before_bos" if request.param == "opt" else "after_bos")
    return dataclasses.replace(build(prompts=prompts), language=_language(request.param))


@pytest.fixture
def read(model: Blip2, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Rows and positions of each pass of the language model's layers that is no single step."""
    found: list[tuple[int, int]] = []
    whole = model.language.hidden

    def hidden(x: Tensor, *rest: Any) -> Tensor:
        if x.shape[1] > 1:
            found.append((x.shape[0], x.shape[1]))
        return whole(x, *rest)

    monkeypatch.setattr(model.language, "hidden", hidden)
    return found


def _alone(model: Blip2, features: ImageFeatures, question: str, **options: Any) -> Any:
    """The answer from features that nobody has read."""
    fresh = ImageFeatures(features.patches, features.queries, features.vectors)
    return model.ask(fresh, [question], details=True, **options)[0]


def _assert_same(found: Any, expected: Any) -> None:
    assert found.ids == expected.ids
    assert found.log_probs == pytest.approx(expected.log_probs, abs=1e-4)  # float32 sums in another order: 2e-6 seen


@pytest.mark.parametrize("options", [{}, {"num_beams": 1}, {"top_p": 0.9, "seed": 3}], ids=repr)
def test_many_questions_about_one_image_read_it_once(model: Blip2, read: list[tuple[int, int]], options: Any):
    features = model.encode(picture(0))
    found = model.ask(features, QUESTIONS, details=True, **options)
    begin = model.config.prompts.visual == "after_bos"
    longest = max(map(len, model.tokenizer.prompts([model.config.prompts.question.format(each) for each in QUESTIONS])))
    assert read == [(1, QFORMER.queries + begin), (3, longest + (not begin))]  # and equal questions once
    for text, question in zip(found, QUESTIONS, strict=True):
        _assert_same(text, _alone(model, features, question, **options))


def test_the_next_question_goes_on_from_what_the_last_one_read(model: Blip2, read: list[tuple[int, int]]):
    features = model.encode(picture(0))
    model.ask(features, QUESTIONS[:1])
    found = model.ask(features, QUESTIONS[1:2], details=True)[0]
    assert read[0][1] - read[1][1] > QFORMER.queries - 3
    assert len(read) == 2
    _assert_same(found, _alone(model, features, QUESTIONS[1]))


def test_several_images_with_several_questions_each(model: Blip2, read: list[tuple[int, int]]):
    features = model.encode([picture(0), picture(1), picture(2)])
    asked = features[[0, 2, 0, 1, 2]]
    questions = [QUESTIONS[number % 3] for number in range(5)]
    found = model.ask(asked, questions, details=True)
    assert read[0] == (3, QFORMER.queries + (model.config.prompts.visual == "after_bos"))
    for number, text in enumerate(found):
        _assert_same(text, _alone(model, asked[number], questions[number]))
    assert model.ask(asked, questions) == [text.text for text in found]


def test_a_reading_is_the_model_s_own(model: Blip2):
    features = model.encode(picture(0))
    kind = "opt" if isinstance(model.language, OPT) else "gemma"
    other = dataclasses.replace(model, language=_language(kind, seed=9))
    model.ask(features, QUESTIONS)
    found = other.ask(features, QUESTIONS, details=True)
    assert [text.ids for text in found] != [text.ids for text in model.ask(features, QUESTIONS, details=True)]
    for text, question in zip(found, QUESTIONS, strict=True):
        _assert_same(text, _alone(other, features, question))


def test_a_reading_of_other_queries_is_none(model: Blip2):
    features = model.encode(picture(0))
    model.ask(features, QUESTIONS)
    changed = ImageFeatures(features.patches, features.queries + 0.5, features.vectors, features.readings)
    found = model.ask(changed, QUESTIONS, details=True)
    for text, question in zip(found, QUESTIONS, strict=True):
        _assert_same(text, _alone(model, changed, question))


def test_chosen_images_keep_their_readings(model: Blip2):
    features = model.encode([picture(0), picture(1)])
    both = ImageFeatures.concatenate([features[1], features[[0, 0]], features[torch.tensor([True, False])]])
    first, second = features.readings
    assert both.readings == (second, first, first, first)
    assert features[-1].readings == (second,)


def test_a_copy_of_features_has_read_nothing(model: Blip2, read: list[tuple[int, int]]):
    features = model.encode(picture(0))
    first = model.ask(features, QUESTIONS[:1])
    copied = pickle.loads(pickle.dumps(features))
    assert model.ask(copied, QUESTIONS[:1]) == first
    assert read[0] == read[1]


@pytest.mark.parametrize("frozen", [True, False])
def test_nothing_stays_of_many_images_or_of_a_model_that_learns(
    model: Blip2, read: list[tuple[int, int]], frozen: bool, monkeypatch: pytest.MonkeyPatch
):
    if frozen:
        monkeypatch.setattr("blip2.reading.KEPT", 100)
    else:
        model.language.requires_grad_()
    features = model.encode(picture(0))
    model.ask(features, QUESTIONS[:1])
    model.ask(features, QUESTIONS[:1])
    assert read[0] == read[1]


def test_a_chat_s_turns_and_a_stream_go_on_from_one_reading(model: Blip2, read: list[tuple[int, int]]):
    features = model.encode(picture(0))
    chat = model.chat(features)
    answers = [chat.say("what is this ?", max_new_tokens=3), chat.say("is the cat red ?", max_new_tokens=3)]
    fresh = model.chat(picture(0))
    fresh.turns = [("what is this ?", answers[0])]
    before, whole = model.tokenizer.prompts(["Question: what is this ? Answer:", fresh._prompt("is the cat red ?")])
    assert read[1:] == [(1, len(whole) - len(before))]  # what the first turn had is read already
    assert fresh.say("is the cat red ?", max_new_tokens=3) == answers[1]
    streamed = "".join(model.ask(features, "how many dogs ?", stream=True))
    assert streamed.strip() == model.ask(model.encode(picture(0)), ["how many dogs ?"], num_beams=1)[0]


def test_choices_are_ranked_from_one_reading(model: Blip2, read: list[tuple[int, int]]):
    features, choices = model.encode(picture(0)), ["yes", "no", "a red cat"]
    first = model.ask(features, QUESTIONS, choices=choices, details=True)
    again = model.ask(features, QUESTIONS, choices=choices, details=True)
    alone = QFORMER.queries + (model.config.prompts.visual == "after_bos")
    assert [count for rows, count in read if rows == 1] == [alone]
    for question, ranked, same in zip(QUESTIONS, first, again, strict=True):
        twice = (each.repeat(2, 1, 1) for each in (features.patches, features.queries, features.vectors))
        expected = model.ask(ImageFeatures(*twice), [question] * 2, choices=choices, details=True)[0]  # read together
        assert ranked.log_probs == pytest.approx(expected.log_probs, abs=1e-4)  # float32 sums in another order
        assert same.log_probs == pytest.approx(expected.log_probs, abs=1e-4)
