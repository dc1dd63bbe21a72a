"""Our own format: a directory with `config.json`, `bridge.safetensors` and, for our own encoder, `vision.safetensors`.

`vocabulary.safetensors` is there where the bridge was trained to write only some of the language model's tokens.

Frozen parts that somebody else made are not in it: the configuration names them with the SHA-256 of their weights. A
language model of our own kind (OPT, T5) has no such name: `language.safetensors` holds it, and `tokenizers.json` with
the files that it names what turns its words, or the Q-Former's, into ids.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
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
from blip2.quantize import check_plain
from blip2.weights import calibrated, card, paddle
from blip2.weights.skeleton import build_language, skeleton

if TYPE_CHECKING:
    from blip2.blip2 import Blip2
    from blip2.text import Tokenizer

LANGUAGE = "language.safetensors"
VOCABULARY = "vocabulary.safetensors"
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
    """Write a model; its files appear together or not at all, the configuration last.

    Args:
        config: with the SHA-256 of each frozen part filled in.
        vision: our own image encoder, None where a frozen part is named.
        dtype: that weights are stored in, their own where None.
        vocabulary: int64[K], sorted: the tokens that the bridge was trained to write, all where None.
    Raises:
        CheckpointError: the directory cannot be written (a full disk, say); the files before are untouched.
    """
    with _together(directory) as file:
        _write_model(file, directory, config, bridge, vision, dtype, vocabulary)
    (directory / calibrated.NAME).unlink(missing_ok=True)  # of a model that was here before


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
    if config.adapter and not own:
        raise CheckpointError(
            "the language model is a named part changed by an adapter, which has no place here; copy the directory "
            "that the model was loaded from"
        )
    config = config.replace(base=None, adapter=0)  # all is written here
    language = language if vocabulary is None else getattr(language, "language", language)
    if own:
        _check_language(language, config.language)
    vision = cast("nn.Module", model.encoder) if isinstance(config.vision, VisionConfig) else None
    if vision is not None:
        check_plain(vision)
    if paddle.holds(directory):
        raise CheckpointError(f"{directory}: holds {paddle.FILE}, which would be read instead; choose another folder")
    ids = _tokenizers(model, own)
    with _together(directory) as file:
        _write_model(file, directory, config, model.bridge, vision, dtype, vocabulary)
        if ids:
            values = {name: asdict(each) for name, (_, each) in ids.items()}
            file(TOKENIZERS).write_text(json.dumps(values, indent=2) + "\n")
        for name, (tokenizer, _) in ids.items():
            tokenizer.rust.save(str(file(f"{name}-tokenizer.json")))
        if own:
            _write(cast("nn.Module", language).state_dict(), file(LANGUAGE), dtype)
    for name in (calibrated.NAME, *(() if ids else (TOKENIZERS,))):
        (directory / name).unlink(missing_ok=True)  # of a model that was here before
    if model.calibration is not None:
        calibrated.write(directory / calibrated.NAME, model.calibration, identity_of(directory))


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


def _tokenizers(model: Blip2, own: bool) -> dict[str, tuple[Tokenizer, TokenizerIds]]:
    """Those that no frozen part brings, with their ids."""
    kept = {
        "language": model.tokenizer if own else None,
        "text": model.text_tokenizer if model.config.text is None else None,
    }
    return {
        name: (each, TokenizerIds(each.bos, each.pad, each.stop_ids, each.end, each.frame))
        for name, each in kept.items()
        if each is not None
    }


def trained(bridge: Bridge) -> dict[str, Tensor]:
    """The bridge's tensors by name, without what belongs to a frozen part."""
    state = bridge.state_dict()
    if bridge.config.qformer.frozen_words:
        state.pop(FROZEN_WORDS, None)
    return state


# Keys of the configuration that no feature and no match depends on: what is written, and how questions are asked.
NOT_SEEN = frozenset({"language", "prompts", "captions", "vocabulary", "adapter", "question_aware", "base"})


def identity_of(directory: Path) -> str:
    """SHA-256 over what features and matches of a directory's model come from: its weights and configuration.

    Not over the language model, nor over how texts are written: an index and a calibration outlive another length
    penalty.
    """
    digest = hashlib.sha256()
    for path in sorted(directory.glob("*.safetensors")):
        if path.name not in (LANGUAGE, VOCABULARY):
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    config = json.loads((directory / "config.json").read_bytes())
    read = {key: value for key, value in config.items() if key not in NOT_SEEN}
    if base := config.get("base"):  # the image encoder may be its; where it lies does not matter
        read["base"] = base["sha256"]
    digest.update(json.dumps(read, sort_keys=True).encode())
    return digest.hexdigest()


@contextmanager
def _together(directory: Path) -> Generator[Callable[[str], Path]]:
    """Files of a directory that are replaced together: none of them where one cannot be written.

    Yields:
        from a name to the place where its new content goes; the first that is asked for appears last.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            yield lambda name: stack.enter_context(replacing(directory / name))
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own error
        raise CheckpointError(
            f"{directory}: the model cannot be written: {error}; free some space or choose another"
        ) from error


def _write_model(
    file: Callable[[str], Path],
    directory: Path,
    config: Blip2Config,
    bridge: Bridge,
    vision: nn.Module | None,
    dtype: torch.dtype | None,
    vocabulary: Tensor | None,
) -> None:
    config = config.replace(vocabulary=None if vocabulary is None else len(vocabulary))
    write_config(config, file("config.json"))
    if card.is_ours(directory):
        file(card.NAME).write_text(card.card(config), encoding="utf-8")
    _write(trained(bridge), file("bridge.safetensors"), dtype)
    if vision is not None:
        _write(vision.state_dict(), file("vision.safetensors"), dtype)
    if vocabulary is not None:
        _write({"ids": vocabulary}, file(VOCABULARY), None)


def _write(state: dict[str, Tensor], path: Path, dtype: torch.dtype | None) -> None:
    stored = {name: tensor.detach().cpu().to(dtype or tensor.dtype).contiguous() for name, tensor in state.items()}
    save_file(stored, path)
