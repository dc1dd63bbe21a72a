"""Models in LAVIS's files: what was trained, beside frozen parts that lie elsewhere."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from blip2.blip2 import Blip2
from blip2.config import PRESETS, Blip2Config, LanguageConfig, OPTConfig, T5Config, VisionConfig
from blip2.errors import CheckpointError, ConfigError
from blip2.files import replacing
from blip2.model.bridge import Bridge
from blip2.model.vision import VisionTransformer
from blip2.quantize import check_plain
from blip2.text import Tokenizer
from blip2.weights import calibrated, transformers, vocabulary
from blip2.weights.fill import Part, fill
from blip2.weights.maps import lavis as maps
from blip2.weights.maps import transformers as transformers_maps
from blip2.weights.placement import WHOLE, Home, Memory, plan
from blip2.weights.rules import Rule, for_layers, to_theirs, within
from blip2.weights.skeleton import skeleton
from blip2.weights.tensors import Pickled, Tensors, open_directory, read_pickle

SUFFIX = ".pth"
_WITHIN = "visual_encoder."  # before the image encoder's names where it was trained too
_EVA, _CLIP = "eva_vit_g.pth", "clip_vit_L.pth"
_LANGUAGES = {2560: "opt-2.7b", 4096: "opt-6.7b"}, {2048: "flan-t5-xl", 4096: "flan-t5-xxl"}
_TEXT = "bert-base-uncased"
_UNUSED = ("norm.", "fc_norm.", "head.", "ln_post.")  # of an image encoder's own file: what comes after the last block
_OPT_IDS: dict[str, Any] = {"bos": 2, "pad": 1, "stop_ids": (50118,)}  # a caption ends with its line
_T5_IDS: dict[str, Any] = {"bos": None, "pad": 0, "stop_ids": (1,), "end": 1}


def load(
    path: Path,
    device: torch.device,
    dtype: torch.dtype | None,
    memory: Memory = WHOLE,
    *,
    parts: Mapping[str, str | Path] | None = None,
    config: Blip2Config | None = None,
) -> Blip2:
    """A model from a LAVIS file and the frozen parts that it was trained between.

    Args:
        dtype: of the frozen parts; the bridge computes in float32. None keeps every tensor's own type, for converting.
        memory: how the frozen parts are kept.
        parts: where they are, those that the file lacks: `vision` (LAVIS's own file of the image encoder), `language`
            and `text` (directories of transformers: the language model, a BERT tokenizer). What is not named is looked
            for beside the file under its published name.
        config: of the model; one of the published ones, by the shapes in the file, where None.
    Raises:
        CheckpointError: a frozen part is neither named nor found, or tensors do not fit.
    """
    if unknown := (parts or {}).keys() - {"vision", "language", "text"}:
        raise ConfigError(f"parts: {min(unknown)!r} is none of vision, language and text")
    found = read_pickle(path)
    tensors = Pickled.of(found.get("model", found), path)
    config = published(tensors, path) if config is None else config
    assert isinstance(config.vision, VisionConfig)
    named = {key: Path(place) for key, place in (parts or {}).items()}
    with skeleton():
        bridge, vision = Bridge(config), VisionTransformer(config.vision)
        language = None
        if isinstance(config.language, LanguageConfig):
            language = transformers.build_language(config.language)
    modules = {"bridge": Part.of(bridge, None if dtype is None else torch.float32), "vision": Part.of(vision, dtype)}
    every = modules if language is None else modules | {"language": Part.of(language, dtype)}
    home = plan({key: part.module for key, part in every.items()}, device, memory)
    rules, tower = maps.trained(config), maps.vision(config.vision)
    if any(name.startswith(_WITHIN) for name in tensors.names()):
        if "vision" in named:
            raise ConfigError(f"parts: {path} holds its image encoder, leave `vision` out")
        fill(modules, rules + within(tower, theirs=_WITHIN), tensors, path, home, ignored=maps.BESIDE)
    else:
        fill({"bridge": modules["bridge"]}, rules, tensors, path, home, ignored=maps.BESIDE)
        _fill_vision(modules["vision"], config.vision, tower, path, named, home)
    tokenizer = None
    if language is not None:
        tokenizer = _fill_language(every["language"], language.config, path, named, home)
    home.connect({key: part.module for key, part in every.items()})
    return Blip2(
        config,
        vision.requires_grad_(False).eval(),
        bridge.eval(),
        language,
        tokenizer,
        _text_tokenizer(config, path, named) if config.qformer.text else None,
        device,
        dtype or torch.float32,
        identity=_identity(tensors),
    )


def save(model: Blip2, path: Path, *, vision: bool = False) -> None:
    """Write what LAVIS would: the trained tensors, in a pickle that holds nothing else.

    Args:
        vision: the image encoder too, as LAVIS keeps it where it was fine-tuned.
    Raises:
        CheckpointError: the format cannot hold the model, or the file cannot be written.
    """
    config = model.config
    if not isinstance(config.vision, VisionConfig) or config.qformer.text_pooling != "cls":
        raise CheckpointError("LAVIS's format holds models with a ViT and a BERT's text side, no frozen parts by name")
    if config.heads and not config.word_head:
        raise CheckpointError("LAVIS's stage-1 format holds a word head (ITG), which this model came without")
    rules = maps.trained(config)
    state: dict[str, Tensor] = {f"bridge.{name}": tensor for name, tensor in model.bridge.state_dict().items()}
    if vision:
        assert isinstance(model.encoder, nn.Module)
        check_plain(model.encoder)
        rules += within(maps.vision(config.vision), theirs=_WITHIN)
        state |= {f"vision.{name}": tensor for name, tensor in model.encoder.state_dict().items()}
    theirs = {name: tensor.detach().cpu() for name, tensor in to_theirs(rules, state, "this model").items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            torch.save({"model": theirs}, partial)
        calibrated.place(path).unlink(missing_ok=True)  # of a model that was here before
    except (OSError, RuntimeError) as error:  # torch reports a full disk as its own error
        raise CheckpointError(f"{path}: cannot be written: {error}; free some space or choose another") from error


def published(tensors: Tensors, source: object) -> Blip2Config:
    """The published configuration that a file's shapes fit.

    Raises:
        CheckpointError: none does.
    """
    names = tensors.names()
    width = tensors.shape("ln_vision.weight")[0] if "ln_vision.weight" in names else 0
    kind = next((kind for kind in ("opt", "t5") if f"{kind}_proj.weight" in names), None)
    language = tensors.shape(f"{kind}_proj.weight")[0] if kind else None
    for config in PRESETS.values():
        if not isinstance(config.vision, VisionConfig) or config.vision.width != width:
            continue
        ours = config.language
        if (ours.kind, ours.width) == (kind, language) if isinstance(ours, LanguageConfig) else kind is None:
            size = _image_size(tensors, config.vision)
            return config.replace(vision=dataclasses.replace(config.vision, image_size=size))
    raise CheckpointError(
        f"{source}: an image encoder of width {width} and {kind or 'no'} language model of width {language}: none of "
        "the published models; give its configuration"
    )


def _image_size(tensors: Tensors, config: VisionConfig) -> int:
    """By the positions of the image encoder, where the file holds it."""
    for name in ("pos_embed", "positional_embedding"):
        if f"{_WITHIN}{name}" in tensors.names():
            return round((tensors.shape(f"{_WITHIN}{name}")[-2] - 1) ** 0.5) * config.patch_size
    return 224


def _fill_vision(
    part: Part, config: VisionConfig, rules: list[Rule], path: Path, named: Mapping[str, Path], home: Home
) -> None:
    file = _find("vision", _CLIP if config.pre_norm else _EVA, path, named)
    tensors = Pickled.of(read_pickle(file), file)
    later = tuple(f"{block}.{config.layers}." for block in ("blocks", "transformer.resblocks"))
    unused = {name for name in tensors.names() if name.startswith((*later, *_UNUSED)) or name in ("proj", "mask_token")}
    fill({"vision": part}, rules, tensors, file, home, ignored=unused)


def _fill_language(
    part: Part, config: OPTConfig | T5Config, path: Path, named: Mapping[str, Path], home: Home
) -> Tokenizer:
    kinds = _LANGUAGES[isinstance(config, T5Config)]
    directory = _find("language", kinds.get(config.width, "its directory"), path, named)
    tensors = open_directory(directory)
    if isinstance(config, OPTConfig):
        rules, ids = for_layers(transformers_maps.OPT, range(config.layers)), _OPT_IDS
        if "decoder.embed_tokens.weight" in tensors.names():  # saved without its head
            rules = [dataclasses.replace(r, theirs=tuple(n.removeprefix("model.") for n in r.theirs)) for r in rules]
    else:
        rules, ids = for_layers(transformers_maps.t5(config), range(config.layers)), _T5_IDS
    copies = {name.removeprefix("language_model.") for name in transformers_maps.BESIDE}
    beside = copies - {name for rule in rules for name in rule.theirs}
    ours = within(rules, ours="language.")
    fill({"language": part}, ours, tensors, directory, home, ignored=beside)
    return vocabulary.read(directory, **ids)


def _text_tokenizer(config: Blip2Config, path: Path, named: Mapping[str, Path]) -> Tokenizer:
    directory = _find("text", _TEXT, path, named)
    qformer = config.qformer
    frame = qformer.cls_id, qformer.sep_id
    return vocabulary.read(directory, bos=None, pad=qformer.pad_id, stop_ids=(frame[1],), frame=frame)


def _find(key: str, name: str, path: Path, named: Mapping[str, Path]) -> Path:
    place = named.get(key, path.parent / name)
    if not place.exists():
        raise CheckpointError(
            f"{path}: a LAVIS file holds what was trained; its frozen part {key!r} is not at {place}: "
            f"put {name} beside the file, or name it with parts={{{key!r}: ...}}"
        )
    return place


def identity_of(path: Path) -> str:
    """`Blip2.identity` of a file's model, which is not built for it."""
    found = read_pickle(path)
    return _identity(Pickled.of(found.get("model", found), path))


def _identity(tensors: Tensors) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors.names()):
        digest.update(name.encode() + tensors.get(name).float().numpy().tobytes())
    return digest.hexdigest()
