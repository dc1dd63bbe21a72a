"""What a piece of work needs at least: counted from the configuration, checked against torch's own counter."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from blip2.bench import work
from blip2.bench.machine import Rates
from blip2.config import PRESETS, Blip2Config, GemmaConfig, OPTConfig, PartConfig, QFormerConfig, T5Config, VisionConfig
from blip2.model.bridge import Bridge
from blip2.model.gemma import Gemma
from blip2.model.opt import OPT
from blip2.model.t5 import T5
from blip2.model.vision import VisionTransformer
from blip2.weights.skeleton import skeleton

CONFIG = Blip2Config(
    vision=VisionConfig(image_size=28, width=32, layers=2, heads=4, mlp_width=64),
    qformer=QFormerConfig(width=32, layers=3, heads=4, mlp_width=64, queries=4, encoder_width=32, text=False),
    language=OPTConfig(width=64, layers=2, heads=4, mlp_width=128, vocab_size=128),
    heads=False,
)
RATES = Rates(bandwidth=1e9, operations={"float32": 1e9, "bfloat16": 2e9, "int8": 4e9})


def products(module: nn.Module) -> int:
    """Weights of all linear layers."""
    return sum(each.weight.numel() for each in module.modules() if isinstance(each, nn.Linear))


def counted(call) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def test_the_image_encoder_counts_as_torch_counts_it():
    with skeleton():
        tower = VisionTransformer(CONFIG.vision)  # pyright: ignore[reportArgumentType]
        pixels = torch.empty(3, 3, 28, 28)
    found = work.see(CONFIG, 3)
    assert found is not None
    patch = 2 * 3 * 3 * 14 * 14 * 32  # the class token passes no patch embedding, and is counted as if it did
    assert found.operations == counted(lambda: tower(pixels)) + patch
    assert found.weights == products(tower) + 3 * 14 * 14 * 32


def test_the_queries_count_as_torch_counts_them_but_for_their_attention():
    with skeleton():
        bridge = Bridge(CONFIG).eval()
        patches = torch.empty(2, 5, 32)
    attention = 2 * (3 * 4 * 4 + 2 * 4 * 5) * 32 * 2 * 2  # three layers among the queries, two of them on the patches
    torch_says = counted(lambda: bridge.project(bridge.look(bridge.see(patches)).hidden))
    assert work.look(CONFIG, 2).operations == torch_says - attention


@pytest.mark.parametrize("config", [OPTConfig(layers=2), GemmaConfig(layers=2), T5Config(layers=2)])
def test_a_step_reads_every_linear_layer_of_the_decoder_and_the_head(config: work.Language):
    with skeleton():
        model = {OPTConfig: OPT, GemmaConfig: Gemma, T5Config: T5}[type(config)](config)  # pyright: ignore
    head = config.vocab_size * config.width
    parts = model.decoder if isinstance(model, T5) else model
    linear = products(parts) + (0 if isinstance(model, T5) else head)
    if isinstance(config, T5Config):  # keys and values of what was read are there already
        linear += head - 2 * config.layers * config.width * config.heads * config.head_width
    assert work.step(config, 1).weights == linear
    assert work.step(config, 5).weights == linear
    assert work.step(config, 5).operations == 10 * linear


def test_a_limit_is_the_longer_of_reading_and_arithmetic():
    pair = work.Work(operations=4e9, weights=1e8)
    assert pair.seconds(RATES, "float32") == 4.0
    assert pair.seconds(RATES, "int8") == 1.0
    assert work.Work(1.0, 1e9).seconds(RATES, "int4") == 0.5
    assert work.Work(4e9, 0).seconds(RATES, "int4") == 2.0  # int4 is multiplied in 16 bits


def test_beams_and_questions_share_what_they_can():
    def limit(**changes: int) -> float:
        values = {"images": 1, "texts": 1, "prompt": 12, "tokens": 20, "beams": 1} | changes
        passes = work.writing(PRESETS["pretrain_opt2.7b"], **values)
        assert passes is not None
        return passes.seconds(RATES, "float32")

    assert limit() < limit(beams=5) < 5 * limit()
    assert limit() < limit(texts=10) < 10 * limit()


def test_parts_of_unknown_size_have_no_limit():
    unknown = dataclasses.replace(CONFIG, vision=PartConfig("of-somebody", width=32))
    assert work.writing(unknown, images=1, texts=1, prompt=1, tokens=2, beams=1) is None
    assert work.matching(unknown, images=1, texts=1, length=3) is None
    assert work.writing(PRESETS["mini"], images=1, texts=1, prompt=1, tokens=2, beams=1) is not None
