"""Models of the published kinds at tiny size, made and saved by transformers: what the parity tests start from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from PIL import Image

import blip2
from blip2 import image
from blip2.blip2 import Blip2

BERT = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
WORDS = ["<pad>", "</s>", "<s>", "[UNK]", *(f"w{n}" for n in range(56))]
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


VISION = {
    "hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 7, "hidden_act": "gelu",
}  # fmt: skip
QFORMER = {
    "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32,
    "encoder_hidden_size": 12, "vocab_size": 60, "max_position_embeddings": 40,
}  # fmt: skip


def config(text: Any, *, vision: Any = VISION, qformer: Any = QFORMER, slot: int | None = 60, queries: int = 4) -> Any:
    return transformers.Blip2Config(
        vision_config=dict(vision), qformer_config=dict(qformer), text_config=text.to_dict(), num_query_tokens=queries,
        image_text_hidden_size=8, image_token_index=slot,
    )  # fmt: skip


def opt() -> Any:
    return transformers.OPTConfig(
        vocab_size=61, hidden_size=16, word_embed_proj_dim=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=96, pad_token_id=0, bos_token_id=2, eos_token_id=1,
    )  # fmt: skip


def t5() -> Any:
    return transformers.T5Config(
        vocab_size=61, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu",
        dense_act_fn="gelu", pad_token_id=0, bos_token_id=1, eos_token_id=1, decoder_start_token_id=0,
        tie_word_embeddings=False,
    )  # fmt: skip


def scramble(model: Any) -> None:
    """Weights at which every part matters and logits are well apart."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            size = 0.35 if parameter.ndim > 1 else 0.2
            start = 1.0 if parameter.ndim == 1 and bool((parameter == 1).all()) else 0.0
            parameter.copy_(start + torch.randn(parameter.shape, generator=generator) * size)


def save(model: Any, directory: Path, first: Sequence[str] = (), **options: Any) -> None:
    model.save_pretrained(directory, **options)
    table = {word: number for number, word in enumerate([*first, *WORDS[len(first) :]])}
    words = tokenizers.models.WordLevel(table, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(directory / "tokenizer.json"))


def loaded(whole: Any, place: Path, *, scrambled: bool = True) -> tuple[Any, Blip2]:
    """Their model of a configuration, which writes until token 1, and ours from the directory that theirs saved."""
    theirs = transformers.Blip2ForConditionalGeneration(whole).eval()
    if scrambled:
        scramble(theirs)
    theirs.generation_config.eos_token_id, theirs.generation_config.pad_token_id = 1, 0
    save(theirs, place)
    again = transformers.Blip2ForConditionalGeneration.from_pretrained(place).eval()
    return again, blip2.load(place, device="cpu", dtype="float32")


def pictures(count: int) -> list[Image.Image]:
    generator = torch.Generator().manual_seed(4)
    noise = torch.randint(0, 256, (count, 9, 9, 3), dtype=torch.uint8, generator=generator).numpy()
    return [Image.fromarray(each).resize((40, 31)) for each in noise]


def pixels(model: Blip2, images: list[Image.Image]) -> torch.Tensor:
    return image.Transform(model.encoder.image_size, model.encoder.mean, model.encoder.std)(images)
