"""Near-duplicates are those that comparing all pairs gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import QUERIES, WIDTH, Fake, paint, unit
from torch import Tensor

from blip2.errors import ConfigError
from blip2.search import ImageIndex, duplicates
from blip2.search.duplicates import linked


def brute_force(vectors: Tensor, threshold: float) -> list[list[int]]:
    """Connected components by repeated spreading over all pairs."""
    stored = torch.nn.functional.normalize(vectors.half().double(), dim=-1)
    near = torch.einsum("nqe,mqe->nm", stored, stored) / vectors.shape[1] >= threshold
    reach = near | torch.eye(len(vectors), dtype=torch.bool)
    for _ in range(len(vectors).bit_length()):
        reach = reach.double() @ reach.double() > 0
    groups = {tuple(row.nonzero()[:, 0].tolist()) for row in reach}
    return sorted(list(group) for group in groups if len(group) > 1)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1), count=st.integers(1, 60), kinds=st.integers(1, 20),
    noise=st.floats(0, 0.3), threshold=st.sampled_from([0.8, 0.9, 0.97, 0.999]),
)  # fmt: skip
def test_groups_are_those_of_all_pairs(seed: int, count: int, kinds: int, noise: float, threshold: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    centres = unit(torch.randn(kinds, QUERIES, WIDTH, generator=draw))
    which = torch.randint(kinds, (count,), generator=draw)
    vectors = unit(centres[which] + noise * unit(torch.randn(count, QUERIES, WIDTH, generator=draw)))
    stored = torch.nn.functional.normalize(vectors.half().double(), dim=-1)
    cosines = torch.einsum("nqe,mqe->nm", stored, stored) / QUERIES
    if ((cosines - threshold).abs() < 1e-5).any():  # float32 may decide either way
        return
    found = linked(lambda rows: vectors.half()[torch.from_numpy(rows)], count, threshold)
    assert found == brute_force(vectors, threshold)


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = unit(torch.randn(20, QUERIES, WIDTH, generator=torch.Generator().manual_seed(0))).repeat(3, 1, 1).half()

    def gathered(rows: np.ndarray) -> Tensor:
        return vectors[torch.from_numpy(rows)]

    whole = linked(gathered, 60, 0.99)
    assert whole == [[row, row + 20, row + 40] for row in range(20)]
    monkeypatch.setattr(duplicates, "BLOCK", 7)
    monkeypatch.setattr(duplicates, "PAIRS", 3)
    seen: list[tuple[int, int]] = []
    assert linked(gathered, 60, 0.99, lambda *now: seen.append(now)) == whole
    assert seen[0] == (0, 60)
    assert seen[-1] == (60, 60)


def test_an_index_names_its_duplicates_by_their_paths(photos: Path, tmp_path: Path) -> None:
    paint(photos, {"again.png": (3, 60, 252), "zz/once-more.png": (3, 60, 252), "z.png": (5, 100, 250)})
    index = ImageIndex.build(Fake(), [photos], tmp_path / "index")
    groups = index.duplicates()
    assert [[str(hit.path.relative_to(photos)) for hit in group] for group in groups] == [
        ["03.png", "again.png", "zz/once-more.png"],
        ["05.png", "z.png"],
    ]
    assert all(hit.score == pytest.approx(1, abs=1e-6) for group in groups for hit in group)
    assert sorted(photos.rglob("*.png")) == index.paths  # nothing is deleted
    for threshold in (0.0, 1.1):
        with pytest.raises(ConfigError, match=f"the threshold is {threshold}"):
            index.duplicates(threshold)
