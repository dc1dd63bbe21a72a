"""The model card that `save` leaves beside a model: `README.md` with parts, sizes, licences and known risks."""

from __future__ import annotations

from pathlib import Path

from blip2.config import Blip2Config
from blip2.files import replacing
from blip2.weights.inventory import GIB, largest_of, memory_of, parts_of

NAME = "README.md"
MARK = "<!-- written by blip2: it is written anew with the model as long as this line stands -->"


def write(directory: Path, config: Blip2Config) -> None:
    """Write the card of a model; one that somebody wrote or took over stays.

    Raises:
        OSError: the directory cannot be written.
    """
    if is_ours(directory):
        with replacing(directory / NAME) as partial:
            partial.write_text(card(config), encoding="utf-8")


def is_ours(directory: Path) -> bool:
    """Whether the card of a directory may be written: there is none, or one that blip2 wrote."""
    path = directory / NAME
    return not path.is_file() or MARK in path.read_text(encoding="utf-8", errors="replace")


def card(config: Blip2Config) -> str:
    """The card of a configuration, in Markdown."""
    parts = parts_of(config)
    memory = memory_of(config, parts)
    names = ", ".join(part.name for part in parts if part.role != "words")
    lines = ["---", "library_name: blip2", "tags: [blip-2, image-to-text]", "---", MARK, "", "# A BLIP-2 model", ""]
    lines += [f"Made of {names}.", "", "```python", "import blip2", "", 'model = blip2.load("this directory")']
    lines += [
        'model.caption("photo.jpg")' if config.language else 'model.match("photo.jpg", "a dog on a beach")',
        "```",
    ]
    lines += ["", "## Parts", "", "| part | what | parameters | trained | licence |", "|---|---|---|---|---|"]
    for part in parts:
        size = "?" if part.parameters is None else f"{part.parameters:,}"
        what = "yes" if part.trained else "frozen"
        lines.append(f"| {part.role} | {part.name} | {size} | {what} | {part.notice.licence} |")
    if memory:
        lines += ["", f"Together {sum(part.parameters or 0 for part in parts):,} parameters."]
    if largest := largest_of(parts):
        lines.append(f"The largest layer is {largest.name}, with {largest.parameters:,}.")
    if memory:
        lines += ["", "## Memory", "", "GiB of weights by the precision of the frozen parts, without activations.", ""]
        lines += ["| | inference | training the bridge with Adam | training all with Adam |", "|---|---|---|---|"]
        for line in memory:
            all_of_it = "" if line.everything is None else f"{line.everything / GIB:.2f}"
            sizes = f"{line.inference / GIB:.2f} | {line.bridge / GIB:.2f} | {all_of_it}"
            lines.append(f"| {line.precision} | {sizes} |")
    lines += ["", "## Known risks", ""]
    lines += [f"- **{part.name}**: {part.notice.risks}" for part in parts]
    return "\n".join([*lines, ""])
