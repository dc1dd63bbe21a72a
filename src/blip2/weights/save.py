"""Our own format: a directory with `config.json`, `bridge.safetensors` and, for our own encoder, `vision.safetensors`.

`vocabulary.safetensors` is there where the bridge was trained to write only some of the language model's tokens.

Frozen parts that somebody else made are not in it: the configuration names them with the SHA-256 of their weights. A
language model of our own kind (OPT, T5) has no such name: `language.safetensors` holds it, and `tokenizers.json` with
the files that it names what turns its words, or the Q-Former's, into ids.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from blip2.config import Blip2Config, LanguageConfig, PartConfig, Strict, VisionConfig, write_config
from blip2.errors import CheckpointError
from blip2.files import replacing
from blip2.model.bridge import Bridge
from blip2.weights import card
from blip2.weights.skeleton import build_language, skeleton

if TYPE_CHECKING:
    from blip2.blip2 import Blip2

LANGUAGE = "language.safetensors"
TOKENIZERS = "tokenizers.json"
FROZEN_WORDS = "qformer.words.weight"  # belongs to the frozen text part where the configuration says so


@dataclass(frozen=True)
class TokenizerIds(Strict):
    """The special ids of a `text.Tokenizer`, as `tokenizers.json` holds them."""

    bos: int | None
    pad: int
    stop_ids: tuple[int, ...]
    end: int | None
    frame: tuple[int, int] | None


def save(
    directory: Path,
    config: Blip2Config,
    bridge: Bridge,
    vision: nn.Module | None = None,
    dtype: torch.dtype | None = None,
    vocabulary: Tensor | None = None,
) -> None:
    """Write a model; each file appears whole or not at all, the configuration last.

    Args:
        config: with the SHA-256 of each frozen part filled in.
        vision: our own image encoder, None where a frozen part is named.
        dtype: that weights are stored in, their own where None.
        vocabulary: int64[K], sorted: the tokens that the bridge was trained to write, all where None.
    Raises:
        CheckpointError: the directory cannot be written (a full disk, say); the files before are untouched.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _write(trained(bridge), directory / "bridge.safetensors", dtype)
        if vision is not None:
            _write(vision.state_dict(), directory / "vision.safetensors", dtype)
        if vocabulary is not None:
            _write({"ids": vocabulary}, directory / "vocabulary.safetensors", None)
        config = config.replace(vocabulary=None if vocabulary is None else len(vocabulary))
        card.write(directory, config)
        with replacing(directory / "config.json") as partial:
            write_config(config, partial)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own error
        raise _unwritten(directory, error) from error


def save_model(model: Blip2, directory: Path, dtype: torch.dtype | None = None) -> None:
    """Write a whole model as it is in memory, with its own language model and tokenizers; `blip2.load` reads it back.

    Args:
        dtype: that weights are stored in, their own where None.
    Raises:
        CheckpointError: it cannot be written, or not in this format.
    """
    config = model.config
    language, vocabulary = model.language, getattr(model.language, "vocabulary", None)
    own = isinstance(config.language, LanguageConfig)
    if own:
        _check_language(language, config.language)
    vision = model.encoder if isinstance(config.vision, VisionConfig) else None
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").unlink(missing_ok=True)  # until all of it is there, there is no model
        if own:
            assert isinstance(language, nn.Module)
            _write(language.state_dict(), directory / LANGUAGE, dtype)
        _write_tokenizers(model, directory, own)
    except (OSError, SafetensorError) as error:
        raise _unwritten(directory, error) from error
    save(directory, config, model.bridge, cast("nn.Module | None", vision), dtype, None if own else vocabulary)


def _check_language(language: object, config: LanguageConfig | PartConfig | None) -> None:
    """Refuse weights that are not those of the plain model: another library's, or in whole numbers."""
    assert isinstance(config, LanguageConfig)
    with skeleton():
        plain = build_language(config)
    found = language.state_dict() if isinstance(language, nn.Module) else {}
    if {name: t.shape for name, t in found.items()} != {name: t.shape for name, t in plain.state_dict().items()}:
        raise CheckpointError(
            f"the language model in memory is not the plain {config.kind} of its configuration (another library's, or "
            "quantised): save the model that it was loaded from, or name it in the configuration as a part"
        )


def _write_tokenizers(model: Blip2, directory: Path, own: bool) -> None:
    """Those that no frozen part brings: the ids in one file, each vocabulary in its own."""
    kept = {
        "language": model.tokenizer if own else None,
        "text": model.text_tokenizer if model.config.text is None else None,
    }
    ids: dict[str, TokenizerIds] = {}
    for name, tokenizer in kept.items():
        path = directory / f"{name}-tokenizer.json"
        if tokenizer is None:
            path.unlink(missing_ok=True)
            continue
        with replacing(path) as partial:
            tokenizer.rust.save(str(partial))
        ids[name] = TokenizerIds(tokenizer.bos, tokenizer.pad, tokenizer.stop_ids, tokenizer.end, tokenizer.frame)
    if ids:
        with replacing(directory / TOKENIZERS) as partial:
            partial.write_text(json.dumps({name: asdict(each) for name, each in ids.items()}, indent=2) + "\n")
    else:
        (directory / TOKENIZERS).unlink(missing_ok=True)


def trained(bridge: Bridge) -> dict[str, Tensor]:
    """The bridge's tensors by name, without what belongs to a frozen part."""
    state = bridge.state_dict()
    if bridge.config.qformer.frozen_words:
        state.pop(FROZEN_WORDS, None)
    return state


def _unwritten(directory: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{directory}: the model cannot be written: {error}; free some space or choose another")


def _write(state: dict[str, Tensor], path: Path, dtype: torch.dtype | None) -> None:
    stored = {name: tensor.detach().cpu().to(dtype or tensor.dtype).contiguous() for name, tensor in state.items()}
    with replacing(path) as partial:
        save_file(stored, partial)
