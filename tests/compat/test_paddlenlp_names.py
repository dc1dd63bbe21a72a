"""PaddleNLP's names, on its own directories and on transformers'."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from published import picture

import blip2
from blip2.compat import transformers as compat
from blip2.compat.paddlenlp import transformers as paddlenlp
from blip2.weights import paddle


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_a_directory_of_paddlenlp_writes_as_the_model_did(folders: dict[str, Path], kind: str, tmp_path: Path):
    paddle.save(blip2.load(folders[kind], device="cpu"), tmp_path)
    for name in ("processor_config.json", "tokenizer_config.json"):
        shutil.copy(folders[kind] / name, tmp_path)
    model = paddlenlp.Blip2ForConditionalGeneration.from_pretrained(tmp_path)
    processor = paddlenlp.Blip2Processor.from_pretrained(tmp_path)
    known = compat.Blip2ForConditionalGeneration.from_pretrained(folders[kind])
    given = compat.Blip2Processor.from_pretrained(folders[kind])(picture(1), "how many?", return_tensors="pt")
    expected = known.generate(**given, max_new_tokens=9)[0]
    for tensors in ("pt", "pd"):
        processor.num_query_tokens = {"pt": 4, "pd": None}[tensors]  # with and without placeholders for the image
        given = processor(picture(1), "how many?", return_tensors=tensors)
        out = model.generate(**given, max_new_tokens=9)
        assert isinstance(out, torch.Tensor)
        assert out[0, -9:].tolist() == expected[-9:].tolist()
    assert isinstance(processor.decode(out[0], skip_special_tokens=True).strip(), str)
