from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from blip2.cli import app
from blip2.cli.info import parts_of
from blip2.config import PRESETS, PartConfig, write_config
from blip2.errors import ConfigError


def shown(*words: str) -> str:
    return CliRunner().invoke(app, ["info", *words], catch_exceptions=False).stdout


@pytest.mark.parametrize("name", PRESETS)
def test_every_configuration_shows_its_parts(name: str):
    lines = [json.loads(line) for line in shown(name, "--json").splitlines()]
    assert [line["role"] for line in lines][:2] == ["image encoder", "bridge"]
    assert all(line["parameters"] > 0 and line["licence"] for line in lines)
    assert all(line["bfloat16_bytes"] == line["parameters"] * (4 if line["trained"] else 2) for line in lines)


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


def test_the_table_has_a_total_and_the_gemma_terms():
    text = shown("mini")
    assert "total" in text
    assert "Gemma terms" in text.replace("\n", " ")


def test_a_directory_is_read_and_unknown_parts_have_no_total(tmp_path: Path):
    write_config(PRESETS["mini"].replace(language=PartConfig("transformers:my-model", 640)), tmp_path / "config.json")
    result = CliRunner().invoke(app, ["info", str(tmp_path)], catch_exceptions=False)
    assert "transformers:my-model" in result.stdout
    assert "total" not in result.stdout
    assert "no total" in result.stderr


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"pretrain_opt2\.7b"):
        CliRunner().invoke(app, ["info", "nothing"], catch_exceptions=False)


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
