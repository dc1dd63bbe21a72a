"""An explanation as one picture: what was seen, the whole's map, and one small picture a word or a query."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from blip2.errors import ConfigError
from blip2.explain.maps import Explanation

Shown = Literal["evidence", "attention"]

LARGE, SMALL, LEAST = 420, 200, 96  # pixels: the longer side of pictures, the narrowest column
GAP, LINE, TITLE, HEAD = 12, 18, 15, 40  # pixels: between columns, a line's height, its letters', two lines
COLUMNS = 4
MOST = 32  # small pictures on one panel
NAMED = 0.01  # share from which a patch beside the grid is named
GREY = 0.5  # of the picture's colour is taken away below a map, so that the map's can be told from it
ALPHA = 0.5  # of what is drawn is the map: everywhere, so that more is brighter wherever it lies
INK, PALE = (32, 32, 32), (110, 110, 110)

# From nothing to the largest: dark and cold to bright and warm, its lightness rising evenly enough to be read in grey.
_ANCHORS = ((12, 12, 60), (84, 20, 120), (178, 40, 100), (235, 100, 50), (252, 190, 60), (255, 250, 200))


@dataclass(frozen=True)
class _Tile:
    """A picture with two lines above it: what it is, and a number."""

    picture: Image.Image
    title: str
    value: str = ""


def heat(picture: Image.Image, grid: Tensor) -> Image.Image:
    """A map laid over a picture.

    The model sees the whole picture, squeezed to a square: a cell covers the same share of the picture's width and
    height. Between the cells' middles the map is bilinear.

    Args:
        picture: RGB.
        grid: float[rows, columns], none negative; the largest is drawn brightest.
    """
    values = grid.detach().float().cpu().numpy()
    top = float(values.max())
    scaled = Image.fromarray(values / top if top > 0 else values).resize(picture.size, Image.Resampling.BILINEAR)
    level = np.asarray(scaled).clip(0, 1)  # (H, W)
    grey = np.asarray(picture.convert("L"), np.float32)[..., None]
    base = np.asarray(picture, np.float32) * (1 - GREY) + grey * GREY  # (H, W, 3)
    return Image.fromarray((base * (1 - ALPHA) + _colours(level) * ALPHA).round().astype(np.uint8))


def draw(picture: Image.Image, found: Explanation, show: Shown = "evidence") -> Image.Image:
    """An explanation as a panel.

    Args:
        picture: that was explained, RGB, as `image.open` gives it.
        show: of the words' maps; without a text the queries' attention is drawn.
    Raises:
        ConfigError: attention of words that were written, not matched: they have none in the Q-Former.
    """
    large, small = (_fitted(picture, side) for side in (LARGE, SMALL))
    whole = found.attention.mean(0) if found.evidence is None or show == "attention" else found.evidence
    title = "all queries" if found.evidence is None or show == "attention" else "the whole text"
    grid, parts = found.places.grid, _small(found, show)
    lines = _wrapped(found.text or "the picture", max(LEAST, large.width))
    head = [_Tile(large, lines[0], " ".join(lines[1:])), _Tile(heat(large, grid(whole)), title, _probability(found))]
    tiles = [_Tile(heat(small, grid(values)), name, value) for name, value, values in parts[:MOST]]
    return _page(head, tiles, _notes(found, show, whole, len(parts) - len(tiles)))


def _small(found: Explanation, show: Shown) -> list[tuple[str, str, Tensor]]:
    """Title, number and map of each small picture."""
    if not found.words:
        return [(f"query {number}", "", values) for number, values in enumerate(found.attention)]
    if show == "evidence":
        total = float(sum(word.evidence.sum() for word in found.words)) or 1.0
        return [
            (word.text, f"{word.score:+.2f} · {word.evidence.sum() / total:.0%}", word.evidence) for word in found.words
        ]
    if any(word.attention is None for word in found.words):
        raise ConfigError(
            "these words look at no query that looked at the picture, written or matched beyond the last layer: draw "
            "their evidence, or choose another layer"
        )
    return [(word.text, "", word.attention) for word in found.words if word.attention is not None]


def _probability(found: Explanation) -> str:
    return "" if found.probability is None else f"probability {found.probability:.3g}"


def _notes(found: Explanation, show: Shown, whole: Tensor, left: int) -> list[str]:
    """What the pictures do not show."""
    layers = ", ".join(map(str, found.layers))
    notes = [f"Q-Former layer{'s' * (len(found.layers) > 1)} {layers}. Each map is drawn up to its own largest value."]
    if found.words and show == "evidence":
        what = (
            "by how much the log-odds of the match fall without it"
            if found.kind == "matched"
            else "its log-probability"
        )
        notes.append(f"Below a word: {what}, and its share of all words' evidence.")
    if (total := float(whole.sum())) > 0:
        shares = (found.places.rest(whole) / total).tolist()
        named = [
            f"{name} {share:.0%}" for name, share in zip(found.places.beside, shares, strict=True) if share > NAMED
        ]
        notes.append(f"On no place of the picture: {sum(shares):.0%}{': ' * bool(named)}{', '.join(named)}.")
    if left:
        notes.append(f"{left} more are not drawn.")
    if found.unread:
        notes.append(f"The text is longer than what the model reads: its last {found.unread} tokens are left out.")
    return notes


def _page(head: Sequence[_Tile], tiles: Sequence[_Tile], notes: Sequence[str]) -> Image.Image:
    """Rows of tiles on white, notes below."""
    rows = [head, *(tiles[start : start + COLUMNS] for start in range(0, len(tiles), COLUMNS))]
    widths = [max(LEAST, row[0].picture.width) for row in rows]
    heights = [HEAD + row[0].picture.height + GAP for row in rows]
    width = max(GAP + len(row) * (wide + GAP) for row, wide in zip(rows, widths, strict=True))
    lines = [line for note in notes for line in _wrapped(note, width - 2 * GAP)]
    page = Image.new("RGB", (width, GAP + sum(heights) + LINE * len(lines) + GAP), "white")
    pen, top = ImageDraw.Draw(page), GAP
    for row, wide, high in zip(rows, widths, heights, strict=True):
        for column, tile in enumerate(row):
            left = GAP + column * (wide + GAP)
            pen.text((left, top), _short(tile.title, wide), INK, _font())
            pen.text((left, top + LINE), _short(tile.value, wide), PALE, _font())
            page.paste(tile.picture, (left, top + HEAD))
        top += high
    for number, line in enumerate(lines):
        pen.text((GAP, top + number * LINE), line, PALE, _font())
    return page


def _fitted(picture: Image.Image, side: int) -> Image.Image:
    """The picture with this longer side."""
    share = side / max(picture.size)
    size = max(1, round(picture.width * share)), max(1, round(picture.height * share))
    return picture.resize(size, Image.Resampling.LANCZOS)


def _colours(level: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """float[H, W] from 0 to 1, to float32[H, W, 3] from 0 to 255."""
    at = np.linspace(0, 1, len(_ANCHORS))
    channels = [np.interp(level, at, [colour[channel] for colour in _ANCHORS]) for channel in range(3)]
    return np.stack(channels, axis=-1).astype(np.float32)


@functools.cache
def _font() -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(TITLE)  # Pillow's own, which every installation has


def _short(text: str, width: int) -> str:
    """As much of a line as there is room for."""
    line = " ".join(text[: 4 * width].split())  # no letter is narrower than a quarter of a pixel
    if _font().getlength(line) <= width:
        return line
    while line and _font().getlength(line + "…") > width:
        line = line[:-1]
    return line + "…"


def _wrapped(text: str, width: int) -> list[str]:
    """Lines that fit."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and _font().getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
