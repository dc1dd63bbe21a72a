"""The snippets of the documents that people copy from: that they are the documents' own lines, and what is run of them.

`seeds/000.txt`, `003.txt` and `004.txt` hold the documents' code and nothing else, a blank line between two snippets.
004 has lost its indentation, so every snippet also lies as a file that runs: `NUMBER_TOPIC.py`, `004_transformers_*.py`
and `004_lavis_*.py`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

SEEDS = Path(__file__).parent / "seeds"
PICTURE = "https://storage.googleapis.com/sfr-vision-language-research/BLIP/demo.jpg"

# What does not run as it stands: file, the document's line, ours. An empty line of the document is a line added.
_RAW_IMAGE = ("", 'raw_image = Image.open("photo.jpg").convert("RGB")')  # used, and never made
REPAIRS: dict[str, list[tuple[str, str]]] = {
    "004_lavis_features": [_RAW_IMAGE],
    "004_lavis_matching": [_RAW_IMAGE],
    "004_lavis_search": [
        (
            'engine.index_images(["img1.jpg", "img2.jpg", "img3.jpg", ...])',
            'engine.index_images(["img1.jpg", "img2.jpg", "img3.jpg"])',
        )
    ],
}

# Import lines, which is what a person changes.
IMPORTS = {
    "from transformers import": "from blip2.compat.transformers import",
    "from paddlenlp.transformers import": "from blip2.compat.paddlenlp.transformers import",
    "from lavis.models import": "from blip2.compat.lavis.models import",
}

# Snippets that go on where another ended.
AFTER = {
    "004_lavis_features": "004_lavis_caption",
    "004_lavis_matching": "004_lavis_caption",
    "004_lavis_output": "004_lavis_features",
    "004_transformers_question": "004_transformers_caption",
    "004_transformers_batch": "004_transformers_caption",
    "004_transformers_control": "004_transformers_batch",
    "004_transformers_quantize": "004_transformers_caption",
    "004_transformers_output": "004_transformers_batch",
    "004_transformers_speed": "004_transformers_caption",
    "004_transformers_visual_qa": "004_transformers_captioner",
}


def names(pattern: str = "*") -> list[str]:
    """The snippets, such as `000_cpu`."""
    return sorted(path.stem for path in SEEDS.glob(f"{pattern}.py"))


def source(name: str) -> str:
    return (SEEDS / f"{name}.py").read_text(encoding="utf-8")


def lines(text: str) -> list[str]:
    """A text's lines without the white space around them, empty ones left out."""
    return [line.strip() for line in text.splitlines() if line.strip()]


def blocks(document: str) -> list[list[str]]:
    """The snippets of a document, `000`, `003` or `004`, as lines."""
    text = (SEEDS / f"{document}.txt").read_text(encoding="utf-8")
    return [lines(block) for block in text.split("\n\n")]


def unrepaired(name: str) -> list[str]:
    """A snippet's lines as the document has them."""
    back = {ours: theirs for theirs, ours in REPAIRS.get(name, [])}
    found = [back.get(line, line) for line in lines(source(name))]
    return [line for line in found if line]


def place(name: str) -> int | None:
    """Which snippet of its document this is; None where its lines are not those of one."""
    found = [number for number, block in enumerate(blocks(name[:3])) if block == unrepaired(name)]
    return found[0] if found else None


def substituted(code: str, url: str) -> str:
    """A snippet as it runs here: import lines, the picture's address, and the device where there is no GPU."""
    for theirs, ours in IMPORTS.items():
        code = re.sub(rf"^{re.escape(theirs)}", ours, code, flags=re.MULTILINE)
    code = code.replace(PICTURE, url)
    return code if torch.cuda.is_available() else code.replace('.to("cuda"', '.to("cpu"')


def run(name: str, url: str) -> dict[str, Any]:
    """Run a snippet, after those that it goes on from; what it left behind."""
    chain = [name]
    while chain[0] in AFTER:
        chain.insert(0, AFTER[chain[0]])
    left: dict[str, Any] = {"__name__": name}
    for each in chain:
        exec(compile(substituted(source(each), url), f"{each}.py", "exec"), left)
    return left
