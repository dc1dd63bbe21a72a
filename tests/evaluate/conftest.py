"""A model with a tiny random bridge that names colours, and pictures of one colour."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from PIL import Image

from blip2.blip2 import Blip2
from blip2.config import Blip2Config, PartConfig, QFormerConfig
from blip2.model.bridge import Bridge
from blip2.results import Generation
from blip2.text import Tokenizer

COLOURS = {"red": (250, 0, 0), "green": (0, 250, 0), "blue": (0, 0, 250), "white": (250, 250, 250)}
CONFIG = Blip2Config(
    vision=PartConfig("colours", 6),
    qformer=QFormerConfig(
        width=16, layers=2, heads=2, mlp_width=32, queries=3, encoder_width=6, vocab_size=20, positions=40, cls_id=1,
        sep_id=2, decoder_id=3, text_pooling="mean",
    ),
    embedding_width=8,
)  # fmt: skip


class Colours:
    """Patches that are the mean colours of four quarters, twice."""

    width, image_size, mean, std = 6, 8, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        quarters = torch.nn.functional.adaptive_avg_pool2d(pixels, 2).flatten(2).mT  # (B, 4, 3)
        return torch.cat([quarters, quarters], dim=-1)


def said(text: str) -> Generation:
    """What a model says of itself beside a text: longer ones are less sure."""
    return Generation(text, (), (), -float(len(text)), "stop")


class Namer(Blip2):
    """Writes the name of the colour that it sees: what the language model would do."""

    def caption(self, images: Any, _prompt: Any = None, **_options: Any) -> Any:
        return [said(f"a {self._colour(patches)} square") for patches in self.encode(images).patches]

    def ask(self, images: Any, _questions: Any, **_options: Any) -> Any:
        return [said(self._colour(patches)) for patches in self.encode(images).patches]

    def _colour(self, patches: torch.Tensor) -> str:
        seen = (patches[:, :3].mean(0) * 0.25 + 0.5) * 255
        return min(COLOURS, key=lambda name: float((seen - torch.tensor(COLOURS[name])).abs().sum()))


@pytest.fixture(scope="module")
def model() -> Namer:
    return namer()


def namer() -> Namer:
    """The model."""
    torch.manual_seed(0)
    words = ["[PAD]", "[CLS]", "[SEP]", "[DEC]", "[UNK]", "a", "square", "of", *COLOURS]
    rust = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]")
    )
    rust.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = Tokenizer(rust, bos=None, pad=0, stop_ids=(2,), frame=(1, 2))
    bridge = Bridge(CONFIG).eval().requires_grad_(False)
    return Namer(CONFIG, Colours(), bridge, None, None, tokenizer, torch.device("cpu"), identity="colours")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, colour in COLOURS.items():
        Image.new("RGB", (8, 8), colour).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(f"A {name} square .\na square of {name}\n")
    return tmp_path
