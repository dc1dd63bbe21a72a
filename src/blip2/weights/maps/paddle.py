"""The names of PaddleNLP: transformers' but for the language models, and linear weights lie the other way round."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

from blip2.config import Blip2Config, OPTConfig, T5Config
from blip2.weights.maps import transformers
from blip2.weights.rules import Rule, Transposed

_OPT = {
    "model.decoder.embed_tokens": "opt.embeddings.word_embeddings",
    "model.decoder.embed_positions": "opt.embeddings.position_embeddings",
    "model.decoder.final_layer_norm": "opt.decoder.final_layer_norm",
}
_OPT_LAYER = {"self_attn_layer_norm": "norm1", "final_layer_norm": "norm2", "fc1": "linear1", "fc2": "linear2"}
_NOT_LINEAR = re.compile(r"(norm|LayerNorm|embed\w*|shared|relative_attention_bias|\w+_layer_norm)\.weight$")
BESIDE = (
    "language_model.lm_head.decoder_weight",
    "language_model.t5.encoder.embed_tokens.weight",
    "language_model.t5.decoder.embed_tokens.weight",
    *transformers.BESIDE,
)


def blip2(config: Blip2Config) -> list[Rule]:
    """The whole of `Blip2ForConditionalGeneration`; ours: vision, bridge, language."""
    rules = [_transposed(rule) for rule in transformers.blip2(config)]
    if isinstance(config.language, OPTConfig):
        return [_named(rule, _opt) for rule in rules]
    return [_named(rule, _t5) for rule in rules] if isinstance(config.language, T5Config) else rules


def _transposed(rule: Rule) -> Rule:
    name = rule.theirs[0]
    linear = name.endswith(".weight") and not _NOT_LINEAR.search(name) and "norm" not in name.rsplit(".", 2)[-2].lower()
    linear = linear and "patch_embedding" not in name
    return dataclasses.replace(rule, operation=Transposed(rule.operation)) if linear else rule


def _named(rule: Rule, rename: Callable[[str], str]) -> Rule:
    return dataclasses.replace(rule, theirs=tuple(rename(name) for name in rule.theirs))


def _opt(name: str) -> str:
    head, _, rest = name.partition("language_model.")
    if head or not rest:
        return name
    for theirs, paddle in _OPT.items():
        if rest.startswith(f"{theirs}."):
            return f"language_model.{rest.replace(theirs, paddle, 1)}"
    layer = re.fullmatch(r"model\.decoder\.layers\.(\d+)\.(.*)\.(weight|bias)", rest)
    assert layer is not None
    number, part, kind = layer.groups()
    return f"language_model.opt.decoder.layers.{number}.{_OPT_LAYER.get(part, part)}.{kind}"


def _t5(name: str) -> str:
    return re.sub(r"^language_model\.(shared|encoder|decoder)\.", r"language_model.t5.\1.", name)
