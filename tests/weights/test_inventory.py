"""The sizes that are told are those of the architectures."""

from __future__ import annotations

import pytest
import torch

from blip2.config import PRESETS, PartConfig
from blip2.weights.inventory import parts_of


def test_the_trained_part_is_counted_as_published():
    bridge = next(part for part in parts_of(PRESETS["pretrain_opt2.7b"]) if part.trained)
    assert bridge.parameters == 107_133_696  # BLIP-2, table 2: 107M


def test_opt_has_the_size_of_its_architecture():
    from transformers import OPTConfig, OPTForCausalLM

    shape = {"hidden_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 32, "ffn_dim": 10240}
    with torch.device("meta"):
        opt = OPTForCausalLM(OPTConfig(**shape, word_embed_proj_dim=2560))
    assert language("pretrain_opt2.7b") == sum(parameter.numel() for parameter in opt.parameters())


def test_flan_t5_has_the_size_of_its_architecture():
    from transformers import T5Config, T5EncoderModel

    shape = {"d_model": 2048, "d_kv": 64, "d_ff": 5120, "num_layers": 24, "num_heads": 32}
    with torch.device("meta"):
        encoder = T5EncoderModel(T5Config(**shape, vocab_size=32128, feed_forward_proj="gated-gelu"))
    words = 32128 * 2048
    layers = sum(parameter.numel() for parameter in encoder.parameters()) - words
    cross_attention = 4 * 2048 * 2048 + 2048  # what a decoder layer has beyond an encoder layer, norm included
    head = words  # not tied to the embeddings
    assert language("pretrain_flant5xl") == words + layers + (layers + 24 * cross_attention) + head


def language(preset: str) -> int | None:
    return next(part.parameters for part in parts_of(PRESETS[preset]) if part.role == "language model")


@pytest.mark.slow
def test_frozen_parts_have_the_size_that_is_told():
    from blip2 import adapters

    config = PRESETS["mini"]
    told = {part.role: part.parameters for part in parts_of(config)}
    assert isinstance(config.vision, PartConfig)
    assert isinstance(config.language, PartConfig)
    assert config.text is not None
    encoder, (language, _) = adapters.image_encoder(config.vision), adapters.language_model(config.language)
    assert told["image encoder"] == sum(parameter.numel() for parameter in encoder.parameters())
    assert told["words"] == adapters.text_part(config.text).words.numel()
    assert told["language model"] == sum(parameter.numel() for parameter in language.parameters())
