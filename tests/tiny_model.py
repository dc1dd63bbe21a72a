"""A whole model of made-up weights, small enough for any test: tiny ViT, Q-Former and OPT, a word a token."""

from __future__ import annotations

import numpy as np
import tokenizers
import torch
import transformers

from blip2.adapters.transformers_lm import TransformersLM
from blip2.blip2 import Blip2
from blip2.config import Blip2Config, OPTConfig, PromptConfig, QFormerConfig, VisionConfig
from blip2.model.bridge import Bridge
from blip2.model.vision import VisionTransformer
from blip2.text import Tokenizer

WORDS = (
    *("[PAD]", "[CLS]", "[SEP]", "[DEC]", "[UNK]", ":", "?", ".", ",", "a", "dog", "cat", "runs", "on", "the", "beach"),
    *("red", "is", "what", "this", "how", "many", "Question", "Answer", "yes", "no"),
)
PAD, CLS, SEP, DEC = range(4)
CONTEXT = 64

VISION = VisionConfig(image_size=28, patch_size=7, width=12, layers=1, heads=2, mlp_width=16)
QFORMER = QFormerConfig(
    width=16, layers=2, heads=2, mlp_width=32, queries=4, encoder_width=12, vocab_size=len(WORDS), positions=40,
    cls_id=CLS, sep_id=SEP, decoder_id=DEC,
)  # fmt: skip


def tokenizer(frame: tuple[int, int] | None = None) -> Tokenizer:
    """One id a word of `WORDS`."""
    rust = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    rust.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return Tokenizer(rust, bos=CLS, pad=PAD, stop_ids=(SEP,), frame=frame)


def build(*, language: bool = True, heads: bool = True, prompts: PromptConfig | None = None) -> Blip2:
    """The model; weights far enough from zero that different inputs give different words."""
    config = Blip2Config(
        vision=VISION,
        qformer=QFORMER,
        language=OPTConfig(width=16) if language else None,
        embedding_width=8,
        heads=heads,
        prompts=prompts or PromptConfig(),
    )
    torch.manual_seed(0)
    bridge, vision = Bridge(config).eval(), VisionTransformer(VISION).eval()
    opt = transformers.OPTForCausalLM(
        transformers.OPTConfig(
            vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, ffn_dim=32,
            max_position_embeddings=CONTEXT, word_embed_proj_dim=16, pad_token_id=PAD, bos_token_id=CLS,
            eos_token_id=SEP,
        )
    ).eval()  # fmt: skip
    for module in (bridge, vision, opt):
        for parameter in module.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.4)
    return Blip2(
        config,
        vision,
        bridge,
        TransformersLM(opt) if language else None,
        tokenizer() if language else None,
        tokenizer((CLS, SEP)),
        torch.device("cpu"),
    )


def picture(seed: int) -> np.ndarray:
    """A noisy picture, uint8[40, 50, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (40, 50, 3), dtype=np.uint8)
