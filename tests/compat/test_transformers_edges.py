"""Where people's calls go to the edge: half precision after loading, too little room, ids of every kind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_hub import picture

from blip2.compat import transformers as compat
from blip2.errors import PromptError


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_half_precision_after_loading_writes_and_leaves_the_bridge_whole(folders: dict[str, Path], kind: str):
    model = compat.Blip2ForConditionalGeneration.from_pretrained(folders[kind]).half()
    inputs = compat.Blip2Processor.from_pretrained(folders[kind])(picture(0), "a", return_tensors="pt")
    assert model.generate(**inputs.to("cpu", torch.float16), max_new_tokens=3).shape[0] == 1
    assert {parameter.dtype for parameter in model.qformer.parameters()} == {torch.float32}
    assert model.dtype == torch.float16


def test_a_length_without_room_for_the_image_is_an_error(folders: dict[str, Path]):
    processor = compat.Blip2Processor.from_pretrained(folders["opt"])
    with pytest.raises(PromptError, match="fewer than its special ones"):
        processor(picture(0), "hello world", truncation=True, max_length=3)
    model = compat.Blip2ForConditionalGeneration.from_pretrained(folders["opt"])
    with pytest.raises(PromptError, match="the prompt fills"):
        model.generate(**processor(picture(0), "x" * 300, return_tensors="pt"))


def test_the_newer_name_of_the_image_token_is_taken():
    assert compat.Blip2Config(image_token_id=7).image_token_index == 7


def test_ids_of_numpy_and_tensors_in_a_list_are_one_text(folders: dict[str, Path]):
    processor = compat.Blip2Processor.from_pretrained(folders["opt"])
    ids = processor.tokenizer.encode("hello")
    assert processor.decode(list(np.array(ids))) == processor.decode(list(torch.tensor(ids))) == processor.decode(ids)


def test_the_pipeline_follows_a_generation_config(folders: dict[str, Path]):
    pipe = compat.pipeline(model=str(folders["opt"]))
    short = pipe(picture(0), "a", generation_config=compat.GenerationConfig(max_new_tokens=3))
    assert short == pipe(picture(0), "a", max_new_tokens=3)
