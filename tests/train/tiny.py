"""Made-up parts that train in seconds: an encoder of raw patches, a one-layer language model, pictures of shapes.

Letters: B rows, P patches, S prefix positions, T target positions, D width, V words.
"""

from __future__ import annotations

import csv
import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn

from blip2 import image
from blip2.config import PartConfig, QFormerConfig
from blip2.model.qformer import QFormer
from blip2.text import Tokenizer
from blip2.train.loop import train
from blip2.train.parts import Parts
from blip2.train.recipe import parse
from blip2.train.report import Report
from blip2.weights import load
from blip2.weights.bert import EMBEDDINGS, LAYER

COLOURS = ("red", "green", "blue", "yellow", "black", "white")
SHAPES = ("circle", "square", "cross")
SIZES = ("small", "big")
PLACES = ("top left", "top right", "bottom left", "bottom right")
WORDS = ("[PAD]", "[CLS]", "[SEP]", "[DEC]", "[UNK]", "a", "at", "the", *COLOURS, *SHAPES, *SIZES)
WORDS += tuple(dict.fromkeys(" ".join(PLACES).split()))
SIDE, PATCH, WIDTH, LANGUAGE_WIDTH = 24, 6, 32, 32


def model(**qformer: Any) -> dict[str, Any]:
    """The `model` section of a recipe for the tiny parts."""
    sizes = {"width": 96, "layers": 1, "heads": 4, "mlp_width": 96, "queries": 4, "encoder_width": WIDTH}
    words = {"vocab_size": len(WORDS), "positions": 16, "cls_id": 1, "sep_id": 2, "decoder_id": 3, "dropout": 0.0}
    return {
        "vision": {"name": "tiny-encoder", "width": WIDTH},
        "language": {"name": "tiny-language", "width": LANGUAGE_WIDTH},
        "qformer": sizes | words | qformer,
        "embedding_width": 32,
        "prompts": {"visual": "after_bos"},
    }


def recipe(data: Path | list[dict[str, Any]], output: Path, **changes: Any) -> dict[str, Any]:
    """A short run as plain data."""
    values = {
        "stage": 1,
        "output": str(output),
        "model": model(),
        "data": data if isinstance(data, list) else str(data),
        "steps": 12,
        "batch_size": 16,
        "lr": 1e-3,
        "clip": 1.0,
        "workers": 0,
        "save_every": 4,
        "text_length": 16,
        "device": "cpu",
        "precision": "fp32",
        "features": {"augment": False},
    }
    return values | changes


def run(data: Path | list[dict[str, Any]], output: Path, **changes: Any) -> Report:
    """Train on the tiny parts."""
    return train(parse(recipe(data, output, **changes)), parts())


def bridge(output: Path) -> dict[str, Tensor]:
    """The weights of a run's model."""
    return load(output / "model").bridge.state_dict()


def parts() -> Parts:
    """The frozen parts, the same in every process."""
    encoder, language = TinyEncoder(), TinyLanguage()
    return Parts(
        encoder=lambda: encoder,
        text=lambda: TinyText(tokenizer(frame=(1, 2))),
        language=lambda: (language, tokenizer()),
        digest=lambda part: f"{part.name} of the tests" if isinstance(part, PartConfig) else "",
    )


@dataclass(frozen=True)
class TinyText:
    """In the place of `adapters.TextPart`."""

    tokenizer: Tokenizer

    @property
    def weights(self) -> dict[str, Tensor]:
        """By BERT's names, of random values; a Q-Former starts from them where the model names a text part."""
        with torch.random.fork_rng([]):
            torch.manual_seed(3)
            state = QFormer(QFormerConfig(**model()["qformer"])).state_dict()
        bert = {theirs: state[ours] for theirs, ours in EMBEDDINGS.items()}
        for theirs, (ours, *_) in LAYER.items():
            bert |= {
                f"encoder.layer.0.{theirs}.{kind}": state[f"layers.0.{ours}.{kind}"] for kind in ("weight", "bias")
            }
        return bert


def tokenizer(frame: tuple[int, int] | None = None) -> Tokenizer:
    """A word a token."""
    words = tokenizers.models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]")
    rust = tokenizers.Tokenizer(words)
    rust.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return Tokenizer(rust, bos=1, pad=0, stop_ids=(2,), frame=frame)


class TinyEncoder(nn.Module):
    """Each patch's own pixels and its place, mixed by a fixed random matrix."""

    width, image_size, mean, std = WIDTH, SIDE, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)

    def __init__(self) -> None:
        super().__init__()
        across = SIDE // PATCH
        place = torch.cartesian_prod(torch.linspace(-1, 1, across), torch.linspace(-1, 1, across))  # (P, 2)
        self.register_buffer("place", place)
        mix = torch.randn(3 * PATCH**2 + 2, WIDTH, generator=torch.Generator().manual_seed(1))
        self.register_buffer("mix", mix / math.sqrt(len(mix)))

    def forward(self, pixels: Tensor) -> Tensor:
        """float[B, 3, S, S] to float[B, P, D]."""
        patches = F.unfold(pixels, PATCH, stride=PATCH).transpose(1, 2)  # (B, P, 3 * PATCH ** 2)
        place = self.place.expand(len(patches), -1, -1)
        return torch.cat([patches, place], dim=2) @ self.mix

    classes = len(COLOURS)

    def prototypes(self, classes: Sequence[int], draws: Sequence[int]) -> Tensor:  # noqa: ARG002 (all draws are one)
        """A picture full of each class's colour, in the place of a classifier's rows: float[B, P, D]."""
        full = [Image.new("RGB", (SIDE, SIDE), tuple(COLOURS)[which]) for which in classes]
        return self(image.Transform(SIDE, self.mean, self.std)(full))


class TinyLanguage(nn.Module):
    """A causal language model of one attention layer with fixed random weights."""

    width, vocab_size, context = LANGUAGE_WIDTH, len(WORDS), 64

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng([]):
            torch.manual_seed(2)
            self.words = nn.Embedding(len(WORDS), LANGUAGE_WIDTH)
            self.place = nn.Embedding(self.context, LANGUAGE_WIDTH)
            self.layer = nn.TransformerEncoderLayer(LANGUAGE_WIDTH, 4, 64, dropout=0.0, batch_first=True)

    def embed(self, ids: Tensor) -> Tensor:
        """int64[...] to float[..., D]."""
        return self.words(ids)

    def log_probs(
        self,
        prefix: Tensor,
        lengths: Tensor,
        targets: Tensor,
        vocabulary: Tensor | None = None,
        alike: tuple[Tensor, int] | None = None,  # noqa: ARG002
    ) -> Tensor:
        """As the protocol says: rows are packed to the left, and what is causal cannot see the padding on the right."""
        real = [target[target != -100] for target in targets]
        rows = [torch.cat([x[:n], self.embed(ids[:-1])]) for x, n, ids in zip(prefix, lengths, real, strict=True)]
        x = nn.utils.rnn.pad_sequence(rows, batch_first=True)  # (B, S + T - 1, D)
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device)
        hidden = self.layer(x + self.place.weight[: x.shape[1]], src_mask=mask)
        words = self.words.weight if vocabulary is None else self.words.weight[vocabulary]
        scores = (hidden @ words.T).log_softmax(-1).float()  # (B, S + T - 1, V)
        index = targets.clamp_min(0) if vocabulary is None else torch.searchsorted(vocabulary, targets.clamp_min(0))
        place = (lengths[:, None] - 1 + torch.arange(targets.shape[1], device=x.device)).clamp_max(x.shape[1] - 1)
        chosen = scores[torch.arange(len(x), device=x.device)[:, None], place, index.clamp_max(len(words) - 1)]
        return chosen * (targets != -100)


def draw_shapes(root: Path, count: int, seed: int) -> Path:
    """Pictures with a caption each, all captions different as long as they last; the path of their table."""
    root.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)
    kinds = list(itertools.product(SIZES, COLOURS, SHAPES, PLACES))
    draw.shuffle(kinds)
    with (root / "captions.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "caption"])
        for number, (size, colour, shape, place) in enumerate(itertools.islice(itertools.cycle(kinds), count)):
            name = f"{number:04d}.png"
            _picture(draw, size, colour, shape, place).save(root / name)
            small = "small " if size == "small" else ""  # captions of two lengths
            table.writerow([name, f"a {small}{colour} {shape} at the {place}"])
    return root / "captions.csv"


def _picture(draw: random.Random, size: str, colour: str, shape: str, place: str) -> Image.Image:
    picture = Image.new("RGB", (SIDE, SIDE), (120 + draw.randrange(16),) * 3)
    side = 10 if size == "big" else 5
    rows, columns = place.split()
    left = (SIDE // 2 if columns == "right" else 0) + draw.randrange(SIDE // 2 - side)
    top = (SIDE // 2 if rows == "bottom" else 0) + draw.randrange(SIDE // 2 - side)
    box = (left, top, left + side, top + side)
    pen = ImageDraw.Draw(picture)
    if shape == "circle":
        pen.ellipse(box, fill=colour)
    elif shape == "square":
        pen.rectangle(box, fill=colour)
    else:
        pen.line(box, fill=colour, width=2)
        pen.line((left, top + side, left + side, top), fill=colour, width=2)
    return picture
