"""Zero-shot classification: the cosines that one works out by hand, and what cannot be chosen from."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blip2.blip2 import Blip2
from blip2.calibration import Calibration
from blip2.errors import ConfigError, DataError, PromptError
from blip2.results import Classification
from blip2.zero_shot import TEMPLATES, Classifier, checked_templates, own_templates, read_labels, worded
from tiny_model import WORDS, build, picture

LABELS = ["dog", "a red house", "the beach", "cat"]
MODEL = build(language=False)


@pytest.fixture(scope="module")
def model() -> Blip2:
    return MODEL


@settings(deadline=None, max_examples=25)
@given(
    labels=st.lists(st.sampled_from(sorted(set(WORDS[5:]))), min_size=2, max_size=6, unique_by=str.casefold),
    templates=st.lists(st.sampled_from(TEMPLATES), min_size=1, max_size=3),
    seeds=st.lists(st.integers(0, 5), min_size=1, max_size=3),
)
def test_the_chosen_label_is_the_argmax_of_cosines_worked_out_by_hand(
    labels: list[str], templates: list[str], seeds: list[int]
):
    photos = [picture(seed) for seed in seeds]
    expected = torch.empty(len(photos), len(labels))
    for row, photo in enumerate(photos):
        vectors = MODEL.embed_images(photo)[0]  # (Q, E)
        for column, label in enumerate(labels):
            mean = torch.stack([MODEL.embed_texts(worded(each, label))[0] for each in templates]).mean(0)
            expected[row, column] = max(float(query @ mean) / float(mean.norm()) for query in vectors)
    scores = Classifier.of(MODEL, labels, templates).scores(photos)
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)  # sums in another order
    if (expected.topk(2).values.diff().abs() > 1e-4).all():  # no two that are as good
        assert MODEL.classify(photos, labels, templates=templates) == [labels[row] for row in expected.argmax(1)]


def test_one_image_gives_a_label_and_a_list_gives_a_list(model: Blip2):
    one = model.classify(picture(0), LABELS)
    assert one in LABELS
    assert model.classify([picture(0), picture(1)], LABELS) == [one, model.classify(picture(1), LABELS)]
    found = model.classify(picture(0), LABELS, details=True)
    assert isinstance(found, Classification)
    assert found.labels == tuple(LABELS)
    assert found.top(9) == sorted(zip(LABELS, found.scores, strict=True), key=lambda pair: -pair[1])
    assert found.best == one
    assert model.classify(model.encode(picture(0)), LABELS) == [one]


def test_bare_labels_by_either_head_score_as_match_does(model: Blip2):
    photos = [picture(seed) for seed in range(3)]
    calibrated = dataclasses.replace(model, calibration=Calibration(2.0, -1.0))
    for each in (model, calibrated):
        matches = each.match(photos, LABELS)
        for by, expected in (("itc", matches.itc), ("itm", matches.itm)):
            found = Classifier.of(each, LABELS, ["{}"], by).scores(photos)
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)  # sums in another order
    several = Classifier.of(model, LABELS, ["{}", "a {}"], "itm").scores(photos)
    both = [Classifier.of(model, LABELS, [each], "itm").scores(photos).logit() for each in ("{}", "a {}")]
    torch.testing.assert_close(several.logit(), (both[0] + both[1]) / 2, atol=1e-3, rtol=1e-3)  # float32's logit


def test_templates_are_the_default_where_the_first_token_stands_for_the_text(model: Blip2):
    assert model.classify(picture(0), LABELS, details=True) == model.classify(
        picture(0), LABELS, templates=TEMPLATES, details=True
    )
    config = model.config.replace(qformer=dataclasses.replace(model.config.qformer, text_pooling="mean"))
    assert own_templates(dataclasses.replace(model, config=config)) == ("{}",)


def test_labels_are_read_once_for_all_images(model: Blip2, monkeypatch: pytest.MonkeyPatch):
    classifier = Classifier.of(model, LABELS)
    expected = classifier.classify([picture(0), picture(1)])
    monkeypatch.setattr(Blip2, "text_ids", lambda *_: pytest.fail("read again"))
    assert [classifier.classify(picture(seed))[0] for seed in (0, 1)] == [
        Classification(tuple(LABELS), pytest.approx(each.scores, abs=1e-5)) for each in expected
    ]


def test_ten_thousand_labels_are_no_different(model: Blip2):
    labels = [f"{number}" for number in range(10_000)]
    found = model.classify(picture(0), labels, templates=["{}"], details=True)
    assert len(found.scores) == 10_000
    assert len(found.top(5)) == 5


def test_a_label_stands_in_its_sentence_as_it_is():
    assert worded("a photo of a {}", "cat") == "a photo of a cat"
    assert worded("a photo of a {}", "Owl") == "a photo of an Owl"
    assert worded("A {} and a {}, {}", "owl") == "An owl and an owl, owl"
    assert worded("a {}", "{} {0.__class__}") == "a {} {0.__class__}"
    assert worded("panda {}", "owl") == "panda owl"
    assert checked_templates(TEMPLATES) == TEMPLATES


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([], "at least two labels"),
        (["dog"], "at least two labels"),
        ("dog cat", "a list of at least two labels.*'dog cat'"),
        (["dog", " "], "label 2 of 2 is empty"),
        (["dog", "cat", " Dog "], "'Dog' comes twice"),
    ],
)
def test_labels_that_leave_no_choice_are_refused(model: Blip2, labels: list[str], message: str):
    with pytest.raises(PromptError, match=message):
        model.classify(picture(0), labels)


def test_templates_and_kinds_that_cannot_be_are_refused(model: Blip2):
    for templates, message in (
        ([], "a list of templates"),
        ("a {}", "a list of templates"),
        ([""], "'' has no {}"),
        (["{}", "a dog"], "'a dog' has no {}"),
    ):
        with pytest.raises(PromptError, match=message):
            model.classify(picture(0), LABELS, templates=templates)
    with pytest.raises(ConfigError, match="by is 'both'; use itc or itm"):
        model.classify(picture(0), LABELS, by="both")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match=r"no matching heads|no text side"):
        build(heads=False).classify(picture(0), LABELS)


def test_a_file_of_labels_is_read_line_by_line(tmp_path):
    path = tmp_path / "labels.txt"
    path.write_bytes("\ufeffdog\r\n\n  red house \nÅrre\n".encode())
    assert read_labels(path) == ["dog", "red house", "Årre"]
    path.write_bytes(b"\xff\xd8\xff")
    for wrong in (path, tmp_path, tmp_path / "none.txt"):
        with pytest.raises(DataError, match=f"{wrong.name}: cannot be read as UTF-8"):
            read_labels(wrong)
