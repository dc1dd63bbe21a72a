"""A tiny published model on disk, as transformers writes it, and pictures told in its words: what fine-tuning needs."""

from __future__ import annotations

import csv
import random
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import blip2
import published
from blip2.blip2 import Blip2
from blip2.train.loop import train
from blip2.train.recipe import parse
from blip2.train.report import Report

COLOURS = {"w1": (255, 0, 0), "w2": (0, 255, 0), "w3": (0, 0, 255), "w4": (255, 255, 0)}


def model(kind: str, place: Path) -> Path:
    """A model that writes, its language model `opt` or `t5`."""
    published.loaded(published.config(getattr(published, kind)()), place)
    return place


def pictures(root: Path, count: int = 16) -> Path:
    """Pictures of one colour each, captioned by the colour's word; the path of their table."""
    root.mkdir(parents=True)
    draw = random.Random(0)
    with (root / "captions.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "caption"])
        for number in range(count):
            word, colour = list(COLOURS.items())[number % len(COLOURS)]
            shade = tuple(min(255, value + draw.randrange(40)) for value in colour)
            Image.new("RGB", (28, 28), shade).save(root / f"{number:02d}.png")
            table.writerow([f"{number:02d}.png", f"w9 {word}"])
    return root / "captions.csv"


def recipe(data: Path, start: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """A short run of stage 2."""
    values = {
        "stage": 2, "start": str(start), "output": str(output), "data": str(data), "steps": 2, "batch_size": 8,
        "lr": 1e-3, "min_lr": 0, "clip": 1.0, "workers": 0, "text_length": 8, "device": "cpu", "precision": "fp32",
        "prefix_lm": False, "features": {"augment": False}, "save_every": 3,
    }  # fmt: skip
    return values | changes


def run(data: Path, start: Path, output: Path, **changes: Any) -> Report:
    """Train."""
    return train(parse(recipe(data, start, output, **changes)))


def load(place: Path) -> Blip2:
    """A model on the CPU, in float32."""
    return blip2.load(place, device="cpu", dtype="float32")


def said(model: Blip2) -> list[tuple[float, ...]]:
    """How sure a model is of what it says of three pictures, word by word."""
    found = model.caption(published.pictures(3), details=True, num_beams=1, max_new_tokens=5)
    return [each.log_probs for each in found]


def weights(part: Any) -> dict[str, torch.Tensor]:
    """Of a part of a model."""
    return {name: tensor.detach().clone() for name, tensor in part.state_dict().items()}


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    """Names of the tensors that differ."""
    assert before.keys() == after.keys()
    return {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
