"""Every precision against float32: how often captions agree, and how far apart the words' probabilities are.

    python -m benchmarks.precision [--images FOLDER] [--count N] [--threads N]
    python -m benchmarks.precision --geometry FOLDER [--layers N]

Of `mini`, or of OPT-2.7b's geometry with made-up weights and so many layers in each tower, written into FOLDER where it
is not there yet. Pictures are noise where no folder of JPEGs is given. The model captions in float32, five beams; then
each precision captions the same pictures, and reads float32's words one after another: `KL` is the mean divergence of
its next word from float32's, in nats, `same word` how often both think the same the likeliest. Then the kernels.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks import geometry
from blip2 import image, kernels
from blip2.blip2 import Blip2
from blip2.config import PRESETS
from blip2.loading import load
from blip2.model import prefix

PRECISIONS: Mapping[str, Mapping[str, str]] = {
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": "float32", "quantize": "int8"},
    "int8, bfloat16": {"dtype": "bfloat16", "quantize": "int8"},
    "fp8": {"dtype": "float32", "quantize": "fp8"},
    "int4": {"dtype": "float32", "quantize": "int4"},
}
NEW_TOKENS = 16


@dataclass(frozen=True)
class Read:
    """What a model says of pictures.

    Attributes:
        texts: its captions.
        ids: their tokens.
        words: of each picture float32[T, V], log-probabilities of each next word after those of the reference.
    """

    texts: list[str]
    ids: list[list[int]]
    words: list[Tensor]


@torch.inference_mode()
def read(model: Blip2, pictures: Sequence[Any], written: list[list[int]] | None = None) -> Read:
    """Captions, and the probabilities of each next word.

    Args:
        written: tokens to read for each picture; its own where None.
    """
    found = model.caption(list(pictures), max_new_tokens=NEW_TOKENS, details=True)
    ids = [list(each.ids) for each in found]
    words = [_words(model, each, row) for each, row in zip(pictures, written or ids, strict=True)]
    return Read([each.text for each in found], ids, words)


def _words(model: Blip2, picture: Any, ids: Sequence[int]) -> Tensor:
    language, tokenizer = model.writer()
    visual = model.bridge.project(model.encode(picture).queries)
    prompts = tokenizer.prompts([model.config.prompts.caption])
    embeds, lengths = prefix.build(language, visual, prompts, tokenizer.bos, model.config.prompts.visual)
    logits, cache = language.prefill(embeds, lengths)
    rows = [logits]
    rows.extend(language.step(torch.tensor([token]), cache) for token in ids[:-1])
    return torch.cat(rows).float().log_softmax(-1)


def apart(exact: Read, other: Read) -> dict[str, float]:
    """How far another precision is from the exact one."""
    divergence: list[Tensor] = []
    same: list[Tensor] = []
    for ours, theirs in zip(exact.words, other.words, strict=True):
        possible = ours > float("-inf")  # some models write a part of their words only
        change = torch.where(possible, ours.exp() * (ours - theirs), 0.0)
        divergence.append(change.sum(-1))
        same.append((ours.argmax(-1) == theirs.argmax(-1)).float())
    kl = torch.cat(divergence)
    captions = [one == two for one, two in zip(exact.texts, other.texts, strict=True)]
    return {
        "same captions": sum(captions) / len(captions),
        "same word": float(torch.cat(same).mean()),
        "KL": float(kl.mean()),
        "largest KL": float(kl.max()),
    }


def report(name: Path | None, pictures: Sequence[Any], precisions: Sequence[str]) -> dict[str, dict[str, float]]:
    """Each precision's distance from float32; one model in memory at a time."""
    exact = read(load(name, device="cpu", dtype="float32"), pictures)
    table: dict[str, dict[str, float]] = {}
    for precision in precisions:
        model = load(name, device="cpu", **PRECISIONS[precision])
        table[precision] = apart(exact, read(model, pictures, exact.ids))
        line = ", ".join(f"{key} {value:.4g}" for key, value in table[precision].items())
        print(f"{precision}: {line}", flush=True)
    return table


def pictures_of(folder: Path | None, count: int) -> list[Any]:
    """The first pictures of a folder, or noise."""
    if folder is not None:
        return [image.open(path) for path in sorted(folder.glob("*.jp*g"))[:count]]
    draw = np.random.default_rng(0)
    noise = [draw.integers(0, 256, (30, 40, 3), dtype=np.uint8) for _ in range(count)]
    return [Image.fromarray(each).resize((320, 240)) for each in noise]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path)
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--geometry", type=Path, metavar="FOLDER")
    parser.add_argument("--layers", type=int, default=4, help="of each tower of the geometry")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.geometry is not None:
        geometry.write(geometry.shortened(PRESETS["pretrain_opt2.7b"], given.layers), given.geometry)
    report(given.geometry, pictures_of(given.images, given.count), given.precisions)
    for precision, kernel in kernels.chosen().items():
        print(f"{precision} weights on this CPU: {kernel}")


if __name__ == "__main__":
    main()
