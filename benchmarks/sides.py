"""The two that are compared on a GPU: one published geometry with the same made-up weights, made on the device."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import geometry
from blip2.blip2 import Blip2
from blip2.config import Blip2Config
from blip2.kernels import tuned
from blip2.quantize import Scheme
from blip2.weights import transformers
from blip2.weights.maps import transformers as maps
from blip2.weights.placement import Memory


class Ours:
    """blip2, through the converter that loads checkpoints."""

    def __init__(self, config: Blip2Config, device: torch.device, dtype: torch.dtype, scheme: Scheme | None = None):
        made = geometry.Made.of(config, torch.bfloat16, device)
        with tempfile.TemporaryDirectory() as folder:
            geometry.write_words(config, Path(folder))
            built = transformers.build(
                config, geometry.values(config, dtype), made, maps.blip2(config), (), Path(folder), device, dtype,
                Memory(scheme),
            )  # fmt: skip
        self.model: Blip2 = tuned(built, Memory(scheme))
        if dtype is torch.bfloat16:
            self.model.bridge.to(dtype)  # as `blip2.load` on a GPU

    def write(self, squares: Tensor, asked: Sequence[str], beams: int, tokens: int) -> list[list[int]]:
        """Token ids of a caption of each image, or of the answer to each question about one."""
        more = {"num_beams": beams, "max_new_tokens": tokens, "min_new_tokens": tokens, "details": True}
        if asked:
            found = self.model.ask(self.model.encode(squares), list(asked), **more)
        else:
            found = self.model.caption(squares, batch_size=len(squares), **more)
        return [list(text.ids) for text in found]

    def prompts(self, asked: Sequence[str]) -> list[list[int]]:
        """The ids of what the language model is given after an image."""
        assert self.model.tokenizer is not None
        words = self.model.config.prompts
        texts = [words.question.format(question) for question in asked] or [words.caption]
        return self.model.tokenizer.prompts(texts)


class Theirs:
    """transformers, as its documentation says: `generate` on pixels and prompt, images encoded each time."""

    def __init__(self, config: Blip2Config, device: torch.device, dtype: torch.dtype):
        import transformers as library

        values = geometry.values(config, dtype)
        with torch.device("meta"):
            made = library.Blip2Config(**{key: value for key, value in values.items() if key != "model_type"})
            self.model: Any = library.Blip2ForConditionalGeneration(made)
        weights = geometry.Made.of(config, dtype, device)
        self.model.load_state_dict({name: weights.get(name) for name in weights.names()}, strict=False, assign=True)
        self.model.tie_weights()
        head = "language_model.lm_head.weight"
        if head in weights.names():  # T5's configuration ties it by default; `from_pretrained` leaves one that is there
            self.model.get_submodule("language_model").lm_head.weight = nn.Parameter(weights.get(head))
        if lacking := [name for name, each in self.model.named_parameters() if each.is_meta]:
            raise RuntimeError(f"transformers wants tensors that were not made: {lacking[:5]}")
        for module in self.model.modules():  # what no checkpoint holds: position ids and the like are computed anew
            for name, buffer in list(module.named_buffers(recurse=False)):
                if buffer.is_meta:
                    module.register_buffer(name, torch.arange(buffer.shape[-1], device=device).expand(buffer.shape))
        self.model.eval()
        self.model.config.image_token_index = 0
        self.device, self.dtype = device, dtype
        self.begin = [] if self.model.language_model.config.is_encoder_decoder else [2]

    def write(self, pixels: Tensor, ids: Sequence[Sequence[int]], beams: int, tokens: int) -> list[list[int]]:
        """Token ids after each prompt, all of one length; one image each."""
        queries = self.model.config.num_query_tokens
        rows = torch.tensor([[0] * queries + self.begin + [*row] for row in ids], device=self.device)
        with torch.inference_mode():
            found = self.model.generate(
                pixel_values=pixels.to(self.device, self.dtype), input_ids=rows, attention_mask=torch.ones_like(rows),
                do_sample=False, num_beams=beams, max_new_tokens=tokens, min_new_tokens=tokens, length_penalty=1.0,
            )  # fmt: skip
        return found[:, -tokens:].tolist()


def seconds(work: Callable[[], Any], device: torch.device, repeat: int = 3) -> float:
    """The median of a few runs, after one that is not counted."""
    work()
    taken: list[float] = []
    for _ in range(repeat):
        wait(device)
        start = time.perf_counter()
        work()
        wait(device)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def wait(device: torch.device) -> None:
    """Until the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
