"""Models in the directories that transformers writes: `Salesforce/blip2-*` and whatever was trained from them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from blip2.blip2 import Blip2
from blip2.config import Blip2Config, OPTConfig, T5Config, VisionConfig
from blip2.errors import CheckpointError
from blip2.files import replacing
from blip2.model.bridge import Bridge
from blip2.model.heads import TEMPERATURE
from blip2.model.vision import VisionTransformer
from blip2.pages import release
from blip2.quantize import check_plain
from blip2.text import Tokenizer
from blip2.weights import calibrated, card, vocabulary
from blip2.weights.fill import Part, fill
from blip2.weights.maps import transformers as maps
from blip2.weights.maps import transformers_config as keys
from blip2.weights.placement import WHOLE, Memory, plan, put
from blip2.weights.rules import Rule, check, to_theirs
from blip2.weights.skeleton import build_language, skeleton
from blip2.weights.tensors import Safetensors, Tensors, open_directory

EXTRA = "blip2-extra.safetensors"  # what the format has no place for, under our names
SINGLE = "model.safetensors"
OTHERS = ("model_state.pdparams", "bridge.safetensors", "pytorch_model.bin", "pytorch_model.bin.index.json")
SAMPLED = 64  # values of a tensor that tell a model from another
SHARD_BYTES = 5_000_000_000


def holds(directory: Path) -> bool:
    """Whether a directory is of this format: its config.json names a `model_type`."""
    try:
        return "model_type" in json.loads((directory / "config.json").read_text())
    except (OSError, ValueError, TypeError, RecursionError):
        return False


def read_config(directory: Path) -> Blip2Config:
    """What a directory's configuration and the names of its tensors tell; no weights are read.

    Raises:
        CheckpointError: as `load`.
    """
    path = directory / "config.json"
    found = keys.config(read_json(path), path, open_directory(directory).names())
    extra = directory / EXTRA
    return _with_word_head(found, Safetensors.open([extra])) if extra.is_file() else found


def _with_word_head(config: Blip2Config, extra: Tensors) -> Blip2Config:
    return config.replace(word_head=any(name.startswith("bridge.heads.words.") for name in extra.names()))


def read_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer beside the weights, which are not read.

    Raises:
        CheckpointError: as `load`.
    """
    return _tokenizer(directory, read_config(directory), read_json(directory / "config.json"))


def load(directory: Path, device: torch.device, dtype: torch.dtype | None, memory: Memory = WHOLE) -> Blip2:
    """A model, its tensors read one by one, cast and made coarse on their way.

    Args:
        dtype: of the frozen parts; the bridge computes in float32. None keeps every tensor's own type, for converting.
        memory: how the frozen parts are kept.
    Raises:
        CheckpointError: a file is missing or damaged, the model is of another kind, or its tensors do not fit; the
            message lists them.
    """
    values = read_json(directory / "config.json")
    tensors = open_directory(directory)
    extra = Safetensors.open([directory / EXTRA]) if (directory / EXTRA).is_file() else None
    config = keys.config(values, directory / "config.json", tensors.names())
    if extra is not None:
        config = _with_word_head(config, extra)
    return build(config, values, tensors, maps.blip2(config), maps.BESIDE, directory, device, dtype, memory, extra)


def build(
    config: Blip2Config,
    values: Mapping[str, Any],
    tensors: Tensors,
    rules: Sequence[Rule],
    beside: Collection[str],
    directory: Path,
    device: torch.device,
    dtype: torch.dtype | None,
    memory: Memory = WHOLE,
    extra: Tensors | None = None,
) -> Blip2:
    """A model of a configuration from a checkpoint's tensors, whatever they are called there.

    Args:
        values: what stands in `config.json`: the special tokens are read from it.
        rules: from the checkpoint's names to ours.
        beside: tensors that may be there and are not needed.
        extra: under our names, what the format has no place for.
    Raises:
        CheckpointError: as `load`.
    """
    with skeleton():
        bridge, vision = Bridge(config), _vision(config)
        language = build_language(config.language) if isinstance(config.language, OPTConfig | T5Config) else None
    parts = {"vision": Part.of(vision, dtype), "bridge": Part.of(bridge, None if dtype is None else torch.float32)}
    if language is not None:
        parts["language"] = Part.of(language, dtype)
    home = plan({key: part.module for key, part in parts.items()}, device, memory)
    filled = {name for rule in rules for name in rule.ours}
    lacking = [name for name in bridge.state_dict() if f"bridge.{name}" not in filled]
    ignored = set(beside) - {name for rule in rules for name in rule.theirs}
    fill(parts, rules, tensors, directory, home, ignored=ignored, given=[f"bridge.{name}" for name in lacking])
    _check_copies(tensors, ignored, rules, directory)
    for name, tensor in _beside(bridge, lacking, extra).items():
        put(bridge, name, tensor.to(device, tensor.dtype if dtype is None else torch.float32))
    home.connect({key: part.module for key, part in parts.items()})
    tokenizer = _tokenizer(directory, config, values)
    return Blip2(
        config,
        vision.requires_grad_(False).eval(),
        bridge.eval(),
        language,
        tokenizer if config.language else None,
        tokenizer if config.heads else None,
        device,
        dtype or torch.float32,
        identity=_identity(tensors, config),
    )


def save(model: Blip2, directory: Path, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Write a model as transformers does, in the types that its weights have; `load` reads it back bit for bit.

    What the format has no place for, the temperature and the word head, is kept beside it in `blip2-extra.safetensors`.

    Raises:
        CheckpointError: the format cannot hold the model, the directory holds one of another format, or it cannot be
            written.
    """
    if others := [name for name in OTHERS if (directory / name).exists()]:
        raise CheckpointError(f"{directory}: holds a model of another format ({others[0]}); choose another directory")
    tokenizer = model.tokenizer or model.text_tokenizer
    stops = tokenizer.stop_ids if tokenizer else ()
    kind = (
        str(next(model.encoder.parameters()).dtype).removeprefix("torch.")
        if isinstance(model.encoder, nn.Module)
        else "float32"
    )
    bos, pad = (tokenizer.bos, tokenizer.pad) if tokenizer else (None, 0)
    values = keys.values(model.config, bos_id=bos, stop_ids=stops, pad_id=pad, dtype=kind)
    state = tensors_of(model)
    rules = maps.blip2(model.config)
    ours = {name for rule in rules for name in rule.ours}
    extra = {name: tensor for name, tensor in state.items() if name not in ours}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").unlink(missing_ok=True)  # until all is there, there is no model
        _write_shards(rules, state, directory, shard_bytes)
        if extra:
            _save(extra, directory / EXTRA)
        else:
            (directory / EXTRA).unlink(missing_ok=True)
        _write_ends(directory / "generation_config.json", values.get("text_config"))
        if tokenizer is not None:
            with replacing(directory / "tokenizer.json") as partial:
                tokenizer.rust.save(str(partial))
        card.write(directory, model.config)
        calibrated.place(directory).unlink(missing_ok=True)  # of a model that was here before
        with replacing(directory / "config.json") as partial:  # the last: without it there is no model
            partial.write_text(json.dumps(values, indent=2) + "\n")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{directory}: the model cannot be written: {error}; free some space") from error


def tensors_of(model: Blip2) -> dict[str, Tensor]:
    """Everything that a model computes with, under our names.

    Raises:
        CheckpointError: its weights are in int8 or int4.
    """
    parts = {"vision": model.encoder, "bridge": model.bridge, "language": model.language}
    for part in parts.values():
        if isinstance(part, nn.Module):
            check_plain(part)
    return {
        f"{key}.{name}": tensor
        for key, part in parts.items()
        if isinstance(part, nn.Module)
        for name, tensor in part.state_dict().items()
    }


def _write_ends(path: Path, text: Mapping[str, Any] | None) -> None:
    """The special tokens that transformers' `generate` goes by, and `load` before those in `config.json`."""
    if text is None:
        path.unlink(missing_ok=True)
        return
    with replacing(path) as partial:
        ends = {key: text[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in text}
        partial.write_text(json.dumps(ends, indent=2) + "\n")


def _write_shards(rules: Sequence[Rule], state: Mapping[str, Tensor], directory: Path, limit: int) -> None:
    """`model.safetensors`, or numbered files with an index; one file's tensors in memory at a time."""
    shards: list[list[Rule]] = [[]]
    size = 0
    for rule in rules:
        own = sum(state[name].nbytes for name in rule.ours)
        if shards[-1] and size + own > limit:
            shards.append([])
            size = 0
        shards[-1].append(rule)
        size += own
    total = len(shards)
    names = [f"model-{n + 1:05d}-of-{total:05d}.safetensors" for n in range(total)] if total > 1 else [SINGLE]
    where: dict[str, str] = {}
    for name, shard in zip(names, shards, strict=True):
        some = to_theirs(shard, {ours: state[ours] for rule in shard for ours in rule.ours}, "this model")
        _save(some, directory / name)
        where |= dict.fromkeys(some, name)
    for old in {*directory.glob("model*.safetensors")} - {directory / name for name in names}:
        old.unlink()  # of a model that was here before
    if total > 1:
        with replacing(directory / f"{SINGLE}.index.json") as partial:
            partial.write_text(json.dumps({"metadata": {}, "weight_map": where}, indent=2) + "\n")
    else:
        (directory / f"{SINGLE}.index.json").unlink(missing_ok=True)


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    with replacing(path) as partial:
        stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(stored, partial, {"format": "pt"})


def _beside(bridge: Bridge, lacking: Sequence[str], extra: Tensors | None) -> dict[str, Tensor]:
    """The temperature and the word head, from beside the checkpoint where we wrote it."""
    if extra is None:
        assert set(lacking) <= {"heads.temperature"}  # without a word head nothing else has no place
        return dict.fromkeys(lacking, torch.tensor(TEMPERATURE))  # nothing that is computed from it is ever shown
    check((f"bridge.{name}" for name in lacking), extra.names(), EXTRA)
    own = bridge.state_dict()
    for name in lacking:
        if extra.shape(f"bridge.{name}") != tuple(own[name].shape):
            raise CheckpointError(
                f"{EXTRA}: bridge.{name} is {list(extra.shape(f'bridge.{name}'))}, not {list(own[name].shape)}"
            )
    return {name: extra.get(f"bridge.{name}") for name in lacking}


def _vision(config: Blip2Config) -> VisionTransformer:
    assert isinstance(config.vision, VisionConfig)
    return VisionTransformer(config.vision)


def _tokenizer(directory: Path, config: Blip2Config, values: Mapping[str, Any]) -> Tokenizer:
    """The one beside the weights: the language model's, or in a retrieval model the Q-Former's."""
    if config.heads:
        frame = config.qformer.cls_id, config.qformer.sep_id
        return vocabulary.read(directory, bos=None, pad=config.qformer.pad_id, stop_ids=(frame[1],), frame=frame)
    text: dict[str, Any] = values.get("text_config") or {}
    generation = directory / "generation_config.json"
    chosen = {**text, **{k: v for k, v in (read_json(generation) if generation.is_file() else {}).items() if v}}
    t5 = isinstance(config.language, T5Config)
    stops = chosen.get("eos_token_id")
    stops = stops if isinstance(stops, list) else [1 if t5 else 2] if stops is None else [stops]
    pad = chosen.get("pad_token_id")
    bos = None if t5 else (2 if text.get("bos_token_id") is None else text["bos_token_id"])
    fill_id = (0 if t5 else 1) if pad is None else int(pad)
    return vocabulary.read(directory, bos=bos, pad=fill_id, stop_ids=tuple(stops), end=stops[0] if t5 else None)


def _check_copies(tensors: Tensors, ignored: Collection[str], rules: Sequence[Rule], source: object) -> None:
    """Refuse a head, or embeddings of one half, that differ from the embeddings which ours are tied to."""
    words = next((rule.theirs[0] for rule in rules if "language.words.weight" in rule.ours), None)
    for name in sorted(tensors.names() & set(ignored)):
        if name.endswith("weight") and words is not None and not torch.equal(tensors.get(name), tensors.get(words)):
            raise CheckpointError(f"{source}: {name} is not {words}, which this model computes with")


def _identity(tensors: Tensors, config: Blip2Config) -> str:
    """SHA-256 over the configuration, and name, shape and some values of every tensor but the language model's."""
    digest = hashlib.sha256(repr(config).encode())
    for name in sorted(name for name in tensors.names() if not name.startswith("language_model.")):
        whole = tensors.get(name)
        some = whole.flatten()[:: max(1, whole.numel() // SAMPLED)]
        digest.update(f"{name}{tensors.shape(name)}".encode() + some.float().numpy().tobytes())
        if isinstance(tensors, Safetensors):
            release(whole)  # samples from everywhere bring nearly every page
    return digest.hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """The keys of a JSON file.

    Raises:
        CheckpointError: it is missing, damaged, or holds none.
    """
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: holds no keys")
    return found
