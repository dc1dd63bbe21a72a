"""What blip2 does, on photographs that lie in scikit-image's wheel: caption, ask, match, search.

    python examples/demo.py [MODEL]

Prints a report and draws the captions under the photographs in runs/demo/contact-sheet.png. Nothing is downloaded, and
none of the photographs was trained on.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.table import Table

import blip2

PHOTOGRAPHS = ("astronaut.png", "camera.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg")
QUESTIONS = {
    "astronaut.png": ("what is the woman wearing?", "is there a dog in the picture?"),
    "chelsea.png": ("what animal is this?", "what color is the cat?"),
    "coffee.png": ("how many cups are there?", "what color is the cup?"),
}
CHOICES = {"camera.png": ("what is the man doing?", ("taking a picture", "riding a bike", "swimming"))}
TEXTS = ("a cat looking at the camera", "a cup of coffee on a table", "a rocket on its launch pad")
SEARCHES = ("a man taking a picture", "something to drink", "a vehicle with two wheels")
OUT = Path("runs/demo")
TILE, MARGIN, TEXT_HEIGHT = 300, 16, 64  # pixels of the contact sheet


def main() -> None:
    console = Console(highlight=False)
    started = time.perf_counter()
    with console.status("loading the model (the first time converts its language model: about a minute)"):
        model = blip2.load(sys.argv[1] if len(sys.argv) > 1 else None)
    loaded = time.perf_counter()
    files = photographs(OUT / "photographs")
    features = model.encode(files)  # once, for everything below

    captions = model.caption(features)
    heading(console, "caption")
    show(console, ("photograph", "what the model says"), zip(map(name, files), captions, strict=True))

    heading(console, "ask")
    show(console, ("photograph", "question", "answer"), answers(model, features, files))

    heading(console, "match: probability that photograph and text belong together (cosine)")
    matches = model.match(features, TEXTS)
    rows = (
        (name(file), *(f"{itm:.2f} ({itc:.2f})" for itm, itc in zip(*scores, strict=True)))
        for file, *scores in zip(files, matches.itm.tolist(), matches.itc.tolist(), strict=True)
    )
    show(console, ("photograph", *TEXTS), rows)

    heading(console, "search")
    index = blip2.ImageIndex.build(model, [OUT / "photographs"])
    nearest = ((text, *(f"{name(hit.path)} {hit.score:.2f}" for hit in index.search(text, 3))) for text in SEARCHES)
    show(console, ("text", "nearest", "second", "third"), nearest)

    sheet = OUT / "contact-sheet.png"
    contact_sheet(files, captions).save(sheet)
    console.print(f"\n{loaded - started:.1f} s to load, {time.perf_counter() - loaded:.1f} s to answer; see {sheet}")


def photographs(folder: Path) -> list[Path]:
    """Copies of the photographs, so that search has a folder to look in."""
    found = find_spec("skimage")
    if found is None or found.origin is None:
        raise SystemExit('the demo shows photographs of scikit-image: pip install "blip2[demo]"')
    folder.mkdir(parents=True, exist_ok=True)
    return [Path(shutil.copy(Path(found.origin).parent / "data" / file, folder)) for file in PHOTOGRAPHS]


def answers(model: blip2.Blip2, features: blip2.ImageFeatures, files: Sequence[Path]) -> Iterable[tuple[str, ...]]:
    """Rows of photograph, question and answer: free, then the likeliest of given ones."""
    places = {file.name: row for row, file in enumerate(files)}
    for file, questions in QUESTIONS.items():
        for question, answer in zip(questions, model.ask(features[places[file]], questions), strict=True):
            yield name(Path(file)), question, answer
    for file, (question, choices) in CHOICES.items():
        best = model.ask(features[places[file]], question, choices=choices)[0]
        yield name(Path(file)), f"{question} ({', '.join(choices)})", best


def contact_sheet(files: Sequence[Path], captions: Sequence[str], columns: int = 3) -> Image.Image:
    """The photographs in rows, each with its caption under it."""
    lines = -(-len(files) // columns)
    step_x, step_y = TILE + MARGIN, TILE + TEXT_HEIGHT + MARGIN
    sheet = Image.new("RGB", (columns * step_x + MARGIN, lines * step_y + MARGIN), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(17)
    for number, (file, caption) in enumerate(zip(files, captions, strict=True)):
        left, top = MARGIN + number % columns * step_x, MARGIN + number // columns * step_y
        picture = Image.open(file).convert("RGB")
        side = min(picture.size)
        x, y = (picture.width - side) // 2, (picture.height - side) // 2
        sheet.paste(picture.crop((x, y, x + side, y + side)).resize((TILE, TILE)), (left, top))
        draw.multiline_text((left, top + TILE + 6), wrapped(caption, draw, font), "black", font)
    return sheet


def wrapped(text: str, draw: ImageDraw.ImageDraw, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> str:
    """The text in lines that are no wider than a photograph."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if draw.textlength(longer, font) <= TILE:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines)


def name(file: Path) -> str:
    return file.stem.removesuffix("_left")


def heading(console: Console, text: str) -> None:
    console.print(f"\n[bold]{text}[/bold]")


def show(console: Console, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)


if __name__ == "__main__":
    main()
