"""The names of transformers."""

from __future__ import annotations

from blip2.config import GemmaConfig
from blip2.weights.rules import Rule, Stacked, same, weights_and_biases

OPT: list[Rule] = [
    *same({"words.weight": "model.decoder.embed_tokens.weight"}),
    *same({"positions.weight": "model.decoder.embed_positions.weight"}),
    *weights_and_biases(
        {
            "norm": "model.decoder.final_layer_norm",
            "layers.*.attention_norm": "model.decoder.layers.*.self_attn_layer_norm",
            "layers.*.out": "model.decoder.layers.*.self_attn.out_proj",
            "layers.*.mlp_norm": "model.decoder.layers.*.final_layer_norm",
            "layers.*.up": "model.decoder.layers.*.fc1",
            "layers.*.down": "model.decoder.layers.*.fc2",
        }
    ),
    *[
        Rule(
            f"layers.*.qkv.{kind}",
            tuple(f"model.decoder.layers.*.self_attn.{part}_proj.{kind}" for part in "qkv"),
            Stacked((1, 1, 1)),
        )
        for kind in ("weight", "bias")
    ],
]


def gemma(config: GemmaConfig) -> list[Rule]:
    """Gemma 3: queries have more heads than keys and values."""
    return [
        *same(
            {
                "words.weight": "model.embed_tokens.weight",
                "norm.weight": "model.norm.weight",
                "layers.*.attention_norm.weight": "model.layers.*.input_layernorm.weight",
                "layers.*.query_norm.weight": "model.layers.*.self_attn.q_norm.weight",
                "layers.*.key_norm.weight": "model.layers.*.self_attn.k_norm.weight",
                "layers.*.out.weight": "model.layers.*.self_attn.o_proj.weight",
                "layers.*.attention_end_norm.weight": "model.layers.*.post_attention_layernorm.weight",
                "layers.*.mlp_norm.weight": "model.layers.*.pre_feedforward_layernorm.weight",
                "layers.*.down.weight": "model.layers.*.mlp.down_proj.weight",
                "layers.*.mlp_end_norm.weight": "model.layers.*.post_feedforward_layernorm.weight",
            }
        ),
        Rule(
            "layers.*.qkv.weight",
            tuple(f"model.layers.*.self_attn.{part}_proj.weight" for part in "qkv"),
            Stacked((config.heads, config.key_heads, config.key_heads)),
        ),
        Rule(
            "layers.*.gate_up.weight",
            tuple(f"model.layers.*.mlp.{part}_proj.weight" for part in ("gate", "up")),
            Stacked((1, 1)),
        ),
    ]
