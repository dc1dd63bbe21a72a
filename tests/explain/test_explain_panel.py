"""The panel: where a map falls on the picture, and what is said beside it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import tiny_model
from blip2 import explain, image
from blip2.blip2 import Blip2
from blip2.errors import ConfigError
from blip2.explain.panel import MOST, _notes, heat
from blip2.model.vision import VisionTransformer

TEXT = "a dog runs on the beach"


@pytest.fixture(scope="module")
def model() -> Blip2:
    return tiny_model.build()


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return image.open(tiny_model.picture(1))


def brightness(drawn: Image.Image) -> np.ndarray:
    return np.asarray(drawn, np.float32).sum(-1)


@pytest.mark.parametrize("cell", [(0, 0), (1, 2), (2, 0)])
def test_a_cell_is_bright_where_it_lies_on_the_whole_picture(cell: tuple[int, int]):
    """3 rows and 4 columns over a picture of 90 x 200: each cell is 50 wide and 30 high."""
    grid = torch.zeros(3, 4)
    grid[cell] = 1
    bright = brightness(heat(Image.new("RGB", (200, 90), (90, 90, 90)), grid))
    row, column = np.unravel_index(bright.argmax(), bright.shape)
    assert (row // 30, column // 50) == cell
    assert bright[cell[0] * 30 + 15, cell[1] * 50 + 25] == pytest.approx(
        bright.max(), abs=40
    )  # half a pixel from the middle


def test_between_middles_a_map_is_bilinear(monkeypatch: pytest.MonkeyPatch):
    seen: list[np.ndarray] = []

    def colours(level: np.ndarray) -> np.ndarray:
        seen.append(level)
        return np.zeros((*level.shape, 3))

    monkeypatch.setattr("blip2.explain.panel._colours", colours)
    grid = torch.rand(5, 5, generator=torch.Generator().manual_seed(3))
    heat(Image.new("RGB", (140, 95)), grid)
    expected = F.interpolate((grid / grid.max())[None, None], (95, 140), mode="bilinear", align_corners=False)[0, 0]
    np.testing.assert_allclose(seen[0], expected.numpy(), atol=1e-5)  # float32


def test_a_patch_of_the_square_is_its_cell_of_the_picture(model: Blip2):
    """What is painted into one cell of a picture, whatever its shape, changes that patch's embedding and no other's."""
    flat = VisionTransformer(dataclasses.replace(tiny_model.VISION, layers=0)).eval()
    flat.load_state_dict(model.encoder.state_dict(), strict=False)  # pyright: ignore[reportAttributeAccessIssue]
    plain = np.full((60, 112, 3), 120, np.uint8)
    painted = plain.copy()
    painted[30 + 4 : 45 - 4, 28 + 7 : 56 - 7] = 255  # row 2, column 1 of 4 x 4; bicubic resampling reaches 4 pixels
    with torch.no_grad():
        before, after = (flat(model.transform(image.open(picture)))[0] for picture in (plain, painted))
    changed = (after - before).abs().sum(1)
    places = flat.places(before)
    grid = places.grid(changed)
    assert places.count == len(changed)
    assert grid[2, 1] > 0
    assert changed.sum() == grid[2, 1]


def test_a_panel_holds_the_picture_and_a_map_for_every_word(model: Blip2, picture: Image.Image):
    one, six = (explain.draw(picture, explain.match(model, picture, text)) for text in ("dog", TEXT))
    assert six.height > one.height
    assert six.width >= 2 * 420
    assert brightness(six).std() > 10
    drawn = [explain.draw(picture, explain.match(model, picture, TEXT), show) for show in ("evidence", "attention")]
    assert np.asarray(drawn[0])[:400].tolist() != np.asarray(drawn[1])[:400].tolist()


def test_written_words_have_no_attention_to_draw(model: Blip2, picture: Image.Image):
    found = explain.caption(model, picture)
    assert explain.draw(picture, found).width > 0
    with pytest.raises(ConfigError, match="draw their evidence"):
        explain.draw(picture, found, "attention")


@pytest.mark.parametrize("size", [(1, 300), (300, 1), (2000, 40)])
def test_pictures_of_any_shape_are_drawn(model: Blip2, size: tuple[int, int]):
    strip = Image.new("RGB", size, (10, 200, 30))
    assert min(explain.draw(strip, explain.match(model, strip, TEXT)).size) > 96


def test_what_cannot_be_drawn_is_said(model: Blip2, picture: Image.Image):
    found = explain.match(model, picture, "dog " * 400)
    parts = len(found.words)
    assert parts > MOST
    assert found.evidence is not None
    notes = " ".join(_notes(found, "evidence", found.evidence, parts - MOST))
    assert "1 more are not drawn" in notes
    assert f"last {found.unread} tokens" in notes
    share = (found.evidence[0] / found.evidence.sum()).item()
    assert f"On no place of the picture: {share:.0%}" in notes
    many = explain.draw(picture, found)
    fewer = explain.draw(picture, dataclasses.replace(found, words=found.words[:MOST]))
    assert many.height > fewer.height  # by the line that says so
    assert many.height - fewer.height < 50


def test_words_in_any_script_and_of_any_length_fit(model: Blip2, picture: Image.Image):
    drawn = explain.draw(picture, explain.match(model, picture, f"犬 ø\u202e {'x' * 50_000}"))
    assert drawn.width < 2000


def test_a_map_of_nothing_is_drawn_as_nothing():
    grey = Image.new("RGB", (40, 40), (90, 90, 90))
    assert brightness(heat(grey, torch.zeros(2, 2))).std() == 0


def test_more_is_brighter_in_grey_too():
    level: Tensor = torch.linspace(0, 1, 9)
    drawn = heat(Image.new("RGB", (9, 1), (90, 90, 90)), level[None]).convert("L")
    values = np.asarray(drawn)[0].astype(int)
    assert (np.diff(values) > 0).all()
