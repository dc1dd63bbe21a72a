"""A checkpoint computed by transformers and by us: how far apart, from pixels to tokens."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from blip2 import image
from blip2.adapters.parts import require
from blip2.blip2 import Blip2
from blip2.decoding import Decoding
from blip2.errors import ConfigError
from blip2.model import prefix
from blip2.weights import hub, transformers

BEAMS = 5
NEW_TOKENS = 20
TOLERANCE = 1e-4  # of the largest value, in float32: sums in another order


@dataclass(frozen=True)
class Line:
    """One comparison.

    Attributes:
        difference: the largest, over the largest value of theirs; None for tokens.
        equal: within `TOLERANCE`, or the same tokens.
    """

    what: str
    difference: float | None
    equal: bool


def verify(name: str, images: Sequence[Path] = (), prompts: Sequence[str] = ("", "a photo of")) -> list[Line]:
    """Compare a model that writes, in float32, one of the two in memory at a time.

    Args:
        name: a directory of transformers, or OWNER/NAME on the hub.
        images: pictures to look at; two that are drawn here where there are none.
        prompts: what captions start from.
    Raises:
        MissingExtraError: transformers is not installed.
        CheckpointError: the model cannot be loaded.
        ConfigError: it does not write, or is not of transformers' format.
    """
    directory = hub.download(name) if hub.is_name(name) else Path(name)
    if not transformers.holds(directory):
        raise ConfigError(f"{directory}: only models in transformers' format have something to be compared with")
    pictures = [image.open(path) for path in images] or drawn()
    seen = ours(directory, pictures, prompts)
    gc.collect()
    expected = theirs(directory, seen, prompts)
    return [compare(what, value, expected[what]) for what, value in seen.values.items()]


@dataclass(frozen=True)
class Seen:
    """What our model computed, and what the other needs to do the same.

    Attributes:
        values: tensors, and rows of tokens, by what they are.
        pixels: float32[N, 3, H, W].
        ids: of each prompt, the begin token with it.
        stop_ids: what ends a text.
    """

    values: dict[str, Any]
    pixels: Tensor
    ids: list[list[int]]
    stop_ids: tuple[int, ...]


@torch.inference_mode()
def ours(directory: Path, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> Seen:
    """What our model computes of some pictures, in float32 on the CPU.

    Raises:
        ConfigError: it does not write.
        CheckpointError: it cannot be loaded.
    """
    model = transformers.load(directory, torch.device("cpu"), torch.float32)
    if model.language is None:
        raise ConfigError(f"{directory}: a model that matches; only those that write are compared")
    language, tokenizer = model.writer()
    pixels = image.Transform(model.encoder.image_size, model.encoder.mean, model.encoder.std)(pictures)
    features = model.encode(pictures)
    visual = model.bridge.project(features.queries)
    values: dict[str, Any] = {
        "patches": model.bridge.vision_norm(features.patches),
        "queries": features.queries,
        "visual prefix": visual,
    }
    ids = tokenizer.prompts(prompts)
    for prompt, row in zip(prompts, ids, strict=True):
        start = prefix.build(language, visual, [row] * len(pictures), tokenizer.bos, model.config.prompts.visual)
        values[f"first logits after {prompt!r}"] = language.prefill(*start)[0]
        for beams in (1, BEAMS):
            decoding = Decoding.of({"num_beams": beams, "max_new_tokens": NEW_TOKENS})
            found = model.write(features, [prompt] * len(pictures), decoding)
            values[_tokens(prompt, beams)] = [list(text.ids) for [text] in found]
    return Seen(values, pixels, [[*_begin(model), *row] for row in ids], tokenizer.stop_ids)


def _begin(model: Blip2) -> list[int]:
    """The begin token, where a prompt has one."""
    _, tokenizer = model.writer()
    return [] if tokenizer.bos is None else [tokenizer.bos]


@torch.inference_mode()
def theirs(directory: Path, seen: Seen, prompts: Sequence[str]) -> dict[str, Any]:
    """What transformers computes of the same, by the same names.

    Raises:
        MissingExtraError: it is not installed.
    """
    library = require("transformers", "the comparison")
    model: Any = library.Blip2ForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()
    slot = 0 if model.config.image_token_index is None else model.config.image_token_index
    model.config.image_token_index = slot
    patches = model.vision_model(seen.pixels).last_hidden_state
    queries = model.qformer(
        query_embeds=model.query_tokens.expand(len(patches), -1, -1), encoder_hidden_states=patches
    ).last_hidden_state
    found: dict[str, Any] = {
        "patches": patches,
        "queries": queries,
        "visual prefix": model.language_projection(queries),
    }
    writes_apart = model.language_model.config.is_encoder_decoder
    for prompt, row in zip(prompts, seen.ids, strict=True):
        ids = torch.tensor([[slot] * queries.shape[1] + row]).expand(len(patches), -1)
        more: dict[str, Any] = {}
        if writes_apart:
            more["decoder_input_ids"] = torch.full(
                (len(patches), 1), model.language_model.config.decoder_start_token_id
            )
        output = model(pixel_values=seen.pixels, input_ids=ids, attention_mask=torch.ones_like(ids), **more)
        found[f"first logits after {prompt!r}"] = output.logits[:, -1].float()
        for beams in (1, BEAMS):
            written = model.generate(
                pixel_values=seen.pixels, input_ids=ids, num_beams=beams, max_new_tokens=NEW_TOKENS, do_sample=False,
                length_penalty=1.0,
            )  # fmt: skip
            rows: list[list[int]] = written[:, 1 if writes_apart else ids.shape[1] :].tolist()
            found[_tokens(prompt, beams)] = [_until(tokens, seen.stop_ids) for tokens in rows]
    return found


def _tokens(prompt: str, beams: int) -> str:
    return f"{'greedy' if beams == 1 else f'{beams} beams'} after {prompt!r}"


def _until(tokens: list[int], stop_ids: tuple[int, ...]) -> list[int]:
    end = next((place for place, token in enumerate(tokens) if token in stop_ids), len(tokens))
    return tokens[:end]


def compare(what: str, found: Any, expected: Any) -> Line:
    """One line of the report: tensors by their largest difference, tokens as they are."""
    if not isinstance(found, Tensor):
        return Line(what, None, found == expected)
    difference = float((found - expected).abs().max() / expected.abs().max())
    return Line(what, difference, difference <= TOLERANCE)


def drawn() -> list[Image.Image]:
    """Two pictures of coloured noise, coarse and fine."""
    draw = np.random.default_rng(0)
    return [
        Image.fromarray(draw.integers(0, 256, (size, size, 3), dtype=np.uint8)).resize((320, 240)) for size in (6, 60)
    ]
