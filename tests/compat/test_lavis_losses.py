"""LAVIS's losses against transformers' on the inputs that LAVIS makes, and against blip2's own training.

Tolerances are for float32 sums in another order; the worst difference seen was 3e-6 of the largest value.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_lavis import CALLS, CLOSE, load, theirs_of, transformers
from torch import Tensor

from blip2.compat.lavis import models
from blip2.train.objectives import Batch, Stage1
from blip2.weights import lavis
from lavis_files import CONFIGS, write


@pytest.fixture
def written_stage_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Tensor]:
    """From LAVIS's own file, which has a word head."""
    monkeypatch.setattr(lavis, "published", lambda *_: CONFIGS["stage 1"])
    write(CONFIGS["stage 1"], tmp_path)
    model = models.load_model("blip2", "pretrain", True, checkpoint=tmp_path / "blip2.pth")
    return model, torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("prompt", ["", "a photo of"])
def test_the_loss_of_opt_is_that_of_lavis(folders: dict[str, Path], prompt: str):
    model, pixels = load(folders, *CALLS["opt"])
    model.prompt = prompt
    texts = [f"{prompt} a dog", f"{prompt} two cats, far", f"{prompt} {'long ' * 12}"]
    loss = model({"image": pixels, "text_input": texts})["loss"]

    reference = theirs_of(folders, "opt")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders["opt"])
    tokenizer.padding_side = "right"
    with torch.no_grad():
        seen = reference.get_image_features(pixels).pooler_output
        read = tokenizer(
            [f"{text}\n" for text in texts], return_tensors="pt", padding=True, truncation=True, max_length=32
        )
        labels = read.input_ids.masked_fill(read.attention_mask == 0, -100)
        if prompt:
            labels[:, : len(tokenizer(prompt).input_ids)] = -100
        words = reference.language_model.get_input_embeddings()(read.input_ids)
        expected = reference.language_model(
            inputs_embeds=torch.cat([seen, words], 1),
            attention_mask=F.pad(read.attention_mask, (4, 0), value=1),
            labels=F.pad(labels, (4, 0), value=-100),
        ).loss
    torch.testing.assert_close(loss, expected, **CLOSE)
    loss.backward()
    assert model.bridge.qformer.query_tokens.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in model.visual_encoder.parameters())


def test_the_loss_of_t5_is_that_of_lavis(folders: dict[str, Path]):
    model, pixels = load(folders, *CALLS["t5"])
    read, written = ["what is it?", "a", "long " * 12], ["a dog", "two cats, far away", "word " * 12]
    loss = model({"image": pixels, "text_input": read, "text_output": written})["loss"]

    reference = theirs_of(folders, "t5")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders["t5"])
    options = {"return_tensors": "pt", "padding": True, "truncation": True, "max_length": 32}
    with torch.no_grad():
        seen = reference.get_image_features(pixels).pooler_output
        asked, told = tokenizer(read, **options), tokenizer(written, **options)
        words = reference.language_model.get_input_embeddings()(asked.input_ids)
        expected = reference.language_model(
            inputs_embeds=torch.cat([seen, words], 1),
            attention_mask=F.pad(asked.attention_mask, (4, 0), value=1),
            decoder_attention_mask=told.attention_mask,
            labels=told.input_ids.masked_fill(told.attention_mask == 0, -100),
        ).loss
    torch.testing.assert_close(loss, expected, **CLOSE)


def test_the_losses_of_stage_1_are_those_of_training(written_stage_1: Any):
    model, pixels = written_stage_1
    samples = {"image": pixels, "text_input": ["4 5 6", "7", "8 9"]}
    torch.manual_seed(2)
    found = model(samples)
    torch.manual_seed(2)
    with torch.no_grad():
        patches = model.core.features(pixels).patches
        batch = Batch(patches, torch.arange(3), model.core.text_ids(samples["text_input"]))
        expected = Stage1(model.bridge)(batch, seed=int(torch.randint(2**62, ())))
    torch.testing.assert_close([found.loss_itc, found.loss_itm, found.loss_lm], [*expected.values()])
    torch.testing.assert_close(found.loss, sum(expected.values()))
    assert [*found] == ["loss", "loss_itc", "loss_itm", "loss_lm"]
    found.loss.backward()
    assert model.bridge.heads.itm_head.weight.grad.abs().sum() > 0
    same = model({**samples, "image_id": torch.tensor([7, 7, 7])})
    assert not torch.allclose(same.loss_itc, found.loss_itc), "texts of one image share the target"
