"""Coloured pictures, and a model that sees nothing but their colours."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from blip2 import image
from blip2.results import ImageFeatures, Matches
from blip2.search import Hit

QUERIES, WIDTH, SIDE = 3, 8, 32
ROOM = 35  # words that are read of a text


def unit(values: Tensor) -> Tensor:
    return torch.nn.functional.normalize(values, dim=-1)


class Fake:
    """Vectors drawn from an image's colour or a text's letters; a match is likelier the greener the image."""

    def __init__(self, identity: str = "fake", seconds: float = 0.0) -> None:
        self.identity = identity
        self.encoded = 0
        self.seconds = seconds  # an image takes
        self.transform = image.Transform(SIDE, (0.5,) * 3, (0.5,) * 3)
        self.device = torch.device("cpu")

    def encode(self, images: Any) -> ImageFeatures:
        if isinstance(images, ImageFeatures):
            return images
        self.encoded += len(images)
        time.sleep(self.seconds * len(images))
        colours = [np.asarray(picture)[0, 0].tolist() for picture in images]
        seeds = [int.from_bytes(bytes(colour), "big") for colour in colours]
        vectors = [unit(torch.randn(QUERIES, WIDTH, generator=torch.Generator().manual_seed(s))) for s in seeds]
        patches = torch.tensor(colours, dtype=torch.float32)[:, None]  # (B, 1, 3)
        return ImageFeatures(patches, torch.zeros(len(images), QUERIES, 1), torch.stack(vectors))

    def embed_images(self, images: Any) -> Tensor:
        return self.encode(images).vectors

    def embed_texts(self, texts: Any) -> Tensor:
        seeds = [sum(text.encode()) for text in texts]
        return torch.stack([unit(torch.randn(WIDTH, generator=torch.Generator().manual_seed(s))) for s in seeds])

    def unread(self, text: str) -> int:
        return max(0, len(text.split()) - ROOM)

    def match(self, images: Any, texts: Any) -> Matches:
        green = self.encode(images).patches[:, 0, 1] / 255
        itm = green[:, None].expand(-1, len(texts))
        return Matches(itm, torch.zeros_like(itm), itm.logit(eps=1e-6))


def paint(folder: Path, colours: dict[str, tuple[int, int, int]]) -> Path:
    for name, colour in colours.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (2, 2), colour).save(folder / name)
    return folder


def rainbow(folder: Path, count: int = 12) -> Path:
    return paint(folder, {f"{n:02}.png": (n % 256, 20 * n % 256, (255 - n) % 256) for n in range(count)})


def names(hits: list[Hit]) -> list[str]:
    return [hit.path.name for hit in hits]
