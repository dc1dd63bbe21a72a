"""What a model is made of: frozen values, no code. Presets state only their differences.

Read from files through `read_config`, which refuses unknown keys and wrong types by name.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from blip2.errors import ConfigError

FORMAT_VERSION = 1  # of the directory that `weights.save` writes

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class Strict:
    """Mixin: pydantic refuses keys that the dataclass does not have."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}


@dataclass(frozen=True)
class VisionConfig(Strict):
    """A Vision Transformer. The defaults are EVA-CLIP ViT-g/14 as BLIP-2 uses it: 39 of 40 blocks, no final norm.

    Attributes:
        image_size: side of the square input in pixels.
        key_bias: False where the fused projection has a bias for query and value only (EVA).
        pre_norm: a LayerNorm before the first block (CLIP).
    """

    image_size: int = 224
    patch_size: int = 14
    width: int = 1408
    layers: int = 39
    heads: int = 16
    mlp_width: int = 6144
    norm_eps: float = 1e-6
    activation: Literal["gelu", "quick_gelu"] = "gelu"
    key_bias: bool = False
    pre_norm: bool = False
    patch_bias: bool = True
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

    @property
    def tokens(self) -> int:
        """Class token and patches."""
        return 1 + (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class PartConfig(Strict):
    """A frozen part that somebody else made, by the name that `adapters` knows it under.

    Attributes:
        name: such as `efficientnet-lite2-levels`, `gemma-3-270m`, `minilm-l6`, or `transformers:DIRECTORY`.
        width: of its output (encoder) or of its embeddings (language model).
        sha256: of its weights, empty until the model is saved; checked when it is loaded.
    """

    name: str
    width: int
    sha256: str = ""


@dataclass(frozen=True)
class QFormerConfig(Strict):
    """The Querying Transformer. The defaults are the published one: BERT-base with 32 queries.

    Attributes:
        encoder_width: width of the patches that the queries attend to.
        cross_attention_every: queries attend to the patches in layers 0, n, 2n, ...
        text: whether the text feed-forwards and embeddings exist (stage 1, matching, question-aware queries).
        text_pooling: what the text vector is projected from: the first token, or the mean over the text.
        frozen_words: the word embeddings belong to a frozen part: they are neither trained nor saved.
        decoder_id: token that takes the place of `cls_id` where text is generated ([DEC]).
    """

    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_width: int = 3072
    queries: int = 32
    encoder_width: int = 1408
    cross_attention_every: int = 2
    vocab_size: int = 30523
    positions: int = 512
    norm_eps: float = 1e-12
    dropout: float = 0.1
    text: bool = True
    text_pooling: Literal["cls", "mean"] = "cls"
    frozen_words: bool = False
    pad_id: int = 0
    cls_id: int = 101
    sep_id: int = 102
    decoder_id: int = 30522


@dataclass(frozen=True)
class OPTConfig(Strict):
    """A decoder of the OPT family with norms before its blocks. The defaults are OPT-2.7b."""

    kind: Literal["opt"] = "opt"
    width: int = 2560
    layers: int = 32
    heads: int = 32
    mlp_width: int = 10240
    vocab_size: int = 50272
    context: int = 2048


@dataclass(frozen=True)
class T5Config(Strict):
    """An encoder-decoder of the T5 1.1 family. The defaults are Flan-T5-XL as BLIP-2 uses it.

    Attributes:
        buckets, max_distance: of the relative positions.
        activation: of the gated feed-forward; BLIP-2 computes the exact GELU where Flan-T5 was trained with tanh's.
        tied: the head's weights are the embeddings.
        scaled: the head's input is divided by the root of the width, as in T5 1.0.
        context: positions are relative and have no end; what prefix and text may fill is only bounded for safety.
    """

    kind: Literal["t5"] = "t5"
    width: int = 2048
    layers: int = 24
    heads: int = 32
    head_width: int = 64
    mlp_width: int = 5120
    vocab_size: int = 32128
    buckets: int = 32
    max_distance: int = 128
    norm_eps: float = 1e-6
    activation: Literal["gelu", "gelu_tanh"] = "gelu"
    tied: bool = False
    scaled: bool = False
    start_id: int = 0
    context: int = 4096


@dataclass(frozen=True)
class GemmaConfig(Strict):
    """A text-only decoder of the Gemma 3 family. The defaults are Gemma 3 270M.

    Attributes:
        key_heads: heads of keys and values, each for `heads / key_heads` of the queries.
        query_scale: queries are divided by its root.
        window: positions that most layers see, the present one among them; None would be all.
        global_every: every so-manieth layer sees everything.
        local_theta, global_theta: base of the rotary positions in either kind of layer.
    """

    width: int = 640
    layers: int = 18
    heads: int = 4
    key_heads: int = 1
    head_width: int = 256
    mlp_width: int = 2048
    vocab_size: int = 262_144
    context: int = 32_768
    query_scale: int = 256
    window: int | None = 512
    global_every: int = 6
    local_theta: float = 10_000.0
    global_theta: float = 1_000_000.0
    norm_eps: float = 1e-6


LanguageConfig = OPTConfig | T5Config
"""A language model whose weights come with the checkpoint: the published ones."""


@dataclass(frozen=True)
class PromptConfig(Strict):
    """The words around an image, and how its prefix is laid out.

    Attributes:
        visual: whether the visual prefix stands before the begin-of-sequence token (published OPT) or after it.
        caption: what a caption starts from, empty for none.
        question: the template of one question; `{}` is the question.
        turn: one finished turn of a chat: question, answer.
    """

    visual: Literal["before_bos", "after_bos"] = "before_bos"
    caption: str = ""
    question: str = "Question: {} Answer:"
    turn: str = "Question: {} Answer: {}. "


@dataclass(frozen=True)
class CaptionConfig(Strict):
    """How captions are written where a call does not say; the defaults are the published models'.

    Attributes:
        length_penalty, no_repeat_ngram: see `decoding.Decoding`.
    """

    length_penalty: float = 1.0
    no_repeat_ngram: int = 0


@dataclass(frozen=True)
class BaseConfig(Strict):
    """The model that a fine-tuned one was made from, where it does not hold all parts itself.

    Attributes:
        name: its directory, or OWNER/NAME on the hub.
        sha256: of samples of its files of weights; checked when it is loaded.
        vision: whether the image encoder is its; a language model of our own kind always is.
    """

    name: str
    sha256: str
    vision: bool


@dataclass(frozen=True)
class Blip2Config(Strict):
    """A whole model.

    Attributes:
        vision: a ViT of our own, or a frozen part.
        language: None for a model that only matches and embeds (stage 1).
        text: the frozen part that the Q-Former's tokenizer and word embeddings come from, None where they are saved.
        embedding_width: of the shared image-text space (ITC).
        vision_norm_eps: of the LayerNorm between encoder and Q-Former (`ln_vision`).
        heads: whether the stage-1 heads (ITC, ITM, ITG) exist.
        word_head: whether the one of ITG is among them; transformers' retrieval checkpoints have none.
        plain_texts: texts are matched in lower case and without a final dot, as this model's training read captions.
        vocabulary: how many of the language model's tokens are written, `vocabulary.safetensors` says which; all where
            None.
        base: the model that parts are taken from which are not saved with this one; None where there are none.
        adapter: how many layers of the language model the PEFT adapter in the folder `adapter` changes, merged when it
            is loaded; 0 without one.
        question_aware: a question is read by the Q-Former too, beside the queries, so that they look where it asks.
    """

    vision: VisionConfig | PartConfig = dataclasses.field(default_factory=VisionConfig)
    qformer: QFormerConfig = dataclasses.field(default_factory=QFormerConfig)
    language: LanguageConfig | PartConfig | None = None
    text: PartConfig | None = None
    embedding_width: int = 256
    vision_norm_eps: float = 1e-5
    heads: bool = True
    word_head: bool = True
    plain_texts: bool = False
    vocabulary: int | None = None
    prompts: PromptConfig = dataclasses.field(default_factory=PromptConfig)
    captions: CaptionConfig = dataclasses.field(default_factory=CaptionConfig)
    base: BaseConfig | None = None
    adapter: int = 0
    question_aware: bool = False
    format: int = FORMAT_VERSION

    def replace(self, **changes: Any) -> Blip2Config:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)


EVA_G = VisionConfig()
CLIP_L = VisionConfig(
    width=1024,
    layers=23,
    mlp_width=4096,
    norm_eps=1e-5,
    activation="quick_gelu",
    key_bias=True,
    pre_norm=True,
    patch_bias=False,
)
_QUERIES_ONLY = QFormerConfig(text=False)


def _generative(vision: VisionConfig, language: LanguageConfig) -> Blip2Config:
    qformer = dataclasses.replace(_QUERIES_ONLY, encoder_width=vision.width)
    question = "Question: {} Answer:" if language.kind == "opt" else "Question: {} Short answer:"  # the paper's
    prompts = PromptConfig(question=question)
    return Blip2Config(vision=vision, qformer=qformer, language=language, heads=False, prompts=prompts)


OPT_2_7B = OPTConfig()
OPT_6_7B = OPTConfig(width=4096, mlp_width=16384)
FLAN_T5_XL = T5Config()
FLAN_T5_XXL = T5Config(width=4096, heads=64, mlp_width=10240)
_EVA_G_COCO = dataclasses.replace(EVA_G, image_size=364)

PRESETS: dict[str, Blip2Config] = {
    "pretrain": Blip2Config(),
    "pretrain_vitL": Blip2Config(vision=CLIP_L, qformer=QFormerConfig(encoder_width=1024)),
    "coco": Blip2Config(vision=_EVA_G_COCO),
    "pretrain_opt2.7b": _generative(EVA_G, OPT_2_7B),
    "pretrain_opt6.7b": _generative(EVA_G, OPT_6_7B),
    "pretrain_flant5xl": _generative(EVA_G, FLAN_T5_XL),
    "pretrain_flant5xxl": _generative(EVA_G, FLAN_T5_XXL),
    "pretrain_vitL_opt2.7b": _generative(CLIP_L, OPT_2_7B),
    "pretrain_flant5xl_vitL": _generative(CLIP_L, FLAN_T5_XL),
    "caption_coco_opt2.7b": _generative(_EVA_G_COCO, OPT_2_7B),
    "caption_coco_opt6.7b": _generative(_EVA_G_COCO, OPT_6_7B),
    "caption_coco_flant5xl": _generative(_EVA_G_COCO, FLAN_T5_XL),
    "mini": Blip2Config(
        vision=PartConfig("efficientnet-lite2-levels", width=1280),
        text=PartConfig("minilm-l6", width=384),
        language=PartConfig("gemma-3-270m", width=640),
        qformer=QFormerConfig(
            width=384,
            layers=6,
            mlp_width=1536,
            queries=16,
            encoder_width=1280,
            vocab_size=30522,
            positions=64,
            text_pooling="mean",
            frozen_words=True,
            decoder_id=1,  # [unused0], which no text contains
        ),
        prompts=PromptConfig(visual="after_bos"),
    ),
}

HUB: dict[str, str] = {  # what is published there, under its owner's name Salesforce, and our preset of it
    "blip2-opt-2.7b": "pretrain_opt2.7b",
    "blip2-opt-6.7b": "pretrain_opt6.7b",
    "blip2-flan-t5-xl": "pretrain_flant5xl",
    "blip2-flan-t5-xxl": "pretrain_flant5xxl",
    "blip2-opt-2.7b-coco": "caption_coco_opt2.7b",
    "blip2-opt-6.7b-coco": "caption_coco_opt6.7b",
    "blip2-flan-t5-xl-coco": "caption_coco_flant5xl",
    "blip2-itm-vit-g": "pretrain",
    "blip2-itm-vit-g-coco": "coco",
}


def read_config(path: Path) -> Blip2Config:
    """A configuration from a JSON file.

    Raises:
        ConfigError: the file is not JSON, has an unknown key or a value of the wrong type; the message names the key.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        values = json.loads(path.read_text())
        version = values.get("format") if isinstance(values, dict) else None
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise ConfigError(f"{path}: format {version} is newer than this blip2 reads ({FORMAT_VERSION}); upgrade it")
        return TypeAdapter(Blip2Config).validate_python(values)
    except ValidationError as error:
        raise ConfigError(f"{path}: {describe(error)}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read as a configuration: {error}") from None


def write_config(config: Blip2Config, path: Path) -> None:
    """The configuration as JSON, which `read_config` reads back equal."""
    path.write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")


def describe(error: Any) -> str:
    """A pydantic ValidationError in one line: `key.inner: what is wrong; ...`."""
    return "; ".join(f"{'.'.join(str(part) for part in e['loc'])}: {e['msg']}" for e in error.errors())
