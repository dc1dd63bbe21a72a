"""LAVIS's files at tiny size, with their frozen parts beside them, and the configurations that they fit."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import tokenizers
import torch
from safetensors.torch import save_file
from torch import Tensor

from blip2.config import Blip2Config, OPTConfig, QFormerConfig, T5Config, VisionConfig
from blip2.model.bridge import Bridge
from blip2.model.vision import VisionTransformer
from blip2.weights.maps import lavis as maps
from blip2.weights.maps import transformers as transformers_maps
from blip2.weights.rules import for_layers, to_theirs
from blip2.weights.transformers import build_language

EVA = VisionConfig(image_size=28, patch_size=14, width=12, layers=2, heads=2, mlp_width=16)
CLIP = dataclasses.replace(EVA, activation="quick_gelu", key_bias=True, pre_norm=True, patch_bias=False, norm_eps=1e-5)
QFORMER = QFormerConfig(
    width=16, layers=3, heads=2, mlp_width=32, queries=4, encoder_width=12, vocab_size=40, positions=16, cls_id=1,
    sep_id=2, decoder_id=39,
)  # fmt: skip
WRITES = dataclasses.replace(QFORMER, text=False)
OPT = OPTConfig(width=16, layers=2, heads=2, mlp_width=24, context=64)  # the whole vocabulary: 50118 ends its texts
T5 = T5Config(width=16, layers=2, heads=2, head_width=8, mlp_width=24, vocab_size=40)
CONFIGS = {
    "stage 1": Blip2Config(vision=EVA, qformer=QFORMER, embedding_width=8),
    "stage 1, ViT-L": Blip2Config(vision=CLIP, qformer=QFORMER, embedding_width=8),
    "opt": Blip2Config(vision=EVA, qformer=WRITES, language=OPT, heads=False),
    "t5, ViT-L": Blip2Config(vision=CLIP, qformer=WRITES, language=T5, heads=False),
}


def random(module: torch.nn.Module, key: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {f"{key}.{name}": torch.randn(t.shape, generator=generator) for name, t in module.state_dict().items()}


def write(config: Blip2Config, place: Path, *, fine_tuned: bool = False) -> dict[str, Tensor]:
    """A checkpoint as LAVIS leaves it, with its frozen parts beside; the tensors of the file."""
    assert isinstance(config.vision, VisionConfig)
    tower = to_theirs(maps.vision(config.vision), random(VisionTransformer(config.vision), "vision"), "test")
    state = to_theirs(maps.trained(config), random(Bridge(config), "bridge"), "test")
    if fine_tuned:
        state |= {f"visual_encoder.{name}": tensor for name, tensor in tower.items()}
    else:
        last = "transformer.resblocks.2.ln_1.weight" if config.vision.pre_norm else "blocks.2.norm1.weight"
        more = {last: torch.ones(12), "norm.weight": torch.ones(12)}  # one block more than is used, and what follows
        torch.save(tower | more, place / ("clip_vit_L.pth" if config.vision.pre_norm else "eva_vit_g.pth"))
    training = {"optimizer": {"state": {0: {"step": 3}}}, "config": {"run": {"seed": 42}}, "epoch": 1}
    torch.save({"model": state, **training}, place / "blip2.pth")
    table = {word: number for number, word in enumerate(["[PAD]", "[CLS]", "[SEP]", "[UNK]", *map(str, range(36))])}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(table, unk_token="[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    for name in ("bert-base-uncased", "language"):
        (place / name).mkdir()
        words.save(str(place / name / "tokenizer.json"))
    if isinstance(config.language, OPTConfig | T5Config):
        lm = config.language
        every = transformers_maps.t5(lm) if isinstance(lm, T5Config) else transformers_maps.OPT
        rules = for_layers(every, range(lm.layers))
        tensors = {n.removeprefix("x."): t for n, t in random(build_language(lm), "x").items()}
        copies = {"encoder.embed_tokens.weight": torch.zeros(1)} if isinstance(lm, T5Config) else {}
        save_file(to_theirs(rules, tensors, "test") | copies, place / "language" / "model.safetensors")
    return state
