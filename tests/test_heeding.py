"""Questions that the Q-Former reads too: the queries depend on them, and on nothing that was asked before."""

import dataclasses

import pytest
import torch

from blip2.blip2 import Blip2
from blip2.config import Blip2Config
from blip2.errors import ConfigError
from blip2.heeding import heeded
from blip2.model.bridge import Bridge
from blip2.results import ImageFeatures
from tiny_model import QFORMER, VISION, build, picture

QUESTIONS = ["what is this ?", "how many dog on the beach ?", "is the cat red ?"]
CLOSE = {"atol": 1e-5, "rtol": 1e-4}  # sums over rows of other lengths run in another order


@pytest.fixture(scope="module")
def model() -> Blip2:
    plain = build()
    return dataclasses.replace(plain, config=plain.config.replace(question_aware=True))


def by_hand(model: Blip2, features: ImageFeatures, question: str) -> torch.Tensor:
    """One image's queries beside one question, straight through the Q-Former."""
    with torch.inference_mode():
        joined = model.bridge.qformer.join(model.bridge.see(features.patches), model.text_ids([question]))
    return joined[:, : QFORMER.queries]


def test_an_answer_is_written_from_queries_that_read_the_question(model: Blip2):
    features = model.encode(picture(0))
    for question in QUESTIONS:
        queries = by_hand(model, features, question)
        assert not torch.allclose(queries, features.queries, atol=1e-2), "the question changes what queries say"
        found = model.heeding(features, [question], [1])
        torch.testing.assert_close(found.queries, queries, **CLOSE)
        blind = dataclasses.replace(model, config=model.config.replace(question_aware=False))
        assert model.ask(features, question) == blind.ask(found, question)


def test_many_questions_about_many_images_are_answered_as_each_alone(model: Blip2, monkeypatch: pytest.MonkeyPatch):
    photos = [picture(seed) for seed in range(3)]
    alone = [model.ask(photo, question) for photo, question in zip(photos, QUESTIONS, strict=True)]
    about_one = [model.ask(photos[0], question) for question in QUESTIONS]
    encoded, seen = [], []
    encode, see = type(model.encoder).forward, Bridge.see
    monkeypatch.setattr(type(model.encoder), "forward", lambda *a: encoded.append(len(a[1])) or encode(*a))
    monkeypatch.setattr(Bridge, "see", lambda *a: seen.append(len(a[1])) or see(*a))
    assert model.ask(photos, QUESTIONS) == alone
    assert encoded == [3]
    encoded.clear()
    seen.clear()
    assert model.ask(photos[0], QUESTIONS) == about_one
    assert encoded == [1]
    assert seen == [1, 1], "once for the features, once for all questions together"
    assert model.ask(photos, QUESTIONS[0]) == [model.ask(photo, QUESTIONS[0]) for photo in photos]


def test_images_and_questions_beyond_one_pass_keep_their_order(model: Blip2, monkeypatch: pytest.MonkeyPatch):
    features = model.encode([picture(seed) for seed in range(5)])
    rows = [4, 0, 3, 0, 2, 1, 4, 4]
    questions = [QUESTIONS[row % 3] for row in range(len(rows))]
    ids = model.text_ids(questions)
    with torch.inference_mode():
        whole = heeded(model.bridge, features[rows], ids)
        monkeypatch.setattr("blip2.heeding.IMAGES", 2)
        monkeypatch.setattr("blip2.heeding.ROWS", 3)
        parts = heeded(model.bridge, features[rows], ids)
    torch.testing.assert_close(parts.queries, whole.queries, **CLOSE)
    for row, (place, question) in enumerate(zip(rows, questions, strict=True)):
        torch.testing.assert_close(parts.queries[row], by_hand(model, features[place], question)[0], **CLOSE)
    assert torch.equal(parts.patches, features.patches[rows])


def test_what_was_read_for_one_question_does_not_answer_the_next(model: Blip2):
    features = model.encode(picture(1))
    fresh = [model.ask(picture(1), question, details=True).log_probs for question in QUESTIONS]
    assert len({round(probs[0], 4) for probs in fresh}) == len(QUESTIONS), "the answers can be told apart"
    model.caption(features)
    for order in (QUESTIONS, QUESTIONS[::-1]):
        again = [model.ask(features, question, details=True)[0].log_probs for question in order]
        for found, expected in zip(again, fresh if order is QUESTIONS else fresh[::-1], strict=True):
            assert found == pytest.approx(expected, abs=1e-5)
    assert model.caption(features) == [model.caption(picture(1))]


def test_several_images_of_one_question_all_heed_it(model: Blip2):
    pair = [picture(2), picture(3)]
    found = model.heeding(model.encode(pair), [QUESTIONS[0]], [2])
    for row, photo in enumerate(pair):
        torch.testing.assert_close(found.queries[row], by_hand(model, model.encode(photo), QUESTIONS[0])[0], **CLOSE)
    assert isinstance(model.ask([pair], QUESTIONS[0]), list)


def test_choices_streams_and_chats_heed_the_question_too(model: Blip2):
    features = model.encode(picture(4))
    found = model.heeding(features, [QUESTIONS[2]], [1])
    prompt = model.config.prompts.question.format(QUESTIONS[2])
    ranked = model.ask(features, QUESTIONS[2], choices=["yes", "no"], details=True)[0]
    assert ranked.log_probs == pytest.approx(model.rank(found, [prompt], ["yes", "no"])[0].log_probs, abs=1e-5)
    whole = model.ask(features, QUESTIONS[2], num_beams=1)[0]
    assert "".join(model.ask(features, QUESTIONS[2], stream=True)).strip() == whole
    assert model.chat(features).say(QUESTIONS[2], max_new_tokens=10) == model.ask(features, QUESTIONS[2])[0]


def test_a_model_that_is_not_question_aware_keeps_its_features(model: Blip2):
    plain = build()
    features = plain.encode(picture(0))
    assert plain.heeding(features, ["what ?"], [1]) is features


def test_without_a_text_side_no_question_can_be_heeded():
    blind = dataclasses.replace(QFORMER, text=False)
    with pytest.raises(ConfigError, match=r"question_aware: this Q-Former has no text side"):
        Bridge(Blip2Config(vision=VISION, qformer=blind, heads=False, question_aware=True))
