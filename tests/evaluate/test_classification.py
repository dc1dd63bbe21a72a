"""Top-1 and top-5 of scores that were worked out by hand."""

import numpy as np
import pytest

from blip2.errors import DataError
from blip2.evaluate.classification import accuracy, places

LABELS = ["a", "b", "c", "d", "e", "f"]


def test_the_place_of_an_image_s_own_label_counts_and_a_tie_counts_against_it():
    scores = np.array([[6, 5, 4, 3, 2, 1], [6, 5, 4, 3, 2, 1], [6, 5, 4, 3, 2, 1], [1, 1, 0, 0, 0, 0]], dtype=float)
    found = places(scores, LABELS, ["a", "c", "f", "a"])
    assert found.tolist() == [0, 2, 5, 1]
    numbers = accuracy(found)
    assert (numbers["top-1"].value, numbers["top-5"].value) == (0.25, 0.75)
    assert numbers["top-1"].low < 0.25 < numbers["top-1"].high
    with pytest.raises(DataError, match="'x' is none of the 6 labels"):
        places(scores, LABELS, ["a", "x", "b", "c"])
