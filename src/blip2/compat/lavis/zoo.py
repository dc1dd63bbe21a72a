"""The published BLIP-2 models by LAVIS's names, and where each one's weights are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from blip2.errors import CheckpointError, ConfigError
from blip2.weights import hub

RETRIEVAL = ("pretrain", "pretrain_vitL", "coco")
NAMES: dict[str, tuple[str, ...]] = {
    "blip2_opt": ("pretrain_opt2.7b", "pretrain_opt6.7b", "caption_coco_opt2.7b", "caption_coco_opt6.7b"),
    "blip2_t5": ("pretrain_flant5xl", "pretrain_flant5xl_vitL", "pretrain_flant5xxl", "caption_coco_flant5xl"),
    "blip2": RETRIEVAL,
    "blip2_feature_extractor": RETRIEVAL,
    "blip2_image_text_matching": RETRIEVAL,
}


@dataclass(frozen=True)
class Published:
    """One model type.

    Attributes:
        file: LAVIS's, as it lies in torch hub's folder of checkpoints.
        hub: the repository with the same weights, None where there is none.
        language: the repository of the frozen language model, None without one.
        prompt: what a text starts from where a sample has none.
    """

    file: str
    hub: str | None = None
    language: str | None = None
    prompt: str = ""


_COCO_PROMPT = "a photo of"
_TEXT = "bert-base-uncased"  # LAVIS's name for it, under which its cache has it
TYPES: dict[str, Published] = {
    "pretrain_opt2.7b": Published("blip2_pretrained_opt2.7b.pth", "Salesforce/blip2-opt-2.7b", "facebook/opt-2.7b"),
    "pretrain_opt6.7b": Published("blip2_pretrained_opt6.7b.pth", "Salesforce/blip2-opt-6.7b", "facebook/opt-6.7b"),
    "caption_coco_opt2.7b": Published(
        "blip2_caption_opt2.7b.pth", "Salesforce/blip2-opt-2.7b-coco", "facebook/opt-2.7b", _COCO_PROMPT
    ),
    "caption_coco_opt6.7b": Published(
        "blip2_caption_opt6.7b.pth", "Salesforce/blip2-opt-6.7b-coco", "facebook/opt-6.7b", _COCO_PROMPT
    ),
    "pretrain_flant5xl": Published("blip2_pretrained_flant5xl.pth", "Salesforce/blip2-flan-t5-xl", "google/flan-t5-xl"),
    "pretrain_flant5xl_vitL": Published("blip2_pretrained_flant5xl_vitL.pth", None, "google/flan-t5-xl"),
    "pretrain_flant5xxl": Published(
        "blip2_pretrained_flant5xxl.pth", "Salesforce/blip2-flan-t5-xxl", "google/flan-t5-xxl"
    ),
    "caption_coco_flant5xl": Published(
        "blip2_caption_flant5xl.pth", "Salesforce/blip2-flan-t5-xl-coco", "google/flan-t5-xl", _COCO_PROMPT
    ),
    "pretrain": Published("blip2_pretrained.pth", "Salesforce/blip2-itm-vit-g"),
    "pretrain_vitL": Published("blip2_pretrained_vitL.pth"),
    "coco": Published("blip2_finetune_coco.pth", "Salesforce/blip2-itm-vit-g-coco"),
}


class ModelZoo:
    """The table that `print(model_zoo)` shows; iterated, it gives names with their types."""

    def __iter__(self) -> Iterator[tuple[str, list[str]]]:
        return ((name, list(types)) for name, types in NAMES.items())

    def __repr__(self) -> str:
        head, line = f"{'Architectures':<30} Types", "=" * 50
        rows = [f"{name:<30} {', '.join(types)}" for name, types in NAMES.items()]
        return "\n".join([line, head, line, *rows])


model_zoo = ModelZoo()


def published(name: str, model_type: str) -> Published:
    """The entry of a model type.

    Raises:
        ConfigError: LAVIS has no such BLIP-2 model.
    """
    if name not in NAMES:
        other = " InstructBLIP's and LAVIS's other models are not BLIP-2's." if name not in TYPES else ""
        raise ConfigError(f"model {name!r}: there are {', '.join(NAMES)}.{other}")
    if model_type not in NAMES[name]:
        raise ConfigError(f"model_type {model_type!r} of {name!r}: there are {', '.join(NAMES[name])}")
    return TYPES[model_type]


def weights(entry: Published) -> str:
    """LAVIS's file where torch hub has it, else the repository with the same weights.

    Raises:
        CheckpointError: there is neither.
    """
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    if (folder / entry.file).is_file():
        return str(folder / entry.file)
    if entry.hub is not None:
        return entry.hub
    language = f", {entry.language.partition('/')[2]}/" if entry.language else ""
    raise CheckpointError(
        f"{entry.file}: models with a ViT-L are on no hub, only LAVIS publishes them: put this file into {folder} with "
        f"its frozen parts beside it (clip_vit_L.pth{language or f', {_TEXT}/'}), or name it with checkpoint="
    )


def frozen_parts(entry: Published, file: Path, named: Mapping[str, str | Path], offline: bool) -> dict[str, str | Path]:
    """The frozen parts beside LAVIS's file that it takes from the hub: a language model, or BERT's tokenizer.

    Args:
        named: those that the caller named; they stay.
    Returns:
        as `blip2.load` takes them: where it lies beside the file, else in the hub's cache.
    Raises:
        CheckpointError: it is not there, and cannot be downloaded.
    """
    key, repository = ("language", entry.language) if entry.language else ("text", _TEXT)
    if key in named:
        return dict(named)
    beside = file.parent / repository.rpartition("/")[2]
    return {**named, key: beside if beside.exists() else hub.download(repository, offline=offline)}
