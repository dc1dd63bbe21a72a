"""Answers, compared as VQAv2 compares them."""

import pytest

from blip2.errors import DataError
from blip2.evaluate.answering import answers, normalise, score


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("Two", "2"),
        ("The red car.", "red car"),
        ("a man, an apple", "man apple"),
        ("dont", "don't"),
        ("couldntve", "couldntve"),  # only one missing apostrophe is mended
        ("couldnt've couldn'tve", "couldn't've couldn't've"),
        ("somebody'd", "somebodyd"),
        ("Im", "im"),  # the table has it with a capital, which no lower case meets
        ("YES!", "yes"),
        ("on the\ntable", "on table"),
        ("1,000", "1000"),
        ("3.5 m.", "3.5 m"),
        ("black-and-white", "black and white"),
        ("none", "0"),
        ("", ""),
    ],
)
def test_answers_are_normalised_as_the_official_evaluation_does(text: str, normal: str) -> None:
    assert normalise(text) == normal


@pytest.mark.parametrize(
    ("equal", "expected"),
    # Each annotator is left out once: 10 equal of 10 leave 9; 1 of 10 leaves 0 once and 1 nine times.
    [(0, 0.0), (1, 0.9 / 3), (2, (2 * 1 + 8 * 2) / 30), (3, (3 * 2 + 7 * 3) / 30), (4, 1.0), (10, 1.0)],
)
def test_the_score_grows_with_the_annotators_who_agree(equal: int, expected: float) -> None:
    truth = ["dog"] * equal + [f"other {number}" for number in range(10 - equal)]
    assert score("A dog.", truth) == pytest.approx(expected)


def test_one_true_answer_is_met_or_missed() -> None:
    assert score("two", ["2"]) == 1.0
    assert score("three", ["2"]) == 0.0


def test_accuracy_stands_beside_what_the_most_frequent_answer_gets() -> None:
    truth = [["yes"], ["no"], ["Yes"], ["red"], ["blue"], ["blue"]]
    kinds = ["yes/no"] * 3 + ["color"] * 3
    found = answers(["yes", "no", "no", "red", "red", "red"], truth, kinds, images=["a", "a", "b", "a", "b", "b"])
    assert list(found) == ["color", "yes/no"]
    assert found["yes/no"].accuracy.value == pytest.approx(2 / 3)
    assert (found["yes/no"].floor, found["yes/no"].answer) == (pytest.approx(2 / 3), "yes")
    assert (found["color"].floor, found["color"].answer) == (pytest.approx(2 / 3), "blue")
    assert found["color"].count == 3
    # Two pictures: one right in one and wrong in two, or right in one of one.
    assert (found["color"].accuracy.low, found["color"].accuracy.high) == (0.0, 1.0)


def test_the_floor_is_the_best_single_answer_not_a_mean_of_all() -> None:
    truth = [["left", "left", "right"], ["right", "right", "right"], ["up", "up", "up"]]
    found = answers(["", "", ""], truth, ["where"] * 3)
    assert found["where"].answer == "right"
    assert found["where"].accuracy.value == 0


@pytest.mark.parametrize(
    ("predicted", "truth", "message"),
    [(["a"], [["a"], ["b"]], "one of each"), ([], [], "no questions"), (["a"], [[]], "no true answer")],
)
def test_questions_without_their_answers_are_an_error(
    predicted: list[str], truth: list[list[str]], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        answers(predicted, truth, ["what"] * len(predicted))
