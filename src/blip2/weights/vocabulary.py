"""The tokenizer beside a checkpoint: `tokenizer.json`, or the older files that it is made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from blip2.errors import CheckpointError
from blip2.text import Tokenizer

_SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")


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
    raise CheckpointError(f"{path}: missing; save the processor beside the model with save_pretrained")


def _byte_level(vocabulary: Path, merges: Path) -> Any:
    """GPT-2's kind of tokenizer, which is OPT's."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    try:
        rust = tokenizers.Tokenizer(models.BPE.from_file(str(vocabulary), str(merges)))
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{vocabulary}, {merges.name}: not a readable vocabulary: {error}") from None
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    rust.add_special_tokens([token for token in _SPECIAL if rust.token_to_id(token) is not None])
    return rust
