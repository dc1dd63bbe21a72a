"""Pictures put together from cut-out stamps, whose number, place and ground are known exactly."""

from __future__ import annotations

import math
import random
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from questions import plural, with_article
from stamps import GROUNDS, SIDE, Stamp, cut_out

NUMBERS = ("one", "two", "three", "four", "five")
_NAME = re.compile(r"an? ([a-z-]+(?: [a-z-]+){0,2})[.!]?", re.IGNORECASE)


def ground(name: str, draw: random.Random) -> Image.Image:
    """A square of one colour: plain, fading, or grainy."""
    colour = np.array(GROUNDS[name], dtype=np.float64)
    square = np.broadcast_to(colour, (SIDE, SIDE, 3)).copy()
    kind = draw.choice(("plain", "fading", "grainy"))
    if kind == "fading":
        fade = np.linspace(draw.uniform(0.7, 0.95), draw.uniform(1.0, 1.15), SIDE)
        square *= (fade[:, None, None], fade[None, :, None])[draw.randrange(2)]
    elif kind == "grainy":
        noise = np.random.default_rng(draw.getrandbits(32)).normal(0, 14, (SIDE // 4, SIDE // 4, 1))
        square += np.kron(noise, np.ones((4, 4, 1)))
    return Image.fromarray(square.clip(0, 255).astype(np.uint8))


@dataclass(frozen=True)
class Part:
    """A cut-out and the name that captions give it: `green apple`."""

    path: Path
    name: str
    concept: str


def usable(stamps: Sequence[Stamp]) -> dict[str, list[Part]]:
    """Photographs of one thing whose title is just its name, by concept."""
    parts: dict[str, list[Part]] = defaultdict(list)
    for stamp in stamps:
        match = _NAME.fullmatch(stamp.title)
        name = match[1].lower() if match else ""
        if stamp.photograph and name.split(" ")[-1] == stamp.noun and " of " not in name:
            parts[stamp.concept].append(Part(stamp.path, name, stamp.concept))
    return dict(parts)


def place(canvas: Image.Image, part: Part, cell: tuple[int, int], cells: int, draw: random.Random) -> None:
    """Put a cut-out into a cell (column, row) of a grid, so that none hides another; size and place are drawn."""
    room = SIDE / cells
    picture = cut_out(part.path)
    scale = draw.uniform(0.7, 0.97) * room / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    left = round(cell[0] * room + draw.uniform(0, room - size[0]))
    top = round(cell[1] * room + draw.uniform(0, room - size[1]))
    resized = picture.resize(size, Image.Resampling.BICUBIC)
    canvas.paste(resized, (left, top), resized)


def compose(number: int, parts: Mapping[str, Sequence[Part]], folder: Path, seed: int) -> dict[str, Any]:
    """Draw composite `number`: several of one thing, or two things beside each other; returns its row."""
    draw = random.Random(f"{seed} composite {number}")
    colour = draw.choice(sorted(GROUNDS))
    canvas = ground(colour, draw)
    first, second = (draw.choice(parts[concept]) for concept in draw.sample(sorted(parts), 2))
    if draw.random() < 0.5:
        captions, pairs = _several(canvas, first, colour, draw)
    else:
        captions, pairs = _two(canvas, first, second, draw)
    pairs.append(("what color is the background?", colour))
    name = f"composite-{number:05d}"
    canvas.save(folder / f"{name}.jpg", quality=92)
    return {"id": name, "image": f"{folder.name}/{name}.jpg", "captions": captions, "questions": pairs}


def _several(
    canvas: Image.Image, part: Part, colour: str, draw: random.Random
) -> tuple[list[str], list[tuple[str, str]]]:
    """One to five of one thing."""
    count = draw.randint(1, len(NUMBERS))
    cells = math.ceil(math.sqrt(count))
    for cell in draw.sample([(column, row) for column in range(cells) for row in range(cells)], count):
        place(canvas, part, cell, cells, draw)
    things = with_article(part.name) if count == 1 else f"{NUMBERS[count - 1]} {plural(part.name)}"
    captions = [things, f"{things} on a {colour} background"]
    return captions, [(f"how many {plural(part.name)} are there?", NUMBERS[count - 1])]


def _two(canvas: Image.Image, left: Part, right: Part, draw: random.Random) -> tuple[list[str], list[tuple[str, str]]]:
    """One thing to the left of another."""
    row = draw.randrange(2)
    place(canvas, left, (0, row), 2, draw)
    place(canvas, right, (1, row), 2, draw)
    one, other = with_article(left.name), with_article(right.name)
    captions = [f"{one} and {other}", f"{one} to the left of {other}", f"{other} to the right of {one}"]
    return captions, [
        (f"what is to the left of the {right.name}?", one),
        (f"what is to the right of the {left.name}?", other),
        (f"where is the {left.name}?", "on the left"),
        (f"where is the {right.name}?", "on the right"),
    ]
