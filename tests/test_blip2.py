"""The verbs on a tiny model: what goes in, what comes out, and that nothing depends on its neighbours."""

import dataclasses

import numpy as np
import pytest
import torch

from blip2 import weights
from blip2.blip2 import Blip2
from blip2.config import CaptionConfig, PromptConfig
from blip2.decoding import Decoding
from blip2.errors import Blip2Error, CheckpointError, ConfigError, ImageError, PromptError
from blip2.loading import load
from blip2.results import Generation, ImageFeatures
from tiny_model import CONTEXT, build, picture

CLOSE = {"atol": 1e-5, "rtol": 1e-4}


@pytest.fixture(scope="module")
def model() -> Blip2:
    return build()


def test_one_image_gives_a_text_and_a_list_gives_a_list(model: Blip2):
    one = model.caption(picture(0))
    assert isinstance(one, str)
    assert model.caption([picture(0), picture(1)]) == [one, model.caption(picture(1))]
    assert model.caption([picture(0)]) == [one]


def test_features_stand_wherever_an_image_does_and_encode_only_once(model: Blip2, monkeypatch):
    photos = [picture(seed) for seed in range(3)]
    features = model.encode(photos)
    expected = model.caption(photos), model.match(photos, ["a dog"]), model.ask(photos, "what is this ?")
    monkeypatch.setattr(type(model.encoder), "forward", lambda *_: pytest.fail("encoded again"))

    assert model.caption(features) == expected[0]
    torch.testing.assert_close(model.match(features, ["a dog"]).itm, expected[1].itm)
    assert model.ask(features, "what is this ?") == expected[2]
    assert model.encode(features) is features
    assert model.caption(features[1]) == [expected[0][1]]
    joined = ImageFeatures.concatenate([features[2], features[[0, 1]]])
    assert model.caption(joined) == [expected[0][2], *expected[0][:2]]


@pytest.mark.parametrize("options", [{"num_beams": 1}, {"num_beams": 3}, {"top_p": 0.9, "seed": 4}])
def test_a_batch_writes_what_its_images_write_alone(model: Blip2, options: dict):
    photos = [picture(seed) for seed in range(4)]
    questions = ["what is this ?", "how many dog", "is the cat red ? yes , no", "what"]
    assert model.caption(photos, **options) == [model.caption(photo, **options) for photo in photos]
    assert model.ask(photos, questions, **options) == [
        model.ask(photo, question, **options) for photo, question in zip(photos, questions, strict=True)
    ]


def test_captions_are_written_as_the_model_says_where_the_call_does_not(model: Blip2):
    config = model.config.replace(captions=CaptionConfig(length_penalty=0.0, no_repeat_ngram=1))
    own = dataclasses.replace(model, config=config)
    assert own.caption(picture(0)) == model.caption(picture(0), length_penalty=0.0, no_repeat_ngram=1)
    assert own.caption(picture(0)) != model.caption(picture(0))
    assert own.caption(picture(0), length_penalty=1.0, no_repeat_ngram=0) == model.caption(picture(0))
    streamed = "".join(own.caption(picture(0), stream=True))
    assert streamed == model.caption(picture(0), num_beams=1, no_repeat_ngram=1)
    assert own.ask(picture(0), "what is this ?") == model.ask(picture(0), "what is this ?")


def test_several_captions_come_best_first(model: Blip2):
    found = model.caption([picture(0)], num_captions=3, details=True)[0]
    assert len(found) == 3
    assert all(isinstance(one, Generation) for one in found)
    assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)
    assert model.caption(picture(0), num_captions=3) == [one.text for one in found]
    assert found[0].score == pytest.approx(sum(found[0].log_probs) / len(found[0].log_probs), abs=1e-5)


def test_a_stream_adds_up_to_the_greedy_caption(model: Blip2):
    pieces = list(model.caption(picture(2), stream=True))
    assert "".join(pieces).strip() == model.caption(picture(2), num_beams=1)
    with pytest.raises(ConfigError, match="beam search cannot stream"):
        model.caption(picture(2), stream=True, num_beams=2)
    with pytest.raises(ConfigError, match="one text, not of 2"):
        model.caption([picture(1), picture(2)], stream=True)


def test_many_questions_about_one_image_and_one_question_about_many(model: Blip2):
    questions = ["what is this ?", "how many dog ?"]
    assert model.ask(picture(0), questions) == [model.ask(picture(0), question) for question in questions]
    photos = [picture(0), picture(1)]
    assert model.ask(photos, questions[0]) == [model.ask(photo, questions[0]) for photo in photos]
    with pytest.raises(PromptError, match="3 images and 2 questions"):
        model.ask([picture(0)] * 3, questions)


def test_choices_are_ranked_by_their_whole_likelihood(model: Blip2):
    ranking = model.ask(picture(0), "is this a dog ?", choices=["yes", "no", "a cat"], details=True)
    assert model.ask(picture(0), "is this a dog ?", choices=["yes", "no", "a cat"]) == ranking.best
    assert sum(ranking.probabilities) == pytest.approx(1)
    assert ranking.best == max(zip(ranking.log_probs, ranking.choices, strict=True))[1]
    with pytest.raises(PromptError, match="at least two choices"):
        model.ask(picture(0), "what ?", choices=["yes"])
    with pytest.raises(PromptError, match=r"a list of at least two choices.*not 'yes'"):
        model.ask(picture(0), "what ?", choices="yes")


def test_a_batch_of_nothing_is_an_error_that_names_it(model: Blip2):
    for call in (lambda: model.encode([picture(0)], batch_size=0), lambda: model.embed_texts(["a dog"], batch_size=-1)):
        with pytest.raises(ConfigError, match="must be at least 1"):
            call()


def test_chat_remembers_and_forgets_the_oldest_when_the_context_is_full(model: Blip2):
    chat = model.chat(picture(0))
    first = chat.say("what is this ?", max_new_tokens=5)
    assert chat.turns == [("what is this ?", first)]
    for _ in range(6):
        chat.say("how many dog on the beach ?", max_new_tokens=5)
    assert chat.forgotten > 0
    assert len(chat.turns) + chat.forgotten == 7
    kept = list(chat.turns)
    with pytest.raises(PromptError, match="empty"):
        chat.say("  ")
    with pytest.raises(PromptError, match="too long"):
        chat.say("dog " * CONTEXT)
    assert chat.turns == kept


def test_what_does_not_fit_the_context_is_an_error_that_says_so(model: Blip2):
    with pytest.raises(PromptError, match=f"has {CONTEXT}: shorten the prompt"):
        model.caption(picture(0), prompt="dog " * CONTEXT)


def test_matching_scores_every_pair_as_it_would_alone(model: Blip2):
    photos, texts = [picture(0), picture(1)], ["a dog", "a red cat runs on the beach", "yes"]
    matches = model.match(photos, texts)
    assert matches.itm.shape == matches.itc.shape == (2, 3)
    for row, photo in enumerate(photos):
        for column, text in enumerate(texts):
            alone = model.match(photo, text)
            torch.testing.assert_close(matches.itm[row, column], alone.itm[0, 0], **CLOSE)
            torch.testing.assert_close(matches.itc[row, column], alone.itc[0, 0], **CLOSE)
    vectors, words = model.embed_images(photos), model.embed_texts(texts)
    assert vectors.shape == (2, 4, 8)
    torch.testing.assert_close((vectors @ words.T).amax(1), matches.itc, **CLOSE)
    torch.testing.assert_close(words.norm(dim=-1), torch.ones(3))
    with pytest.raises(PromptError, match="empty text"):
        model.match(photos, ["a dog", " "])


def test_texts_are_matched_as_training_read_them_where_the_model_says_so(model: Blip2):
    cased = ["A dog .", "a  dog"]
    assert not torch.equal(*model.embed_texts(cased))
    trained = dataclasses.replace(model, config=model.config.replace(plain_texts=True))
    torch.testing.assert_close(*trained.embed_texts(cased), **CLOSE)


def test_the_prompt_is_what_the_model_is_given(model: Blip2):
    prompted = build(prompts=PromptConfig(caption="a dog"))
    assert prompted.caption(picture(0)) == model.caption(picture(0), prompt="a dog")


def test_an_unknown_option_an_empty_list_and_a_broken_image_are_named(model: Blip2, tmp_path):
    with pytest.raises(ConfigError, match="unknown option 'num_beam'"):
        model.caption(picture(0), num_beam=3)
    with pytest.raises(ConfigError, match="num_captions is 3 but num_beams 2"):
        model.caption(picture(0), num_captions=3, num_beams=2)
    with pytest.raises(ConfigError, match="no image"):
        model.caption([])
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    with pytest.raises(ImageError, match=r"broken\.jpg"):
        model.caption([picture(0), tmp_path / "broken.jpg"])


def test_a_model_without_a_part_says_what_it_cannot_do():
    with pytest.raises(ConfigError, match="does not write"):
        build(language=False).caption(picture(0))
    writes = build(heads=False)
    with pytest.raises(ConfigError, match="does not match"):
        writes.embed_images(picture(0))
    with pytest.raises(ConfigError, match="does not match"):
        writes.match(picture(0), "a dog")
    both = build()
    own = writes.bridge.state_dict().keys()
    writes.bridge.load_state_dict({name: value for name, value in both.bridge.state_dict().items() if name in own})
    writes.encoder.load_state_dict(both.encoder.state_dict())
    assert writes.encode(picture(0)).vectors.shape[-1] == 0
    torch.testing.assert_close(writes.encode(picture(0)).queries, both.encode(picture(0)).queries)


def test_a_saved_model_without_language_loads_and_matches_the_same(tmp_path):
    model = build(language=False)
    weights.save(tmp_path, model.config, model.bridge, model.encoder)
    back = load(tmp_path, device="cpu")
    torch.testing.assert_close(back.embed_images(picture(0)), model.embed_images(picture(0)))
    assert back.identity
    with pytest.raises(CheckpointError, match="no model here"):
        load(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="dtype 'int3'"):
        load(tmp_path, dtype="int3")
    with pytest.raises(ConfigError, match="device 'tpu9'"):
        load(tmp_path, device="tpu9")


def test_a_stacked_array_is_a_list_of_its_images(model: Blip2):
    photos = np.stack([picture(0), picture(1)])
    assert model.caption(photos) == [model.caption(picture(0)), model.caption(picture(1))]
    pixels = torch.from_numpy(photos).permute(0, 3, 1, 2)
    assert model.caption(pixels) == model.caption(photos)


def test_more_images_than_a_batch_are_written_in_parts(model: Blip2, monkeypatch):
    sizes: list[int] = []
    whole = model.language.prefill
    monkeypatch.setattr(model.language, "prefill", lambda *args: sizes.append(len(args[0])) or whole(*args))
    features = model.encode([picture(seed) for seed in range(5)])
    found = model.write(features, [""] * 5, Decoding(), batch_size=2)
    assert sum(sizes) == 5
    assert max(sizes) <= 2
    assert [row[0].text for row in found] == model.caption(features, num_beams=1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.ask(picture(0), "what ?", choices=["yes", "no"], num_beams=2), "'num_beams' does not go with"),
        (lambda m: m.ask(picture(0), "what ?", choices=["yes", "no"], stream=True), "'stream' does not go with"),
        (lambda m: m.caption(picture(0), stream=True, details=True), "details and a choice are for whole texts"),
        (lambda m: m.caption(picture(0), do_sample=False, temperature=0.3), "temperature is for drawing"),
        (lambda m: m.chat([picture(0), picture(1)]), "about one image, not 2"),
        (lambda m: m.caption(m.encode(picture(0))[[]]), "the features are empty"),
        (lambda m: m.embed_texts([]), "empty text"),
    ],
)
def test_what_would_be_dropped_in_silence_is_refused(model: Blip2, call, message: str):
    with pytest.raises(Blip2Error, match=message):
        call(model)
