"""The names of LAVIS: what was trained, and the two image encoders beside it.

Ours begin with `vision.` and `bridge.`; a LAVIS file holds neither a language model nor, mostly, an image encoder.
"""

from __future__ import annotations

from blip2.config import Blip2Config, LanguageConfig, QFormerConfig, VisionConfig
from blip2.weights.maps.transformers import QFORMER_CROSS, QFORMER_LAYER, QFORMER_TEXT
from blip2.weights.rules import Copied, Leading, NoKeyBias, Rule, for_layers, same, weights_and_biases, within

_BERT = "Qformer.bert"
BESIDE = (f"{_BERT}.embeddings.position_ids",)  # a buffer that older files hold


def trained(config: Blip2Config) -> list[Rule]:
    """What a LAVIS file holds of a model whose image encoder was frozen."""
    rules = weights_and_biases({"bridge.vision_norm": "ln_vision"}) + _qformer(config.qformer)
    words = "bridge.qformer.words.weight"
    if config.heads:
        predictions, head = "Qformer.cls.predictions", "bridge.heads.words"
        rules += weights_and_biases(
            {
                "bridge.heads.vision_proj": "vision_proj",
                "bridge.heads.text_proj": "text_proj",
                "bridge.heads.itm_head": "itm_head",
                f"{head}.transform": f"{predictions}.transform.dense",
                f"{head}.norm": f"{predictions}.transform.LayerNorm",
            }
        )
        rules += same({"bridge.heads.temperature": "temp"})
        embeddings = f"{_BERT}.embeddings.word_embeddings.weight"
        rules += [
            Rule((words,), (embeddings, f"{predictions}.decoder.weight"), Copied(2)),
            Rule((f"{head}.bias",), (f"{predictions}.bias", f"{predictions}.decoder.bias"), Copied(2)),
        ]
    if isinstance(config.language, LanguageConfig):
        rules += weights_and_biases({"bridge.language_projection": f"{config.language.kind}_proj"})
    return rules


def _qformer(config: QFormerConfig) -> list[Rule]:
    layers, crossing = range(config.layers), range(0, config.layers, config.cross_attention_every)
    rules = same({"bridge.qformer.query_tokens": "query_tokens"})
    rules += weights_and_biases({"bridge.qformer.norm": f"{_BERT}.embeddings.LayerNorm"})
    rules += for_layers(_of_layer(QFORMER_LAYER), layers) + for_layers(_of_layer(QFORMER_CROSS), crossing)
    if config.text:
        rules += for_layers(_of_layer(QFORMER_TEXT), layers)
        rules += same({"bridge.qformer.positions.weight": f"{_BERT}.embeddings.position_embeddings.weight"})
    return rules


def _of_layer(pairs: dict[str, str]) -> list[Rule]:
    """transformers' names of a layer, but for one word."""
    renamed = {ours: theirs.replace("attention.attention", "attention.self") for ours, theirs in pairs.items()}
    return within(weights_and_biases(renamed), "bridge.qformer.layers.*.", f"{_BERT}.encoder.layer.*.")


def vision(config: VisionConfig) -> list[Rule]:
    """An image encoder by the names of its own file; within a fine-tuned model `visual_encoder.` stands before them."""
    return for_layers(_clip() if config.pre_norm else _eva(config), range(config.layers))


def _eva(config: VisionConfig) -> list[Rule]:
    attention = "vision.blocks.*.attention"
    theirs = ("blocks.*.attn.q_bias", "blocks.*.attn.v_bias")
    if config.key_bias:
        biases = [Rule((f"{attention}.qkv.bias",), theirs, NoKeyBias())]
    else:
        biases = same({f"{attention}.query_bias": theirs[0], f"{attention}.value_bias": theirs[1]})
    return [
        *same(
            {
                "vision.class_token": "cls_token",
                "vision.positions": "pos_embed",
                f"{attention}.qkv.weight": "blocks.*.attn.qkv.weight",
            }
        ),
        *biases,
        *weights_and_biases(
            {
                "vision.patch_embedding": "patch_embed.proj",
                "vision.blocks.*.norm1": "blocks.*.norm1",
                "vision.blocks.*.attention.out": "blocks.*.attn.proj",
                "vision.blocks.*.norm2": "blocks.*.norm2",
                "vision.blocks.*.up": "blocks.*.mlp.fc1",
                "vision.blocks.*.down": "blocks.*.mlp.fc2",
            }
        ),
    ]


def _clip() -> list[Rule]:
    block = "transformer.resblocks.*"
    return [
        Rule(("vision.class_token",), ("class_embedding",), Leading(2)),
        Rule(("vision.positions",), ("positional_embedding",), Leading(1)),
        *same(
            {
                "vision.patch_embedding.weight": "conv1.weight",
                "vision.blocks.*.attention.qkv.weight": f"{block}.attn.in_proj_weight",
                "vision.blocks.*.attention.qkv.bias": f"{block}.attn.in_proj_bias",
            }
        ),
        *weights_and_biases(
            {
                "vision.pre_norm": "ln_pre",
                "vision.blocks.*.norm1": f"{block}.ln_1",
                "vision.blocks.*.attention.out": f"{block}.attn.out_proj",
                "vision.blocks.*.norm2": f"{block}.ln_2",
                "vision.blocks.*.up": f"{block}.mlp.c_fc",
                "vision.blocks.*.down": f"{block}.mlp.c_proj",
            }
        ),
    ]
