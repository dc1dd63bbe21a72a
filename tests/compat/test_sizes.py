"""The sizes that the documentation sets against the documents' own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from blip2.config import PRESETS, OPTConfig, T5Config, VisionConfig
from blip2.model.bridge import Bridge
from blip2.model.vision import VisionTransformer
from blip2.weights.transformers import build_language

PAGE = (Path(__file__).parents[2] / "docs" / "compatibility.md").read_text(encoding="utf-8")
TYPES = {
    "blip2-opt-2.7b": "pretrain_opt2.7b",
    "blip2-opt-6.7b": "pretrain_opt6.7b",
    "blip2-flan-t5-xl": "pretrain_flant5xl",
    "blip2-flan-t5-xxl": "pretrain_flant5xxl",
}


@pytest.mark.parametrize("name", TYPES)
def test_the_table_of_sizes_is_right(name: str):
    config = PRESETS[TYPES[name]]
    assert isinstance(config.vision, VisionConfig)
    assert isinstance(config.language, OPTConfig | T5Config)
    with torch.device("meta"):
        parts = VisionTransformer(config.vision), Bridge(config), build_language(config.language)
    zeros = config.vision.layers * config.vision.width  # transformers stores a bias for the keys too
    count = sum(parameter.numel() for part in parts for parameter in part.parameters()) + zeros
    row = re.search(rf"^\| {re.escape(name)} \| ([\d,]+) \|(.+)\|$", PAGE, re.MULTILINE)
    assert row is not None
    assert int(row[1].replace(",", "")) == count
    sizes = [f"{count * width / 2**30:.2f} GiB" for width in (4, 2, 1, 0.5)]
    assert [cell.strip() for cell in row[2].split("|")] == sizes
