"""What the keys of a `config.json` of transformers are called here: tables, and the few that stand for several."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Collection, Mapping
from typing import Any

from pydantic import TypeAdapter

from blip2.config import (
    Blip2Config,
    LanguageConfig,
    OPTConfig,
    PartConfig,
    PromptConfig,
    QFormerConfig,
    T5Config,
    VisionConfig,
)
from blip2.errors import CheckpointError
from blip2.weights.sizes import check_sizes

# Ours to theirs, with what transformers takes where the file leaves a key out.
VISION = {
    "image_size": ("image_size", 224),
    "patch_size": ("patch_size", 14),
    "width": ("hidden_size", 1408),
    "layers": ("num_hidden_layers", 39),
    "heads": ("num_attention_heads", 16),
    "mlp_width": ("intermediate_size", 6144),
    "norm_eps": ("layer_norm_eps", 1e-6),
    "activation": ("hidden_act", "gelu"),
}
QFORMER = {
    "width": ("hidden_size", 768),
    "layers": ("num_hidden_layers", 12),
    "heads": ("num_attention_heads", 12),
    "mlp_width": ("intermediate_size", 3072),
    "encoder_width": ("encoder_hidden_size", 1408),
    "cross_attention_every": ("cross_attention_frequency", 2),
    "vocab_size": ("vocab_size", 30522),
    "positions": ("max_position_embeddings", 512),
    "norm_eps": ("layer_norm_eps", 1e-12),
    "dropout": ("hidden_dropout_prob", 0.1),
    "text": ("use_qformer_text_input", False),
    "pad_id": ("pad_token_id", 0),
}
OPT = {
    "width": ("hidden_size", 768),
    "layers": ("num_hidden_layers", 12),
    "heads": ("num_attention_heads", 12),
    "mlp_width": ("ffn_dim", 3072),
    "vocab_size": ("vocab_size", 50272),
    "context": ("max_position_embeddings", 2048),
}
T5 = {
    "width": ("d_model", 512),
    "layers": ("num_layers", 6),
    "heads": ("num_heads", 8),
    "head_width": ("d_kv", 64),
    "mlp_width": ("d_ff", 2048),
    "vocab_size": ("vocab_size", 32128),
    "buckets": ("relative_attention_num_buckets", 32),
    "max_distance": ("relative_attention_max_distance", 128),
    "norm_eps": ("layer_norm_epsilon", 1e-6),
    "start_id": ("decoder_start_token_id", 0),
}
# What our models compute; a file that wants anything else is refused.
FIXED: Mapping[str, Mapping[str, Any]] = {
    "qformer_config": {"hidden_act": "gelu"},
    "opt": {
        "activation_function": "relu",
        "do_layer_norm_before": True,
        "enable_bias": True,
        "layer_norm_elementwise_affine": True,
        "_remove_final_layer_norm": False,
        "tie_word_embeddings": True,
    },
}
ALIKE = 0.85  # of two keys, by difflib: one letter in ten or so is wrong
OPT_PROMPTS = PromptConfig(visual="before_bos", question="Question: {} Answer:")
T5_PROMPTS = PromptConfig(visual="before_bos", question="Question: {} Short answer:")
T5_ACTIVATIONS: Mapping[str, Any] = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}


def config(values: Mapping[str, Any], source: object, names: Collection[str] = ()) -> Blip2Config:
    """Our configuration from the file's.

    Args:
        source: what an error calls the file.
        names: of the checkpoint's tensors, which tell what the file may not: a retrieval model from one that writes, a
            head of its own from one that is tied.
    Raises:
        CheckpointError: a model of another kind, or one that computes what ours do not.
    """
    try:
        found = _config(values, source, names)
    except (TypeError, AttributeError, ValueError, KeyError) as error:
        raise CheckpointError(f"{source}: cannot be understood: {error}") from None
    _check(found, source, len(names))
    return found


def _config(values: Mapping[str, Any], source: object, names: Collection[str]) -> Blip2Config:
    if values.get("model_type") not in ("blip-2", "blip_2"):
        raise CheckpointError(f"{source}: model_type is {values.get('model_type')!r}, not 'blip-2'")
    vision, qformer = values.get("vision_config") or {}, values.get("qformer_config") or {}
    _refuse_others(qformer, FIXED["qformer_config"], f"{source}: qformer_config")
    _refuse_misspelt(vision, VISION, f"{source}: vision_config")
    _refuse_misspelt(qformer, QFORMER, f"{source}: qformer_config")
    retrieves = "Blip2ForImageTextRetrieval" in (values.get("architectures") or ()) or "itm_head.weight" in names
    tied = "language_model.lm_head.weight" not in names
    language = None if retrieves else _language(values.get("text_config") or {}, source, tied)
    text = {"text": retrieves, "vocab_size": qformer.get("vocab_size") or (30523 if retrieves else 30522)}
    shape: dict[str, Any] = {**_read(qformer, QFORMER), **text, "queries": values.get("num_query_tokens") or 32}
    made = Blip2Config(
        vision=VisionConfig(**_read(vision, VISION), key_bias=True),
        qformer=QFormerConfig(**shape, decoder_id=shape["vocab_size"] - 1),
        language=language,
        embedding_width=values.get("image_text_hidden_size") or 256,
        vision_norm_eps=_read(vision, VISION)["norm_eps"],
        heads=retrieves,
        word_head=False,
        prompts=T5_PROMPTS if isinstance(language, T5Config) else OPT_PROMPTS,
    )
    return TypeAdapter(Blip2Config).validate_python(dataclasses.asdict(made))  # dataclasses take any value


def _check(config: Blip2Config, source: object, tensors: int) -> None:
    """Refuse sizes that no checkpoint has, before a module of them is made."""
    parts = {"vision_config": config.vision, "qformer_config": config.qformer, "text_config": config.language}
    check_sizes({**parts, "config": config}, source, tensors)
    if config.vision.width != config.qformer.encoder_width:
        raise CheckpointError(
            f"{source}: qformer_config: encoder_hidden_size is {config.qformer.encoder_width}, "
            f"the image encoder's is {config.vision.width}"
        )


def _language(values: Mapping[str, Any], source: object, tied: bool) -> LanguageConfig:
    kind = values.get("model_type", "opt")
    if kind == "opt":
        _refuse_others(values, FIXED["opt"], f"{source}: text_config")
        _refuse_misspelt(values, OPT, f"{source}: text_config")
        width = values.get("hidden_size", 768)
        if (values.get("word_embed_proj_dim") or width) != width:
            raise CheckpointError(f"{source}: text_config: word_embed_proj_dim is not hidden_size, as in OPT-350m")
        return OPTConfig(**_read(values, OPT))
    if kind == "t5":
        _refuse_misspelt(values, T5, f"{source}: text_config")
        kind = str(values.get("feed_forward_proj", "relu"))
        activation = values.get("dense_act_fn") or ("gelu_new" if kind == "gated-gelu" else kind.partition("-")[2])
        if not kind.startswith("gated-") or activation not in T5_ACTIVATIONS:
            raise CheckpointError(
                f"{source}: text_config: feed_forward_proj is {kind!r} with {activation!r}; "
                "only the gated GELU of T5 1.1 and Flan-T5 is known"
            )
        scaled = values.get("scale_decoder_outputs", values.get("tie_word_embeddings") is not False)
        return T5Config(**_read(values, T5), activation=T5_ACTIVATIONS[activation], tied=tied, scaled=scaled)
    raise CheckpointError(f"{source}: text_config: a language model of kind {kind!r}; opt and t5 are known")


def _refuse_misspelt(values: Mapping[str, Any], table: Mapping[str, tuple[str, Any]], where: str) -> None:
    """Files hold many keys that say nothing here; one that is nearly a missing key of ours would be lost in silence."""
    lacking = [theirs for theirs, _ in table.values() if theirs not in values]
    for key in sorted(values.keys() - {theirs for theirs, _ in table.values()}):
        if meant := difflib.get_close_matches(key, lacking, 1, ALIKE):
            raise CheckpointError(f"{where}: unknown key {key!r}; {meant[0]!r} is meant, by the look of it")


def _read(values: Mapping[str, Any], table: Mapping[str, tuple[str, Any]]) -> dict[str, Any]:
    return {
        ours: default if values.get(theirs) is None else values[theirs] for ours, (theirs, default) in table.items()
    }


def _refuse_others(values: Mapping[str, Any], fixed: Mapping[str, Any], where: str) -> None:
    for key, only in fixed.items():
        if values.get(key, only) != only:
            raise CheckpointError(f"{where}: {key} is {values[key]!r}, only {only!r} is known")


def values(
    config: Blip2Config,
    *,
    bos_id: int | None = None,
    stop_ids: Collection[int] = (),
    pad_id: int = 1,
    dtype: str = "float32",
) -> dict[str, Any]:
    """What transformers writes into `config.json` for a configuration of ours; `config` reads it back.

    Args:
        bos_id: of an OPT; None is transformers' own.
    Raises:
        CheckpointError: the format cannot hold the model.
    """
    vision, language = config.vision, config.language
    if not isinstance(vision, VisionConfig) or vision.pre_norm or not vision.patch_bias:
        raise CheckpointError("transformers' BLIP-2 holds the EVA ViT-g layout only; LAVIS's format holds both")
    if isinstance(language, PartConfig) or (language is None and not config.heads):
        raise CheckpointError(
            "transformers' BLIP-2 holds OPT and T5, or a retrieval model; frozen parts by name have no place in it"
        )
    if language is not None and config.heads:
        raise CheckpointError("transformers' BLIP-2 holds a model that writes or one that matches, not both in one")
    if config.qformer.text_pooling != "cls":
        raise CheckpointError("transformers' BLIP-2 reads a text vector from the first token, this model from the mean")
    found: dict[str, Any] = {
        "model_type": "blip-2",
        "architectures": ["Blip2ForImageTextRetrieval" if language is None else "Blip2ForConditionalGeneration"],
        "vision_config": {"model_type": "blip_2_vision_model", "qkv_bias": True, **_write(vision, VISION)},
        "qformer_config": {"model_type": "blip_2_qformer", "hidden_act": "gelu", **_write(config.qformer, QFORMER)},
        "num_query_tokens": config.qformer.queries,
        "image_text_hidden_size": config.embedding_width,
        "dtype": dtype,
    }
    if isinstance(language, OPTConfig):
        text = {"model_type": "opt", "word_embed_proj_dim": language.width, **_write(language, OPT), **FIXED["opt"]}
        text |= {} if bos_id is None else {"bos_token_id": bos_id}
        found["use_decoder_only_language_model"] = True
    elif isinstance(language, T5Config):
        text = {
            "model_type": "t5",
            "feed_forward_proj": "gated-gelu",
            "dense_act_fn": "gelu" if language.activation == "gelu" else "gelu_new",
            "tie_word_embeddings": language.tied,
            "scale_decoder_outputs": language.scaled,
            "is_encoder_decoder": True,
            "bos_token_id": 1,
            **_write(language, T5),
        }
        found["use_decoder_only_language_model"] = False
    else:
        return found
    ends = list(stop_ids)
    return {
        **found,
        "text_config": {**text, "eos_token_id": ends[0] if len(ends) == 1 else ends, "pad_token_id": pad_id},
    }


def _write(config: Any, table: Mapping[str, tuple[str, Any]]) -> dict[str, Any]:
    return {theirs: getattr(config, ours) for ours, (theirs, _) in table.items()}
