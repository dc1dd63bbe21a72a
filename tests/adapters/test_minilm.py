"""The real text part of the extra `mini`."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from blip2 import adapters
from blip2.adapters import TextPart
from blip2.config import PRESETS, PartConfig

PART = PartConfig("minilm-l6", width=384)


@pytest.fixture(scope="module")
def text() -> TextPart:
    return adapters.text_part(PART)


def test_it_fits_the_q_former_of_mini(text: TextPart) -> None:
    qformer = PRESETS["mini"].qformer
    assert text.words.shape == (qformer.vocab_size, qformer.width)
    assert text.words.dtype == torch.float32
    assert text.tokenizer.frame == (qformer.cls_id, qformer.sep_id)
    assert text.tokenizer.pad == qformer.pad_id
    assert text.tokenizer.rust.get_vocab_size() == qformer.vocab_size
    assert text.weights["encoder.layer.5.output.dense.weight"].shape == (qformer.width, qformer.mlp_width)
    assert "encoder.layer.6.output.dense.weight" not in text.weights


def test_words_are_rows_of_the_vocabulary(text: TextPart) -> None:
    """Neighbours in meaning are neighbours in space, which no shuffled table shows."""
    ids = [row[1] for row in text.tokenizer.encode(["dog", "puppy", "kitchen"])]
    dog, puppy, kitchen = F.normalize(text.words[ids], dim=1)
    assert dog @ puppy > dog @ kitchen + 0.2


def test_texts_are_framed_lowercased_and_never_cut_unasked(text: TextPart) -> None:
    short, long = text.tokenizer.encode(["A Dog.", "dog " * 600])
    assert short == [101, 1037, 3899, 1012, 102]  # of bert-base-uncased
    assert len(long) == 602  # the file itself truncates
    assert text.tokenizer.encode(["dog " * 600], max_length=8) == [[101, *[3899] * 6, 102]]
    assert text.tokenizer.decode(short) == "a dog."
