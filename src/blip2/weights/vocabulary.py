"""The tokenizer beside a checkpoint: `tokenizer.json`, or the older files that it is made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from blip2.errors import CheckpointError
from blip2.text import Tokenizer, understood
from blip2.weights import sentencepiece

_SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
MOST_EXTRA_IDS = 10_000


def read(directory: Path, **ids: Any) -> Tokenizer:
    """A tokenizer with the special ids of its model.

    Args:
        ids: of `Tokenizer.from_file`.
    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    path = directory / "tokenizer.json"
    if path.is_file():
        return Tokenizer.from_file(path, **ids)
    vocabulary, merges = directory / "vocab.json", directory / "merges.txt"
    if vocabulary.is_file() and merges.is_file():
        given: dict[str, Any] = {"rust": _byte_level(vocabulary, merges), **ids}
        return Tokenizer(**given)
    pieces = directory / "spiece.model"
    if pieces.is_file():
        given = {"rust": sentencepiece.tokenizer(pieces, _extra_ids(directory)), **ids}
        return Tokenizer(**given)
    raise CheckpointError(f"{path}: missing; save the processor beside the model with save_pretrained")


def _byte_level(vocabulary: Path, merges: Path) -> Any:
    """GPT-2's kind of tokenizer, which is OPT's."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    with understood(f"{vocabulary}, {merges.name}: not a readable vocabulary"):
        rust = tokenizers.Tokenizer(models.BPE.from_file(str(vocabulary), str(merges)))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    rust.add_special_tokens([token for token in _SPECIAL if rust.token_to_id(token) is not None])
    return rust


def _extra_ids(directory: Path) -> int:
    """How many sentinels T5's vocabulary has, where the folder tells."""
    path = directory / "tokenizer_config.json"
    try:
        values = json.loads(path.read_text()) if path.is_file() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    count = values.get("extra_ids", sentencepiece.EXTRA_IDS) if isinstance(values, dict) else None
    if not isinstance(count, int) or not 0 <= count <= MOST_EXTRA_IDS:
        raise CheckpointError(f"{path}: extra_ids is {count!r}, not a number up to {MOST_EXTRA_IDS}")
    return count
