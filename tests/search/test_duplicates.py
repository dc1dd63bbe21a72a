"""Near-duplicates are those that comparing all pairs gives."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pictures import QUERIES, WIDTH, Fake, paint, unit
from PIL import Image
from torch import Tensor

from blip2 import image
from blip2.errors import ConfigError
from blip2.search import ImageIndex, duplicates
from blip2.search.duplicates import LEVELS, linked, thumbnail


def brute_force(thumbnails: Tensor, vectors: Tensor, threshold: float) -> list[list[int]]:
    """Connected components by repeated spreading over all pairs."""
    stored = torch.nn.functional.normalize(vectors.double(), dim=-1)
    means = torch.einsum("nqe,mqe->nm", stored, stored) / vectors.shape[1]
    looks = (thumbnails[:, None].double() - thumbnails[None].double()).square().mean(-1).sqrt()
    reach = ((means >= threshold) & (looks <= LEVELS)) | torch.eye(len(vectors), dtype=torch.bool)
    for _ in range(len(vectors).bit_length()):
        reach = reach.double() @ reach.double() > 0
    groups = {tuple(row.nonzero()[:, 0].tolist()) for row in reach}
    return sorted(list(group) for group in groups if len(group) > 1)


def drawn(seed: int, count: int, kinds: int, noise: float, levels: int) -> tuple[Tensor, Tensor]:
    """Thumbnails and vectors of images of some kinds, none of them within rounding of a limit."""
    draw = torch.Generator().manual_seed(seed)
    which = torch.randint(kinds, (count,), generator=draw)
    centres = unit(torch.randn(kinds, QUERIES, WIDTH, generator=draw))
    vectors = unit(centres[which] + noise * unit(torch.randn(count, QUERIES, WIDTH, generator=draw)))
    looks = torch.randint(20, 230, (kinds, 192), generator=draw)[which]
    return (looks + torch.randint(-levels, levels + 1, (count, 192), generator=draw)).byte(), vectors.half()


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1), count=st.integers(1, 60), kinds=st.integers(1, 20),
    noise=st.floats(0, 0.3), levels=st.integers(0, 20), threshold=st.sampled_from([0.8, 0.9, 0.97, 0.999]),
)  # fmt: skip
def test_groups_are_those_of_all_pairs(
    seed: int, count: int, kinds: int, noise: float, levels: int, threshold: float
) -> None:
    thumbnails, vectors = drawn(seed, count, kinds, noise, levels)
    stored = torch.nn.functional.normalize(vectors.double(), dim=-1)
    cosines = torch.einsum("nqe,mqe->nm", stored, stored) / QUERIES
    assume(not ((cosines - threshold).abs() < 1e-5).any())  # float32 may decide either way
    found = linked(thumbnails, lambda rows: vectors[torch.from_numpy(rows)], threshold)
    assert found == brute_force(thumbnails, vectors, threshold)


@pytest.mark.parametrize("size", [224, 256, 364])
@pytest.mark.parametrize("name", ["cat.jpg", "palace.jpg"])
def test_a_thumbnail_of_the_encoder_s_square_is_that_of_the_whole_picture(name: str, size: int) -> None:
    """To a tenth of `LEVELS`, root mean square: fields need not end between pixels. The worst seen was 1.0."""
    picture = image.open(Path(__file__).parents[2] / "docs" / name)
    square = image.Transform(size, (0.5,) * 3, (0.5,) * 3).square(picture)
    whole = np.asarray(picture.resize((8, 8), Image.Resampling.BOX)).reshape(-1).astype(float)
    assert np.sqrt(((thumbnail(torch.from_numpy(square.copy())).numpy() - whole) ** 2).mean()) < 1.5


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    thumbnails, vectors = (part.repeat(3, *[1] * (part.ndim - 1)) for part in drawn(0, 20, 20, 0.1, 0))
    thumbnails[:20] = torch.randint(256, (20, 192), generator=torch.Generator().manual_seed(1)).byte()
    thumbnails[20:40] = thumbnails[40:] = thumbnails[:20]

    def gathered(rows: np.ndarray) -> Tensor:
        return vectors[torch.from_numpy(rows)]

    whole = linked(thumbnails, gathered, 0.99)
    assert whole == [[row, row + 20, row + 40] for row in range(20)]
    monkeypatch.setattr(duplicates, "BLOCK", 7)
    monkeypatch.setattr(duplicates, "PAIRS", 3)
    seen: list[tuple[int, int]] = []
    assert linked(thumbnails, gathered, 0.99, lambda *now: seen.append(now)) == whole
    assert seen[0] == (0, 60)
    assert seen[-1] == (60, 60)


def test_a_smaller_or_coarser_copy_looks_alike_and_another_picture_does_not() -> None:
    """Rough noise, which a thumbnail averages: what it keeps is light and colour of the 64 fields."""
    draw = np.random.default_rng(0)
    one, other = (
        Image.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((640, 480), Image.Resampling.BICUBIC)
        for _ in range(2)
    )
    coarse = io.BytesIO()
    one.save(coarse, "JPEG", quality=30)
    copies = [one.resize((200, 150)), Image.open(coarse).convert("RGB"), one.crop((10, 8, 630, 472))]

    def small(picture: Image.Image) -> Tensor:
        return thumbnail(torch.from_numpy(np.asarray(picture.resize((260, 260), Image.Resampling.BICUBIC)).copy()))

    def apart(left: Image.Image, right: Image.Image) -> float:
        return float((small(left).float() - small(right).float()).square().mean().sqrt())

    assert [apart(one, copy) < LEVELS for copy in copies] == [True, True, True]
    assert apart(one, other) > 4 * LEVELS


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
