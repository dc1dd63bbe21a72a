"""The published models at tiny size, as transformers saves them, and pictures to show them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

transformers = pytest.importorskip("transformers")

COMMIT = "0123456789abcdef0123456789abcdef01234567"
QUERIES, SIDE = 4, 28
WRITERS = {
    "Salesforce/blip2-opt-2.7b": "opt",
    "Salesforce/blip2-opt-6.7b": "opt",
    "Salesforce/blip2-flan-t5-xl": "t5",
    "Salesforce/blip2-flan-t5-xxl": "t5",
    "Salesforce/blip2-itm-vit-g": "itm",
}
SPECIAL = {"opt": ["<s>", "<pad>", "</s>", "<unk>"], "t5": ["<pad>", "</s>", "<unk>"]}


def tokenizer(kind: str) -> Any:
    """Of the published kind, a character a token."""
    from tokenizers.pre_tokenizers import ByteLevel

    if kind == "opt":
        words = [*SPECIAL["opt"], *sorted(ByteLevel.alphabet())]
        table = {word: number for number, word in enumerate(words)}
        ends = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
        return transformers.GPT2Tokenizer(vocab=table, merges=[], add_bos_token=True, **ends)
    letters = [chr(code) for code in range(33, 127)]
    if kind == "t5":
        pieces = [(word, 0.0) for word in SPECIAL["t5"]] + [
            (word, -3.0) for word in ["\N{LOWER ONE EIGHTH BLOCK}", *letters]
        ]
        return transformers.T5Tokenizer(vocab=pieces, extra_ids=0)
    special = ["[PAD]", *(f"[unused{number}]" for number in range(99)), "[UNK]", "[CLS]", "[SEP]"]  # at BERT's places
    words = [*special, *letters, *(f"##{letter}" for letter in letters)]
    return transformers.BertTokenizer(vocab={word: number for number, word in enumerate(words)})


def text_config(kind: str, tokens: Any) -> Any:
    size = len(tokens) + 3  # published vocabularies are longer than their tokenizers
    if kind == "t5":
        return transformers.T5Config(
            vocab_size=size, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu",
            dense_act_fn="gelu", pad_token_id=0, bos_token_id=1, eos_token_id=1, decoder_start_token_id=0,
            tie_word_embeddings=False,
        )  # fmt: skip
    newline = tokens.convert_tokens_to_ids("\N{LATIN CAPITAL LETTER C WITH DOT ABOVE}") if kind == "opt" else 4
    return transformers.OPTConfig(
        vocab_size=size, hidden_size=16, word_embed_proj_dim=16, ffn_dim=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=192, pad_token_id=1, bos_token_id=2, eos_token_id=newline,
    )  # fmt: skip


def build(kind: str, place: Path) -> None:
    """A model and its processor, saved by transformers."""
    tokens = tokenizer(kind)
    images = transformers.BlipImageProcessor(size={"height": SIDE, "width": SIDE})
    processor = transformers.Blip2Processor(images, tokens, num_query_tokens=QUERIES)
    vision = {
        "hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": SIDE, "patch_size": 7, "hidden_act": "gelu",
    }  # fmt: skip
    qformer = {
        "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32,
        "encoder_hidden_size": 12, "vocab_size": len(tokens), "max_position_embeddings": 64,
        "use_qformer_text_input": kind == "itm",
    }  # fmt: skip
    config = transformers.Blip2Config(
        vision_config=vision, qformer_config=qformer, text_config=text_config(kind, tokens).to_dict(),
        num_query_tokens=QUERIES, image_text_hidden_size=8,
        image_token_index=tokens.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    of = transformers.Blip2ForImageTextRetrieval if kind == "itm" else transformers.Blip2ForConditionalGeneration
    model = of(config).eval()
    scramble(model)
    model.save_pretrained(place)
    processor.save_pretrained(place)


def scramble(model: Any) -> None:
    """Weights at which every part matters and logits are well apart."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            size = 0.35 if parameter.ndim > 1 else 0.2
            start = 1.0 if parameter.ndim == 1 and bool((parameter == 1).all()) else 0.0
            parameter.copy_(start + torch.randn(parameter.shape, generator=generator) * size)


def picture(seed: int, size: tuple[int, int] = (40, 31)) -> Image.Image:
    """A picture of a few large patches of colour."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(0, 256, (9, 9, 3), dtype=torch.uint8, generator=generator).numpy()
    return Image.fromarray(noise).resize(size)
