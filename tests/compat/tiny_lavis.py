"""LAVIS's models at tiny size, and transformers' on the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from published import picture
from torch import Tensor

from blip2.compat.lavis import models

transformers = pytest.importorskip("transformers")

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
CALLS = {"opt": ("blip2_opt", "pretrain_opt2.7b"), "t5": ("blip2_t5", "pretrain_flant5xl")}
PROMPT = "Question: is it day? Answer:"
TEXTS = ["a dog on grass", "two"]


def images(count: int) -> list[Any]:
    return [picture(number) for number in range(count)]


def load(folders: dict[str, Path], name: str, model_type: str) -> tuple[Any, Tensor]:
    """A model, and pixels of three pictures."""
    kind = {call: key for key, call in CALLS.items()}.get((name, model_type), "itm")
    model, pictures, _ = models.load_model_and_preprocess(name, model_type, is_eval=True, checkpoint=folders[kind])
    return model, torch.stack([pictures["eval"](each) for each in images(3)])


def theirs_of(folders: dict[str, Path], kind: str) -> Any:
    """transformers' model, its last vision norm with LAVIS's epsilon."""
    of = transformers.Blip2ForImageTextRetrieval if kind == "itm" else transformers.Blip2ForConditionalGeneration
    model = of.from_pretrained(folders[kind]).eval()
    model.vision_model.post_layernorm.eps = 1e-5
    return model
