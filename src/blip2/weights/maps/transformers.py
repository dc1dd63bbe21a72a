"""The names of transformers."""

from __future__ import annotations

from blip2.config import GemmaConfig, T5Config
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
            (f"layers.*.qkv.{kind}",),
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
            ("layers.*.qkv.weight",),
            tuple(f"model.layers.*.self_attn.{part}_proj.weight" for part in "qkv"),
            Stacked((config.heads, config.key_heads, config.key_heads)),
        ),
        Rule(
            ("layers.*.gate_up.weight",),
            tuple(f"model.layers.*.mlp.{part}_proj.weight" for part in ("gate", "up")),
            Stacked((1, 1)),
        ),
    ]


def t5(config: T5Config) -> list[Rule]:
    """T5 1.1: the first layer of each stack holds the positions of all."""
    rules = same(
        {
            "words.weight": "shared.weight",
            "encoder_positions.bias.weight": f"{_block('encoder', 0, 0)}.SelfAttention.relative_attention_bias.weight",
            "decoder_positions.bias.weight": f"{_block('decoder', 0, 0)}.SelfAttention.relative_attention_bias.weight",
            "encoder_norm.weight": "encoder.final_layer_norm.weight",
            "decoder_norm.weight": "decoder.final_layer_norm.weight",
        }
        | ({} if config.tied else {"head.weight": "lm_head.weight"})
    )
    for stack, mlp in (("encoder", 1), ("decoder", 2)):
        attention, dense = f"{_block(stack, '*', 0)}.SelfAttention", f"{_block(stack, '*', mlp)}.DenseReluDense"
        rules += same(
            {
                f"{stack}.*.attention_norm.weight": f"{_block(stack, '*', 0)}.layer_norm.weight",
                f"{stack}.*.out.weight": f"{attention}.o.weight",
                f"{stack}.*.mlp.norm.weight": f"{_block(stack, '*', mlp)}.layer_norm.weight",
                f"{stack}.*.mlp.down.weight": f"{dense}.wo.weight",
            }
        )
        rules += [
            Rule((f"{stack}.*.qkv.weight",), tuple(f"{attention}.{part}.weight" for part in "qkv"), Stacked((1, 1, 1))),
            Rule((f"{stack}.*.mlp.gate_up.weight",), (f"{dense}.wi_0.weight", f"{dense}.wi_1.weight"), Stacked((1, 1))),
        ]
    cross = f"{_block('decoder', '*', 1)}.EncDecAttention"
    rules += same(
        {
            "decoder.*.cross_norm.weight": f"{_block('decoder', '*', 1)}.layer_norm.weight",
            "decoder.*.cross_query.weight": f"{cross}.q.weight",
            "decoder.*.cross_out.weight": f"{cross}.o.weight",
        }
    )
    both = tuple(f"{cross}.{part}.weight" for part in "kv")
    return [*rules, Rule(("decoder.*.cross_key_value.weight",), both, Stacked((1, 1)))]


def _block(stack: str, number: int | str, part: int) -> str:
    return f"{stack}.block.{number}.layer.{part}"
