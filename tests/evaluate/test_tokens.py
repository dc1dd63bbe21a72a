"""Splitting captions without Java, beside what Java's tokenizer does."""

import pytest

from blip2.evaluate import tokens
from blip2.evaluate.java import tokenize

TEXTS = [
    "A man holds a sign that says \" Free Hugs \" .", "Two dogs' toys, aren't they?", "It's 10:30 am; she'll run!",
    "He can't see 1,000 (or 3.5) t-shirts [top]", "A black/white cat -- and the end...", "Mr. Bean in the U.S. flag",
    "A slip 'n' slide at five o'clock.", "cannot gonna wanna", "U. Miami & friends, 50% off $5.99", "statefarm.com hat",
    "what?! no!!", "the letter \" P. \"", "", "3rd St. sign", "the café\u2019s \u201copen\u201d sign \u2013 red",
]  # fmt: skip


def test_captions_are_split_as_java_splits_them() -> None:
    assert tokens.tokenize(TEXTS) == tokenize(TEXTS)


@pytest.mark.parametrize(
    ("text", "split"),
    [
        ("A dog's tail wasn't wet.", "a dog 's tail was n't wet"),
        ("(left)", "-lrb- left -rrb-"),  # as Java's: the list of what is dropped has them in capitals
        ("one, two: three; four - five", "one two three four five"),
        ("A T-shirt", "a t-shirt"),
    ],
)
def test_rules_of_the_penn_treebank(text: str, split: str) -> None:
    assert tokens.split(text) == split
