"""A new bridge between an image encoder and a language model that transformers saved, as docs/finetuning.md says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import tokenizers
import transformers

import blip2
from blip2 import explain
from blip2.errors import ConfigError
from blip2.train.loop import train
from blip2.train.recipe import parse

SIDE, WIDTH, EMBEDDING = 32, 16, 24


def write_encoder(place: Path) -> None:
    """A ViT of 17 patches."""
    config = transformers.ViTConfig(
        hidden_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=SIDE,
        patch_size=8,
    )
    transformers.ViTModel(config).save_pretrained(place)
    pixels = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": SIDE, "width": SIDE}}
    (place / "preprocessor_config.json").write_text(json.dumps(pixels))


def write_language(place: Path) -> None:
    """A GPT of the words of the tests."""
    config = transformers.GPT2Config(
        n_embd=EMBEDDING,
        n_layer=1,
        n_head=2,
        n_positions=64,
        vocab_size=len(tiny.WORDS),
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(place)
    rust: tokenizers.Tokenizer = tiny.tokenizer().rust
    rust.save(str(place / "tokenizer.json"))


def test_both_stages_with_parts_of_transformers_and_the_model_is_loaded_again(shapes: Path, tmp_path: Path):
    write_encoder(tmp_path / "vit")
    write_language(tmp_path / "gpt")
    model = {
        "preset": "mini",
        "vision": {"name": f"transformers:{tmp_path / 'vit'}", "width": WIDTH},
        "language": {"name": f"transformers:{tmp_path / 'gpt'}", "width": EMBEDDING},
        "qformer": {"encoder_width": WIDTH},
    }
    common = {"model": model, "steps": 1, "batch_size": 4, "features": {"cache": str(tmp_path / "features")}}
    train(parse(tiny.recipe(shapes, tmp_path / "one", **common)))
    train(parse(tiny.recipe(shapes, tmp_path / "two", **common, stage=2, start=str(tmp_path / "one"))))
    write_encoder(tmp_path / "other")  # of the same shape
    common["model"] = {**model, "vision": {"name": f"transformers:{tmp_path / 'other'}", "width": WIDTH}}
    with pytest.raises(ConfigError, match=r"model\.vision: .*other has the SHA-256 .*was trained on one of"):
        train(parse(tiny.recipe(shapes, tmp_path / "three", **common, stage=2, start=str(tmp_path / "one"))))
    found = blip2.load(tmp_path / "two" / "model", device="cpu", dtype="float32")
    picture = next(shapes.parent.rglob("*.png"))
    assert set(found.caption(picture, max_new_tokens=4).split()) <= set(tiny.WORDS)
    assert found.match(picture, ["a red circle"]).itm.shape == (1, 1)
    assert explain.match(found, picture, "a red circle").places.count == 17
