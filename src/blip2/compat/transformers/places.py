"""Where a name lies, and what the words of `from_pretrained` mean to `blip2.load`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch

import blip2
from blip2.blip2 import Blip2
from blip2.device import half_dtype
from blip2.errors import CheckpointError, ConfigError
from blip2.quantize import Scheme
from blip2.weights import hub, paddle, transformers
from blip2.weights.maps import transformers_config as keys
from blip2.weights.transformers import read_json

# Words of transformers that choose what is always or never so here.
WITHOUT_EFFECT = frozenset(
    (
        "low_cpu_mem_usage", "use_fast", "trust_remote_code", "use_safetensors", "weights_only", "resume_download",
        "attn_implementation",
    )
)  # fmt: skip
# Words that blip2 has not, at the value at which they ask for nothing.
SETTLED: Mapping[str, Any] = {
    "force_download": False, "output_loading_info": False, "ignore_mismatched_sizes": False, "push_to_hub": False,
    "safe_serialization": True, "variant": None, "proxies": None, "state_dict": None, "max_memory": None,
    "offload_folder": None, "subfolder": "",
}  # fmt: skip
ATTENTIONS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention", None)
WHERE = frozenset(("revision", "token", "use_auth_token", "local_files_only", "cache_dir"))

BLOCKS = {  # what has blocks, by transformers' names and ours
    "vision_model.encoder.layers": "vision.blocks",
    "vision_model": "vision",
    "language_model.model.decoder.layers": "language.layers",
    "language_model.encoder.block": "language.encoder",
    "language_model.decoder.block": "language.decoder",
    "language_model": "language",
}


def find(name: str | Path, *, weights: bool = False, **where: Any) -> Path:
    """The directory of a model: itself, or the hub's cache, downloaded where it is not there yet.

    Args:
        weights: False for configuration and tokenizer alone.
        where: revision, token (or use_auth_token), local_files_only, cache_dir.
    Raises:
        CheckpointError: no such model.
        ConfigError: a word that is not known.
    """
    known = {key: where.pop(key) for key in list(where) if key in WHERE}
    refuse(where, "from_pretrained")
    if not hub.is_name(str(name)):
        return Path(name)
    token = known.get("token") or known.get("use_auth_token")
    return hub.download(
        str(name),
        revision=known.get("revision"),
        token=token if isinstance(token, str) else None,  # True is the one that is logged in, which is the rule
        offline=bool(known.get("local_files_only")),
        cache=known.get("cache_dir"),
        weights=weights,
    )


def refuse(words: Mapping[str, Any], where: str) -> None:
    """Raises ConfigError where a word is left that has a meaning in transformers and none here."""
    for word, value in words.items():
        if word not in WITHOUT_EFFECT and (word not in SETTLED or value != SETTLED[word]):
            raise ConfigError(f"{where}: blip2 has no {word!r}; leave it out")


def load(name: str | Path, **words: Any) -> tuple[Blip2, dict[str, Any], Path]:
    """A model by transformers' words.

    Args:
        words: of `find`; torch_dtype or dtype, device_map, load_in_8bit, load_in_4bit, quantization_config.
    Returns:
        The model, the keys of its `config.json` as transformers names them, and where it lies.
    Raises:
        CheckpointError, ConfigError: as `blip2.load`; or a word that is not known.
    """
    where = {key: words.pop(key) for key in list(words) if key in WHERE}
    dtype = words.pop("dtype", None) or words.pop("torch_dtype", None)
    words.pop("torch_dtype", None)
    device, device_map = spread(words.pop("device_map", None))
    quantize = quantize_of(words)
    if words.get("attn_implementation") not in ATTENTIONS:
        raise ConfigError(f"attn_implementation {words['attn_implementation']!r} is none of {ATTENTIONS[:-1]}")
    refuse(words, "from_pretrained")
    directory = find(name, weights=True, **where)
    values = read_json(directory / "config.json")
    if not (transformers.holds(directory) or paddle.holds(directory)):
        raise CheckpointError(f"{directory}: no model of transformers or PaddleNLP; blip2.load reads blip2's own")
    precision = dtype_of(dtype, values, device)
    model = blip2.load(directory, device=device, dtype=precision, quantize=quantize, device_map=device_map)
    if paddle.holds(directory):
        tokenizer = model.tokenizer
        values = keys.values(model.config, stop_ids=tokenizer.stop_ids if tokenizer else ())
    return model, values, directory


def quantize_of(words: dict[str, Any]) -> Scheme | None:
    """`int8`, `int4` or None; the words that say so are taken out."""
    given = words.pop("quantization_config", None)
    eight, four = bool(words.pop("load_in_8bit", False)), bool(words.pop("load_in_4bit", False))
    if given is not None:
        read: Mapping[str, Any] = cast("Mapping[str, Any]", given) if isinstance(given, Mapping) else vars(given)
        eight, four = eight or bool(_named(read, "load_in_8bit")), four or bool(_named(read, "load_in_4bit"))
        if not (eight or four):
            raise ConfigError(
                f"quantization_config {type(given).__name__}: int8 and int4 (BitsAndBytesConfig) are known"
            )
    if eight and four:
        raise ConfigError("load_in_8bit and load_in_4bit: weights have 8 bits or 4, not both")
    return "int8" if eight else "int4" if four else None


def _named(values: Mapping[str, Any], name: str) -> Any:
    """A value of a configuration; transformers' own keep theirs behind an underscore."""
    return values.get(name, values.get(f"_{name}"))


def spread(device_map: Any) -> tuple[str, Any]:
    """What `blip2.load` calls the device and the places of a `device_map`; without one the CPU, as in transformers.

    Args:
        device_map: `auto` and its kin; one device; or places by transformers' names of modules. Modules that are no
            blocks lie on the first CUDA device that is named, or on the CPU.
    """
    if device_map is None:
        return "cpu", None
    if isinstance(device_map, Mapping):
        named = {name: _place(place) for name, place in cast("Mapping[str, Any]", device_map).items()}
        if len(set(named.values())) == 1:
            return next(iter(named.values())), None
        device = next((place for place in named.values() if place.startswith("cuda")), "cpu")
        ours = {_block(name): place for name, place in named.items()}
        return device, {name: place for name, place in ours.items() if name is not None}
    if device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        return "auto", "auto"
    return _place(device_map), None


def _place(place: Any) -> str:
    return f"cuda:{place}" if isinstance(place, int) else str(place)


def _block(name: str) -> str | None:
    """Our name of a module that has blocks or is one, None for others."""
    for theirs, ours in BLOCKS.items():
        if name == theirs or name.startswith(f"{theirs}."):
            rest = name.removeprefix(theirs)
            return ours + rest if not rest or rest[1:].isdigit() else None
    return None


def dtype_of(dtype: Any, values: Mapping[str, Any], device: str) -> str:
    """What `blip2.load` calls a precision; the checkpoint's own where none or `auto` is asked for."""
    if dtype in (None, "auto"):
        own = str(values.get("dtype") or values.get("torch_dtype") or "float32").removeprefix("torch.")
        # float16 on a CPU is emulated: bfloat16 is not, and nobody asked for float16 by name
        emulated = own == "float16" and not (
            device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
        )
        return str(half_dtype(torch.device("cpu"))).removeprefix("torch.") if emulated else own
    return str(dtype).removeprefix("torch.")
