"""The names of transformers."""

from __future__ import annotations

from blip2.config import Blip2Config, GemmaConfig, OPTConfig, QFormerConfig, T5Config, VisionConfig
from blip2.weights.rules import KeyBias, Rule, Stacked, for_layers, same, weights_and_biases, within

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


def blip2(config: Blip2Config) -> list[Rule]:
    """The whole of `Blip2ForConditionalGeneration` or `Blip2ForImageTextRetrieval`; ours: vision, bridge, language."""
    assert isinstance(config.vision, VisionConfig)
    rules = vision(config.vision) + qformer(config.qformer)
    if config.heads:
        rules += weights_and_biases(
            {
                "bridge.heads.vision_proj": "vision_projection",
                "bridge.heads.text_proj": "text_projection",
                "bridge.heads.itm_head": "itm_head",
            }
        )
    if isinstance(config.language, OPTConfig):
        rules += within(for_layers(OPT, range(config.language.layers)), "language.", "language_model.")
    elif isinstance(config.language, T5Config):
        rules += within(for_layers(t5(config.language), range(config.language.layers)), "language.", "language_model.")
    if config.language is not None:
        rules += weights_and_biases({"bridge.language_projection": "language_projection"})
    return rules


_BLOCK = "vision_model.encoder.layers.*"


def vision(config: VisionConfig) -> list[Rule]:
    """The image encoder; theirs always has a bias for the keys, zero in what was published."""
    qkv = "vision.blocks.*.attention.qkv"
    bias = Rule((f"{qkv}.bias",), (f"{_BLOCK}.self_attn.qkv.bias",))
    if not config.key_bias:
        ours = tuple(f"vision.blocks.*.attention.{part}_bias" for part in ("query", "value"))
        bias = Rule(ours, bias.theirs, KeyBias())
    rules = [
        *same(
            {
                "vision.class_token": "vision_model.embeddings.class_embedding",
                "vision.positions": "vision_model.embeddings.position_embedding",
                f"{qkv}.weight": f"{_BLOCK}.self_attn.qkv.weight",
            }
        ),
        bias,
        *weights_and_biases(
            {
                "vision.patch_embedding": "vision_model.embeddings.patch_embedding",
                "vision.blocks.*.norm1": f"{_BLOCK}.layer_norm1",
                "vision.blocks.*.attention.out": f"{_BLOCK}.self_attn.projection",
                "vision.blocks.*.norm2": f"{_BLOCK}.layer_norm2",
                "vision.blocks.*.up": f"{_BLOCK}.mlp.fc1",
                "vision.blocks.*.down": f"{_BLOCK}.mlp.fc2",
                "bridge.vision_norm": "vision_model.post_layernorm",
            }
        ),
    ]
    return for_layers(rules, range(config.layers))


QFORMER_LAYER = {
    "attention.query": "attention.attention.query",
    "attention.key": "attention.attention.key",
    "attention.value": "attention.attention.value",
    "attention.out": "attention.output.dense",
    "attention.norm": "attention.output.LayerNorm",
    "query_feed_forward.up": "intermediate_query.dense",
    "query_feed_forward.down": "output_query.dense",
    "query_feed_forward.norm": "output_query.LayerNorm",
}
QFORMER_CROSS = {
    "cross_attention.query": "crossattention.attention.query",
    "cross_attention.key": "crossattention.attention.key",
    "cross_attention.value": "crossattention.attention.value",
    "cross_attention.out": "crossattention.output.dense",
    "cross_attention.norm": "crossattention.output.LayerNorm",
}
QFORMER_TEXT = {
    "text_feed_forward.up": "intermediate.dense",
    "text_feed_forward.down": "output.dense",
    "text_feed_forward.norm": "output.LayerNorm",
}


def qformer(config: QFormerConfig) -> list[Rule]:
    """The Q-Former: cross-attention in some layers, a text side in retrieval models only."""
    layers, crossing = range(config.layers), range(0, config.layers, config.cross_attention_every)
    rules = same({"bridge.qformer.query_tokens": "query_tokens"})
    rules += weights_and_biases({"bridge.qformer.norm": "qformer.layernorm"})
    rules += for_layers(_of_layer(QFORMER_LAYER), layers) + for_layers(_of_layer(QFORMER_CROSS), crossing)
    if config.text:
        rules += for_layers(_of_layer(QFORMER_TEXT), layers)
        words = {"words": "word_embeddings", "positions": "position_embeddings"}
        rules += same(
            {f"bridge.qformer.{ours}.weight": f"embeddings.{theirs}.weight" for ours, theirs in words.items()}
        )
    return rules


def _of_layer(pairs: dict[str, str]) -> list[Rule]:
    return within(weights_and_biases(pairs), "bridge.qformer.layers.*.", "qformer.encoder.layer.*.")


# What files may hold beside: buffers of older releases, copies of tied embeddings.
BESIDE = (
    "vision_model.embeddings.position_ids",
    "qformer.embeddings.position_ids",
    "embeddings.position_ids",
    "language_model.lm_head.weight",
    "language_model.encoder.embed_tokens.weight",
    "language_model.decoder.embed_tokens.weight",
    "language_model.model.decoder.version",
)
