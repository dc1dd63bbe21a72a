"""T5's older vocabulary, `spiece.model`: a protocol buffer of pieces with their scores, read without its library.

Source: sentencepiece_model.proto; Kudo 2018 (the unigram model).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from blip2.errors import CheckpointError
from blip2.text import understood

LARGEST = 16 << 20  # bytes; T5's own file has 0.8 MB
TABLE = 4 << 20  # bytes of its table of characters; T5's has 0.2 MB
AT_ONCE = 4096  # places of that table that are looked at together
EXTRA_IDS = 100  # <extra_id_99> to <extra_id_0> after the pieces, in every T5
_UNIGRAM, _CONTROL, _USER = 1, 3, 4
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # stands for a space within pieces
# Field numbers: of the file, of a piece, of the trainer's and the normaliser's part.
_PIECE, _TRAINER, _NORMALIZER = 1, 2, 3
_TEXT, _SCORE, _TYPE = 1, 2, 3
_KIND, _UNKNOWN = 3, 40
_CHARACTERS = 2


@dataclass(frozen=True)
class Pieces:
    """What a file holds.

    Attributes:
        scores: each piece with its log-probability; its place is its id.
        special: pieces that no text is split into: end, padding and the like.
        unknown: id of what is not in the vocabulary.
        characters: how characters are normalised, in the library's own form; empty where they stay as they are.
    """

    scores: list[tuple[str, float]]
    special: list[str]
    unknown: int
    characters: bytes


def tokenizer(path: Path, extra_ids: int = EXTRA_IDS) -> Any:
    """T5's `tokenizers.Tokenizer` from a `spiece.model`.

    Args:
        extra_ids: how many sentinels follow the pieces.
    Raises:
        CheckpointError: the file is damaged, or of another kind than T5's.
    """
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    pieces = read(path)
    extra = [f"<extra_id_{number}>" for number in range(extra_ids - 1, -1, -1)]
    with understood(f"{path}: not a vocabulary of T5"):
        rust = tokenizers.Tokenizer(
            models.Unigram([*pieces.scores, *((word, 0.0) for word in extra)], pieces.unknown, byte_fallback=False)
        )
        if pieces.characters:
            rust.normalizer = normalizers.Precompiled(pieces.characters)
    space: dict[str, Any] = {"replacement": _SPACE, "prepend_scheme": "always", "split": True}
    rust.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(**space)])
    rust.decoder = decoders.Metaspace(**space)
    rust.add_special_tokens([*pieces.special, pieces.scores[pieces.unknown][0], *extra])
    return rust


def read(path: Path) -> Pieces:
    """The pieces of a `spiece.model`.

    Raises:
        CheckpointError: the file is damaged, or its model is not of the unigram kind.
    """
    try:
        if path.stat().st_size > LARGEST:
            raise CheckpointError(f"{path}: {path.stat().st_size} bytes are no vocabulary")
        found = _pieces(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    except (ValueError, LookupError, TypeError, struct.error) as error:
        raise CheckpointError(f"{path}: damaged, or no sentencepiece model: {error}") from None
    return found


def _pieces(data: bytes) -> Pieces:
    scores: list[tuple[str, float]] = []
    special: list[str] = []
    unknown, characters = 0, b""
    for number, value in _fields(data):
        if number == _PIECE:
            piece = dict(_fields(_bytes(value)))
            text, score = _bytes(piece[_TEXT]).decode(), struct.unpack("<f", _bytes(piece.get(_SCORE, bytes(4))))[0]
            if not math.isfinite(score):
                raise ValueError(f"the score of piece {len(scores)} is {score}")
            if piece.get(_TYPE) in (_CONTROL, _USER):
                special.append(text)
            scores.append((text, score))
        elif number == _TRAINER:
            trainer = dict(_fields(_bytes(value)))
            unknown = int(trainer.get(_UNKNOWN, 0))
            if trainer.get(_KIND, _UNIGRAM) != _UNIGRAM:
                raise ValueError(f"a model of kind {trainer[_KIND]}, and T5's is the unigram kind ({_UNIGRAM})")
        elif number == _NORMALIZER:
            characters = _bytes(dict(_fields(_bytes(value))).get(_CHARACTERS, b""))
    if not 0 <= unknown < len(scores):
        raise ValueError(f"{len(scores)} pieces, and number {unknown} is to stand for what is not among them")
    if len({text for text, _ in scores}) < len(scores) or "" in dict(scores):
        raise ValueError("a piece is empty, or there twice")
    _check_characters(characters)
    return Pieces(scores, special, unknown, characters)


def _check_characters(characters: bytes) -> None:
    """Refuse a table of characters whose places lie outside of it: the library that walks it does not look.

    The size of a double-array trie, its units of 32 bits, and the normalised texts that its leaves point into.
    """
    if not characters:
        return
    if len(characters) > TABLE:
        raise ValueError(f"its table of characters has {len(characters)} bytes")
    size = int.from_bytes(characters[:4], "little")
    units = np.frombuffer(characters[4 : 4 + size], "<u4").astype(np.int64)
    texts = np.frombuffer(characters[4 + size :], np.uint8)
    characters[4 + size :].decode()
    starts = np.append((texts & 0xC0) != 0x80, False)  # of characters
    letters = np.arange(1, 256)
    seen, waiting = np.zeros(len(units), bool), [np.zeros(1, np.int64)]
    while waiting:
        nodes = waiting.pop()
        seen[nodes] = True
        here = units[nodes]
        below = nodes ^ ((here >> 10) << ((here & 0x200) >> 6))
        leaves = below[(here & 0x100) != 0]
        children = below[:, None] ^ letters
        if max(children.max(), leaves.max(initial=0)) >= len(units):
            raise ValueError("its table of characters points outside of itself")
        if not starts[np.minimum(units[leaves] & 0x7FFFFFFF, len(texts))].all():
            raise ValueError("its table of characters points into no text")
        found = children[(units[children] & 0x800000FF) == letters]
        nodes = np.unique(found[~seen[found]])
        seen[nodes] = True
        waiting += [nodes[start : start + AT_ONCE] for start in range(0, len(nodes), AT_ONCE)]


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Field numbers and values of a message: integers as such, everything else as its bytes."""
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        kind = key & 7
        if kind == 0:
            value, place = _varint(data, place)
            yield key >> 3, value
            continue
        if kind == 2:
            size, place = _varint(data, place)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"a field of kind {kind} at byte {place}")
        if place + size > len(data):
            raise ValueError("it ends within a field")
        yield key >> 3, data[place : place + size]
        place += size


def _varint(data: bytes, place: int) -> tuple[int, int]:
    """An integer in groups of seven bits, and the place behind it."""
    value = 0
    for shift in range(0, 64, 7):
        byte = data[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
    raise ValueError(f"an endless number at byte {place}")


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise TypeError("a number where a text belongs")
    return value
