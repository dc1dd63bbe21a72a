"""Where the queries look and what speaks for a match: as transformers' own attention and autograd have it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import blip2
from blip2 import explain
from blip2.blip2 import Blip2
from published import BERT, CLOSE, config, opt, pictures, pixels, save, scramble

TEXT = "w7 w1 w30 w2 w8"


@pytest.fixture(scope="module")
def retrieval(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Blip2]:
    whole = config(opt(), slot=None)
    whole.qformer_config.use_qformer_text_input = True
    theirs = transformers.Blip2ForImageTextRetrieval(whole).eval()
    scramble(theirs)
    place = tmp_path_factory.mktemp("retrieval")
    save(theirs, place, BERT)
    theirs.set_attn_implementation("eager")  # theirs has no weights otherwise
    ours = blip2.load(place, device="cpu", dtype="float32")
    assert ours.text_tokenizer is not None
    words = dataclasses.replace(ours.text_tokenizer, frame=(1, 2))  # a vocabulary of 60 words has no token 101
    return theirs, dataclasses.replace(ours, text_tokenizer=words)


def cross_attention(theirs: Any) -> list[Tensor]:
    """Filled with each layer's weights, float[1, A, Q, P], when theirs runs."""
    kept: list[Tensor] = []
    for layer in theirs.qformer.encoder.layer:
        if layer.has_cross_attention:
            layer.crossattention.attention.register_forward_hook(lambda _, __, output: kept.append(output[1]))
    return kept


def contributions(theirs: Any, ours: Blip2, picture: Any, kept: list[Tensor], mask: Tensor) -> list[Tensor]:
    """Weight times slope of each layer that crosses, float[A, Q, P], of a text some of whose tokens are hidden."""
    kept.clear()
    ids = ours.text_ids([TEXT])
    found = theirs(
        pixel_values=pixels(ours, [picture]), input_ids=ids, attention_mask=mask, use_image_text_matching_head=True
    )
    logits = found.logits_per_image[0]
    slopes = torch.autograd.grad(logits[1] - logits[0], kept)
    return [(weight * slope)[0].detach() for weight, slope in zip(kept, slopes, strict=True)]


def test_evidence_and_attention_are_what_theirs_has(retrieval: tuple[Any, Blip2]):
    theirs, ours = retrieval
    (picture,) = pictures(1)
    kept = cross_attention(theirs)
    mask = torch.ones_like(ours.text_ids([TEXT]))
    hidden = mask.clone()
    hidden[0, 3] = 0  # [CLS] and two words stand before it
    without = contributions(theirs, ours, picture, kept, hidden)
    whole = contributions(theirs, ours, picture, kept, mask)
    looked = [weight[0].mean(0).detach() for weight in kept]
    assert len(kept) == 2

    def evidence(parts: list[Tensor]) -> Tensor:
        return torch.stack([part.clamp(min=0).mean(0).sum(0) for part in parts]).mean(0)

    for layer, which in ((0, [0]), (2, [1]), (None, [0, 1])):
        mine = explain.match(ours, picture, TEXT, layer)
        torch.testing.assert_close(mine.attention, torch.stack([looked[each] for each in which]).mean(0), **CLOSE)
        assert mine.evidence is not None
        assert mine.evidence.max() > 1e-3
        torch.testing.assert_close(mine.evidence, evidence([whole[each] for each in which]), **CLOSE)
        assert mine.words[2].text == "w30"
        lost = evidence([whole[each] - without[each] for each in which])
        torch.testing.assert_close(mine.words[2].evidence, lost, **CLOSE)
