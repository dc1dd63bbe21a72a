"""Recall and re-ranking on made-up similarities."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blip2.errors import DataError
from blip2.evaluate.ranking import DEPTHS, belonging, ranks, rerank, retrieval


def test_recall_of_a_small_table_is_as_counted_by_hand() -> None:
    owners = np.array([0, 0, 1, 2])
    similarity = np.array([[0.9, 0.1, 0.8, 0.0], [0.2, 0.7, 0.3, 0.1], [0.1, 0.6, 0.4, 0.5]])
    found = retrieval(similarity, belonging(owners, 3))
    # Texts rank images: text 0 first, 1 third, 2 third, 3 first. Images rank texts: first, second, second.
    assert found.text_to_image[1].value == 0.5
    assert found.image_to_text[1].value == pytest.approx(1 / 3)
    assert found.text_to_image[5].value == found.image_to_text[5].value == 1.0


def test_a_model_that_cannot_tell_images_apart_finds_nothing() -> None:
    found = retrieval(np.zeros((50, 50)), np.eye(50, dtype=bool))
    assert all(found.text_to_image[depth].value == found.image_to_text[depth].value == 0 for depth in DEPTHS)


def test_chance_is_what_random_similarities_get() -> None:
    random = np.random.default_rng(0)
    found = retrieval(random.random((100, 500)), belonging(np.arange(500) // 5, 100))
    for depth in DEPTHS:
        assert found.text_to_image[depth].low <= depth / 100 <= found.text_to_image[depth].high


def test_the_best_of_an_images_captions_counts_and_the_others_do_not_stand_in_its_way() -> None:
    scores = np.array([[0.1, 0.9, 0.8, 0.85]])
    assert ranks(scores, np.array([[True, True, False, False]])).tolist() == [0]
    assert ranks(scores, np.array([[True, False, True, False]])).tolist() == [2]


@given(st.integers(1, 8), st.integers(1, 12), st.integers(0, 2**32))
@settings(max_examples=50, deadline=None)
def test_ranks_are_those_of_sorting(images: int, texts: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    scores = random.permutation(images * texts).reshape(images, texts).astype(np.float64)
    relevant = random.random((images, texts)) < 0.4
    relevant[np.arange(images), random.integers(0, texts, images)] = True
    order = np.argsort(-scores, axis=1)
    places = [
        sum(not relevant[row, item] for item in order[row][: [bool(relevant[row, i]) for i in order[row]].index(True)])
        for row in range(images)
    ]
    assert ranks(scores, relevant).tolist() == places


def test_a_text_of_two_images_is_found_with_either_and_an_image_without_texts_only_distracts() -> None:
    relevant = np.array([[True, False], [True, False], [False, True], [False, False]])
    similarity = np.array([[0.0, 0.0], [0.9, 0.1], [0.1, 0.2], [0.5, 0.9]])
    found = retrieval(similarity, relevant)
    assert found.text_to_image[1].value == 0.5
    assert found.image_to_text[1].value == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("similarity", "relevant", "message"),
    [
        (np.full((2, 2), np.nan), np.eye(2, dtype=bool), "NaN"),
        (np.zeros((2, 3)), np.eye(2, dtype=bool), "similarity is"),
        (np.zeros((2, 2)), np.array([[True, False], [True, False]]), "text 1 fits none"),
    ],
)
def test_what_cannot_be_ranked_is_an_error(similarity: np.ndarray, relevant: np.ndarray, message: str) -> None:
    with pytest.raises(DataError, match=message):
        retrieval(similarity, relevant)


def test_a_text_of_an_image_that_is_not_there_is_an_error() -> None:
    with pytest.raises(DataError, match="of only 2"):
        belonging(np.array([0, 2]), 2)


def test_reranking_moves_only_the_best_of_each_query() -> None:
    similarity = np.array([[0.9, 0.2, 0.1], [0.8, 0.7, 0.3], [0.1, 0.6, 0.5]])
    asked: list[tuple[int, int]] = []

    def score(images: np.ndarray, texts: np.ndarray) -> np.ndarray:
        asked.extend(zip(images.tolist(), texts.tolist(), strict=True))
        return np.where(images == 1, 10.0, 0.0)

    for_images, for_texts = rerank(similarity, score, top=2)
    assert len(asked) == len(set(asked))
    assert np.isfinite(for_images).sum(axis=1).tolist() == [2, 2, 2]
    assert np.isfinite(for_texts).sum(axis=0).tolist() == [2, 2, 2]
    assert for_images[0, 2] == -np.inf
    assert for_texts[1, 0] == pytest.approx(10.8)
    assert for_texts[0, 0] == pytest.approx(0.9)
    assert for_texts[:, 0].argmax() == 1


def test_a_perfect_matching_head_repairs_what_stands_within_reach() -> None:
    random = np.random.default_rng(1)
    similarity = random.random((40, 40))
    for_images, for_texts = rerank(similarity, lambda images, texts: 200.0 * (images == texts), top=10, weight=0.5)
    found = retrieval(for_images, np.eye(40, dtype=bool), to_images=for_texts)
    before = retrieval(similarity, np.eye(40, dtype=bool))
    assert found.text_to_image[1].value == before.text_to_image[10].value
    assert found.image_to_text[1].value == before.image_to_text[10].value
