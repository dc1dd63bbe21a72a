"""LAVIS's ways to load a model: `load_model_and_preprocess`, `load_model` and the table `model_zoo`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import blip2
from blip2.blip2 import Blip2
from blip2.compat.lavis import zoo
from blip2.compat.lavis.blip2_models import Blip2Base, Blip2ITM, Blip2Qformer, Blip2Writer
from blip2.compat.lavis.processors import BlipCaptionProcessor, BlipImageEvalProcessor, BlipImageTrainProcessor
from blip2.compat.lavis.zoo import model_zoo
from blip2.config import LanguageConfig
from blip2.errors import CheckpointError
from blip2.weights.lavis import SUFFIX

__all__ = ["load_model", "load_model_and_preprocess", "model_zoo"]

VISION_NORM_EPS = 1e-5  # LAVIS's `ln_vision`; transformers computes the same weights with 1e-6
_KINDS: dict[str, type[Blip2Base]] = {
    "blip2_opt": Blip2Writer,
    "blip2_t5": Blip2Writer,
    "blip2": Blip2Qformer,
    "blip2_feature_extractor": Blip2Qformer,
    "blip2_image_text_matching": Blip2ITM,
}


def load_model(
    name: str,
    model_type: str = "base",
    is_eval: bool = False,
    device: str | torch.device = "cpu",
    checkpoint: str | Path | None = None,
    *,
    parts: Mapping[str, str | Path] | None = None,
    dtype: str = "auto",
    offline: bool = False,
) -> Any:
    """A published BLIP-2 model by LAVIS's name and type.

    Args:
        name, model_type: a row of `model_zoo`.
        is_eval: without it the Q-Former drops out, as in LAVIS: for training.
        checkpoint: LAVIS's `.pth`, or whatever else `blip2.load` takes. Where None, LAVIS's own file in torch hub's
            folder of checkpoints, else the repository with the same weights on the Hugging Face hub.
        parts: of a `.pth`: where its frozen parts are, see `blip2.load`. The language model and BERT's tokenizer are
            looked for on the hub too, where LAVIS has them from.
        dtype: of the frozen parts, see `blip2.load`.
        offline: ask no hub, take what its cache has.
    Returns:
        `Blip2Writer`, `Blip2Qformer` or `Blip2ITM`; its `core` is the `blip2.Blip2` behind it.
    Raises:
        ConfigError: LAVIS has no such BLIP-2 model, the error names those that there are.
        CheckpointError: the weights are not found, or are of another kind of model.
    """
    entry = zoo.published(name, model_type)
    source = str(checkpoint or zoo.weights(entry))
    found: dict[str, Any] = {"offline": offline}
    if source.endswith(SUFFIX):
        found = {"parts": zoo.frozen_parts(entry, Path(source), parts or {}, offline)}
    elif parts:
        found["parts"] = parts
    core = blip2.load(source, device=str(device), dtype=dtype, **found)
    _check(core, name, source)
    if core.config.vision_norm_eps != VISION_NORM_EPS:
        core.bridge.vision_norm.eps = VISION_NORM_EPS
        core = dataclasses.replace(core, config=core.config.replace(vision_norm_eps=VISION_NORM_EPS))
    return _KINDS[name](core, entry.prompt).train(not is_eval)


def load_model_and_preprocess(
    name: str,
    model_type: str,
    is_eval: bool = False,
    device: str | torch.device = "cpu",
    checkpoint: str | Path | None = None,
    *,
    parts: Mapping[str, str | Path] | None = None,
    dtype: str = "auto",
    offline: bool = False,
) -> tuple[Any, dict[str, Callable[[Image.Image], Tensor]], dict[str, Callable[[str], str]]]:
    """A model as `load_model` gives it, and its processors.

    Returns:
        the model; `vis_processors` and `txt_processors`, each with the keys `train` and `eval`: a PIL image to
        float32[3, S, S], and a text to the text that the model was trained on.
    Raises:
        ConfigError, CheckpointError: see `load_model`.
    """
    model = load_model(name, model_type, is_eval, device, checkpoint, parts=parts, dtype=dtype, offline=offline)
    encoder = model.core.encoder
    seen = {"image_size": encoder.image_size, "mean": encoder.mean, "std": encoder.std}
    pictures = {"train": BlipImageTrainProcessor(**seen), "eval": BlipImageEvalProcessor(**seen)}
    return model, {**pictures}, {"train": BlipCaptionProcessor(), "eval": BlipCaptionProcessor()}


def _check(core: Blip2, name: str, source: str) -> None:
    """Refuse a checkpoint that this name cannot do its work with."""
    kind = {"blip2_opt": "opt", "blip2_t5": "t5"}.get(name)
    if kind is None:
        if not core.config.heads or core.text_tokenizer is None:
            raise CheckpointError(
                f"{source}: has no matching heads, which {name} is made of; blip2_opt and blip2_t5 write"
            )
        if core.config.qformer.text_pooling != "cls":
            raise CheckpointError(f"{source}: no model of LAVIS's, its texts are not read from [CLS]; use blip2.load")
        return
    language = core.config.language
    if not isinstance(language, LanguageConfig) or language.kind != kind:
        held = "no language model" if language is None else getattr(language, "kind", "another language model")
        raise CheckpointError(f"{source}: holds {held}, and {name} is a model with {kind}")
