"""Published architectures with made-up weights, in the files that transformers writes."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tokenizers
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from blip2.config import Blip2Config, OPTConfig, T5Config, VisionConfig
from blip2.model.bridge import Bridge
from blip2.model.vision import VisionTransformer
from blip2.weights import transformers
from blip2.weights.maps import transformers as maps
from blip2.weights.maps import transformers_config as keys
from blip2.weights.skeleton import build_language, skeleton

DRAWN = 16_777_213  # a prime: no two rows of a matrix are the same numbers
STD = 0.02
ONES = re.compile(r"(norm\d?|layer_norm|layernorm|LayerNorm)\.weight$")
SHARD_BYTES = 1_000_000_000


def write(config: Blip2Config, directory: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """A model in shards, one in memory at a time, the same values every time; one that is there is left as it is."""
    if transformers.holds(directory):
        return
    directory.mkdir(parents=True, exist_ok=True)
    where: dict[str, str] = {}
    shard: dict[str, Tensor] = {}
    for name, tensor in _tensors(config, dtype):
        if shard and sum(each.nbytes for each in shard.values()) + tensor.nbytes > SHARD_BYTES:
            _shard(shard, where, directory)
        shard[name] = tensor
    _shard(shard, where, directory)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    assert isinstance(config.language, OPTConfig | T5Config)
    table = {f"w{number}": number for number in range(config.language.vocab_size)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(table, unk_token="w3"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save(str(directory / "tokenizer.json"))
    values = keys.values(config, stop_ids=(1,), pad_id=0, dtype=str(dtype).removeprefix("torch."))
    (directory / "config.json").write_text(json.dumps(values))


def shortened(config: Blip2Config, layers: int | None) -> Blip2Config:
    """The same geometry with so many layers in each tower; as it is where None."""
    if layers is None:
        return config
    assert isinstance(config.vision, VisionConfig)
    assert isinstance(config.language, OPTConfig | T5Config)
    vision, language = (dataclasses.replace(part, layers=layers) for part in (config.vision, config.language))
    return config.replace(vision=vision, language=language)


def picture() -> Image.Image:
    """Coloured noise, 320 by 240."""
    draw = np.random.default_rng(0)
    return Image.fromarray(draw.integers(0, 256, (30, 40, 3), dtype=np.uint8)).resize((320, 240))


def _tensors(config: Blip2Config, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    assert isinstance(config.language, OPTConfig | T5Config)
    assert isinstance(config.vision, VisionConfig)
    with skeleton():
        parts = {
            "vision": VisionTransformer(config.vision),
            "bridge": Bridge(config),
            "language": build_language(config.language),
        }
    ours = {f"{key}.{name}": tensor for key, part in parts.items() for name, tensor in part.state_dict().items()}
    drawn = (torch.randn(DRAWN, generator=torch.Generator().manual_seed(0)) * STD).to(dtype)
    at = 0
    for rule in maps.blip2(config):
        for name, shape in zip(rule.theirs, rule.operation.split([ours[each] for each in rule.ours]), strict=True):
            if ONES.search(name):
                yield name, torch.ones(shape.shape, dtype=dtype)
            elif name.endswith("bias"):
                yield name, torch.zeros(shape.shape, dtype=dtype)
            else:
                made = torch.empty(shape.numel(), dtype=dtype)
                done = 0
                while done < len(made):
                    some = min(len(made) - done, DRAWN - at)
                    made[done : done + some] = drawn[at : at + some]
                    done, at = done + some, (at + some) % DRAWN
                yield name, made.view(shape.shape)


def _shard(shard: dict[str, Tensor], where: dict[str, str], directory: Path) -> None:
    name = f"model-{len(set(where.values())) + 1:05d}.safetensors"
    save_file(shard, directory / name, {"format": "pt"})
    where |= dict.fromkeys(shard, name)
    shard.clear()
