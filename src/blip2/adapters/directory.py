"""A language model in a local directory that transformers can load.

The directory is not trusted: no code of its own is run and nothing is unpickled.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from blip2.adapters.parts import require
from blip2.adapters.transformers_lm import TransformersLM
from blip2.errors import CheckpointError
from blip2.text import Tokenizer


def load(directory: Path) -> tuple[TransformersLM, Tokenizer]:
    """Model and tokenizer.

    Args:
        directory: with config.json, safetensors and tokenizer.json; decoder-only or encoder-decoder. The weights keep
            the type that they are stored in.
    Raises:
        MissingExtraError: transformers is not installed.
        CheckpointError: a file or tensor is missing or damaged, or the model needs code of its own. Tensors beyond
            the language model's, such as a vision tower's, are left out.
    """
    weights(directory)
    transformers = require("transformers", "a language model of transformers")
    try:
        config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        kind = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
        with _without_bar(transformers.utils.logging):
            model, report = kind.from_pretrained(
                directory,
                config=config,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported, and refused by name below
                dtype="auto",
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
            )
    except Exception as error:  # transformers raises what the file made it stumble over
        raise CheckpointError(f"{directory}: transformers cannot load it: {error}") from error
    if lacking := sorted([*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])]):
        raise CheckpointError(f"{directory}: tensors are missing or have another shape: {', '.join(lacking)}")
    return TransformersLM(model), _tokenizer(directory, model.generation_config)


def weights(directory: Path) -> list[Path]:
    """The files that decide what this part computes.

    Raises:
        CheckpointError: there are none.
    """
    if files := sorted(directory.glob("*.safetensors")):
        return files
    raise CheckpointError(f"{directory}: no *.safetensors here; save the model with save_pretrained first")


def _tokenizer(directory: Path, ids: Any) -> Tokenizer:
    """tokenizer.json with the special ids of the model's generation settings."""
    if ids.eos_token_id is None:
        raise CheckpointError(f"{directory}: neither config.json nor generation_config.json has an eos_token_id")
    stops: list[int] = ids.eos_token_id if isinstance(ids.eos_token_id, list) else [ids.eos_token_id]
    fill = stops[0] if ids.pad_token_id is None else ids.pad_token_id
    return Tokenizer.from_file(directory / "tokenizer.json", bos=ids.bos_token_id, pad=fill, stop_ids=tuple(stops))


@contextmanager
def _without_bar(logging: Any) -> Generator[None]:
    """transformers draws a bar for each load, a second of it or less; the setting is global and goes back."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
