"""Configurations under transformers' keys: bags of values with its defaults, read and written as `config.json`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import torch

import blip2
from blip2 import config
from blip2.compat.transformers import places
from blip2.errors import ConfigError
from blip2.quantize import Scheme
from blip2.weights.maps import transformers_config as keys
from blip2.weights.transformers import read_json


def _defaults(table: Mapping[str, tuple[str, Any]]) -> dict[str, Any]:
    return dict(table.values())


class PretrainedConfig:
    """Values by name; those that are not given have the class's defaults, and others are kept as they are."""

    model_type: ClassVar[str] = ""
    section: ClassVar[str] = ""
    defaults: ClassVar[Mapping[str, Any]] = {}
    other_names: ClassVar[Mapping[str, str]] = {}

    def __init__(self, **values: Any) -> None:
        values.pop("model_type", None)
        for name, value in {**self.defaults, **values}.items():
            setattr(self, name, value)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """From the keys of a `config.json`."""
        return cls(**values)

    @classmethod
    def from_pretrained(cls, name: str | Path, **where: Any) -> Self:
        """From a directory or a name on the hub.

        Args:
            where: of `places.find`.
        """
        values = read_json(places.find(name, **where) / "config.json")
        if values.get("model_type") != cls.model_type and cls.section in values:
            values = values[cls.section]
        return cls.from_dict(values)

    def __getattr__(self, name: str) -> Any:
        """A value by the name that other models give it."""
        if name in self.other_names:
            return getattr(self, self.other_names[name])
        raise AttributeError(f"{type(self).__name__} has no {name!r}")

    def to_dict(self) -> dict[str, Any]:
        """The keys of a `config.json`."""
        values = {name: _plain(value) for name, value in vars(self).items()}
        return {**values, "model_type": self.model_type}

    def to_json_string(self) -> str:
        """`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def save_pretrained(self, directory: str | Path) -> None:
        """Write `config.json` into a directory."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        (Path(directory) / "config.json").write_text(self.to_json_string())

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string()}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PretrainedConfig) and self.to_dict() == other.to_dict()

    __hash__ = None  # pyright: ignore[reportAssignmentType]  # values may change


class Blip2VisionConfig(PretrainedConfig):
    """The image encoder: EVA's ViT-g where nothing else is said."""

    model_type = "blip_2_vision_model"
    section = "vision_config"
    defaults: ClassVar = {**_defaults(keys.VISION), "qkv_bias": True, "attention_dropout": 0.0}


class Blip2QFormerConfig(PretrainedConfig):
    """The Q-Former: BERT-base where nothing else is said."""

    model_type = "blip_2_qformer"
    section = "qformer_config"
    defaults: ClassVar = {**_defaults(keys.QFORMER), "hidden_act": "gelu"}


class OPTConfig(PretrainedConfig):
    """OPT: the 125m where nothing else is said."""

    model_type = "opt"
    section = "text_config"
    defaults: ClassVar = {
        **_defaults(keys.OPT), **keys.FIXED["opt"], "bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1,
        "is_encoder_decoder": False,
    }  # fmt: skip


class T5Config(PretrainedConfig):
    """T5 1.1: the small one where nothing else is said."""

    model_type = "t5"
    section = "text_config"
    defaults: ClassVar = {
        **_defaults(keys.T5), "feed_forward_proj": "gated-gelu", "bos_token_id": None, "eos_token_id": 1,
        "pad_token_id": 0, "is_encoder_decoder": True,
    }  # fmt: skip
    other_names: ClassVar = {
        "hidden_size": "d_model",
        "num_attention_heads": "num_heads",
        "num_hidden_layers": "num_layers",
    }


_LANGUAGES: dict[str, type[PretrainedConfig]] = {"opt": OPTConfig, "t5": T5Config}


class Blip2Config(PretrainedConfig):
    """A whole model: three configurations and what joins them.

    Args:
        vision_config, qformer_config, text_config: configurations, ours or transformers', or their keys.
        num_query_tokens: queries of the Q-Former.
        image_text_hidden_size: width of the image-text space.
        image_token_index: id of the placeholder that a query takes the place of; None in older models, whose queries
            stand before the text.
    Raises:
        ConfigError: a language model of another kind than OPT and T5.
    """

    model_type = "blip-2"

    def __init__(
        self,
        vision_config: Any = None,
        qformer_config: Any = None,
        text_config: Any = None,
        num_query_tokens: int = 32,
        image_text_hidden_size: int = 256,
        image_token_index: int | None = None,
        **values: Any,
    ) -> None:
        newer = values.pop("image_token_id", None)
        image_token_index = newer if image_token_index is None else image_token_index
        super().__init__(**values)
        self.vision_config = Blip2VisionConfig(**_values(vision_config))
        self.qformer_config = Blip2QFormerConfig(**_values(qformer_config))
        text = _values(text_config)
        kind = str(text.get("model_type", "opt"))
        if kind not in _LANGUAGES:
            raise ConfigError(f"text_config: a language model of kind {kind!r}; opt and t5 are known")
        self.text_config = _LANGUAGES[kind](**text)
        self.num_query_tokens = num_query_tokens
        self.image_text_hidden_size = image_text_hidden_size
        self.image_token_index = image_token_index
        vars(self.qformer_config)["encoder_hidden_size"] = self.vision_config.hidden_size  # as transformers sets it
        self.use_decoder_only_language_model = kind == "opt"
        self.is_encoder_decoder = kind == "t5"

    @classmethod
    def from_vision_qformer_text_configs(
        cls, vision_config: Any, qformer_config: Any, text_config: Any = None, **values: Any
    ) -> Self:
        """From the configurations of the three parts."""
        return cls(vision_config, qformer_config, text_config, **values)

    def ours(self, *, retrieves: bool = False) -> blip2.Blip2Config:
        """The configuration as blip2 has it.

        Args:
            retrieves: for a model that matches and embeds, without a language model.
        Raises:
            CheckpointError: it asks for what blip2's models do not compute.
        """
        kind = ["Blip2ForImageTextRetrieval"] if retrieves else []
        found = keys.config({**self.to_dict(), "architectures": kind}, "this configuration")
        if isinstance(found.language, config.T5Config):
            tied = getattr(self.text_config, "tie_word_embeddings", False)
            return found.replace(language=dataclasses.replace(found.language, tied=bool(tied)))
        return found

    @property
    def image_token_id(self) -> int | None:
        """`image_token_index` by its newer name."""
        return self.image_token_index

    @image_token_id.setter
    def image_token_id(self, value: int | None) -> None:
        self.image_token_index = value

    @property
    def hidden_size(self) -> int:
        """Width of the language model's embeddings."""
        return self.text_config.hidden_size


class BitsAndBytesConfig:
    """How weights are quantised. blip2 has its own int8 and int4: what bitsandbytes alone has is taken note of.

    Args:
        load_in_8bit, load_in_4bit: at most one of them.
        others: `bnb_4bit_compute_dtype`, `llm_int8_threshold`, ...: kept, and without effect.
    Raises:
        ConfigError: both are asked for.
    """

    quant_method = "bitsandbytes"

    def __init__(self, load_in_8bit: bool = False, load_in_4bit: bool = False, **others: Any) -> None:
        if load_in_8bit and load_in_4bit:
            raise ConfigError("load_in_8bit and load_in_4bit: weights have 8 bits or 4, not both")
        self.load_in_8bit, self.load_in_4bit = load_in_8bit, load_in_4bit
        for name, value in others.items():
            setattr(self, name, value)

    @property
    def quantize(self) -> Scheme | None:
        """What `blip2.load` calls it: `int8`, `int4` or None."""
        return "int8" if self.load_in_8bit else "int4" if self.load_in_4bit else None

    def to_dict(self) -> dict[str, Any]:
        """The values by name."""
        return {name: _plain(value) for name, value in vars(self).items()} | {"quant_method": self.quant_method}


def _values(config: Any) -> dict[str, Any]:
    """The keys of a configuration, ours, transformers' or a plain mapping."""
    if config is None:
        return {}
    return dict(config) if isinstance(config, Mapping) else dict(config.to_dict())


def _plain(value: Any) -> Any:
    if isinstance(value, PretrainedConfig):
        return value.to_dict()
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
