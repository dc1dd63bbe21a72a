"""Published architectures with made-up weights, in the files that transformers writes."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

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
    made = Made.of(config, dtype)
    for name in made.places:
        tensor = made.get(name)
        if shard and sum(each.nbytes for each in shard.values()) + tensor.nbytes > SHARD_BYTES:
            _shard(shard, where, directory)
        shard[name] = tensor
    _shard(shard, where, directory)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    write_words(config, directory)
    (directory / "config.json").write_text(json.dumps(values(config, dtype)))


def write_words(config: Blip2Config, directory: Path) -> None:
    """The tokenizer: a word a token, w0 to the last."""
    language = config.language
    size = language.vocab_size if isinstance(language, OPTConfig | T5Config) else config.qformer.vocab_size
    table = {f"w{number}": number for number in range(size)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(table, unk_token="w3"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save(str(directory / "tokenizer.json"))


def values(config: Blip2Config, dtype: torch.dtype) -> dict[str, Any]:
    """What stands in config.json."""
    return keys.values(config, stop_ids=(1,), pad_id=0, dtype=str(dtype).removeprefix("torch."))


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


@dataclass(frozen=True)
class Made:
    """Tensors under transformers' names, made when they are asked for, the same values every time; a checkpoint's
    `Tensors`.

    Attributes:
        places: of each tensor, its shape and where in the drawn numbers its own begin.
        drawn: the numbers, on the device where the tensors are to be.
    """

    places: Mapping[str, tuple[torch.Size, int]]
    drawn: Tensor

    @classmethod
    def of(cls, config: Blip2Config, dtype: torch.dtype, device: torch.device | None = None) -> Made:
        """Of a model of ours."""
        assert isinstance(config.vision, VisionConfig)
        with skeleton():
            parts: dict[str, nn.Module] = {"vision": VisionTransformer(config.vision), "bridge": Bridge(config)}
            if isinstance(config.language, OPTConfig | T5Config):
                parts["language"] = build_language(config.language)
        ours = {f"{key}.{name}": tensor for key, part in parts.items() for name, tensor in part.state_dict().items()}
        places: dict[str, tuple[torch.Size, int]] = {}
        at = 0
        for rule in maps.blip2(config):
            for name, shape in zip(rule.theirs, rule.operation.split([ours[each] for each in rule.ours]), strict=True):
                places[name] = shape.shape, at
                if not (ONES.search(name) or name.endswith("bias")):
                    at = (at + shape.numel()) % DRAWN
        drawn = (torch.randn(DRAWN, generator=torch.Generator().manual_seed(0)) * STD).to(dtype)
        return cls(places, drawn.to(device))

    def names(self) -> set[str]:
        """All names."""
        return set(self.places)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one tensor."""
        return tuple(self.places[name][0])

    def get(self, name: str) -> Tensor:
        """One tensor."""
        shape, at = self.places[name]
        if ONES.search(name) or name.endswith("bias"):
            return self.drawn.new_full(shape, float(not name.endswith("bias")))
        made = self.drawn.new_empty(shape.numel())
        done = 0
        while done < len(made):
            some = min(len(made) - done, DRAWN - at)
            made[done : done + some] = self.drawn[at : at + some]
            done, at = done + some, (at + some) % DRAWN
        return made.view(shape)


def _shard(shard: dict[str, Tensor], where: dict[str, str], directory: Path) -> None:
    name = f"model-{len(set(where.values())) + 1:05d}.safetensors"
    save_file(shard, directory / name, {"format": "pt"})
    where |= dict.fromkeys(shard, name)
    shard.clear()
