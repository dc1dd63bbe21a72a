"""The benchmark of search, run at a tiny size; the page that holds its table."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import search, tables  # noqa: E402
from blip2.search import nearest, shortlist  # noqa: E402
from blip2.search.nearest import Query  # noqa: E402


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_the_exact_answer_is_that_of_comparing_all_one_by_one():
    vectors, words = unit(700, 4, 16).half(), unit(6, 16, seed=1)
    seen = nearest.rounded(unit(6, 4, 16, seed=2))
    for queries in (
        [Query(word, None) for word in words],
        [Query(None, image) for image in seen],
        [Query(word, image) for word, image in zip(words, seen, strict=True)],
    ):
        plain = [
            float(nearest.scores(vectors, query).sort(descending=True).values[search.TOP - 1]) for query in queries
        ]
        assert search.least(vectors, queries) == plain


@pytest.mark.parametrize("limit", [160_000, 100])
def test_a_row_has_a_recall_and_a_time_of_each_kind(monkeypatch: pytest.MonkeyPatch, limit: int):
    """Vectors of few widths: the directions of the sketch hold them whole, so nothing is missed."""
    monkeypatch.setattr(shortlist, "SCAN_LIMIT", limit)
    texts = [f"a {number}" for number in range(5)]
    asks = search.Given(texts, unit(5, 16, seed=1), unit(5, 4, 16, seed=2))
    row = search.measure(search.repeated(unit(90, 4, 16), 300), asks, texts)
    assert row["images"] == 300
    assert row["by"] == ("shortlists" if limit == 100 else "comparing all")
    assert len(row["shortlists_mb"]) == (2 if limit == 100 else 0)
    assert {kind: row[kind]["recall"] for kind in search.KINDS} == dict.fromkeys(search.KINDS, 1.0)
    assert all(0 < row[kind]["ms"] <= row[kind]["p95_ms"] for kind in search.KINDS)


def test_copies_are_near_their_originals_and_are_none_of_them():
    vectors = unit(20, 4, 64, seed=3)  # another than the noise has
    copies = search.repeated(vectors, 50)
    assert copies.shape == (50, 4, 64)
    assert torch.equal(copies[:20], vectors.half())
    cosines = (copies[20:40].float() * vectors).sum(-1).numpy()
    expected = 1 / np.sqrt(1 + search.NOISE**2)  # the noise is nearly at a right angle
    assert np.abs(cosines - expected).max() < 0.15
    assert cosines.max() < 0.999


def test_the_page_holds_the_table_of_the_numbers():
    page = search.PAGE.read_text(encoding="utf-8")
    results = json.loads(search.PAGE.with_suffix(".json").read_text(encoding="utf-8"))
    assert tables.filled(page, results, {"search": search.table}) == page, "run `python -m benchmarks.search ...`"
    assert [row["images"] for row in results["rows"]] == sorted({row["images"] for row in results["rows"]})
