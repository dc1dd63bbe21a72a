"""`pipeline("image-text-to-text")` and the class that finds its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blip2.compat.transformers import places
from blip2.compat.transformers.processing import AutoProcessor, Blip2Processor
from blip2.compat.transformers.tokens import texts_of
from blip2.compat.transformers.writing import Blip2ForConditionalGeneration
from blip2.errors import ConfigError

TASK = "image-text-to-text"
NEW_TOKENS = 256  # where nobody says how many, as far as the context goes


class AutoModelForImageTextToText:
    """The model of a directory or name that writes: `Blip2ForConditionalGeneration`, the only one here."""

    @staticmethod
    def from_pretrained(name: str | Path, **words: Any) -> Blip2ForConditionalGeneration:
        """As `Blip2ForConditionalGeneration.from_pretrained`."""
        return Blip2ForConditionalGeneration.from_pretrained(name, **words)


class ImageTextToTextPipeline:
    """From pictures and texts to records of what was written.

    Args:
        model, processor: to be used.
    """

    task = TASK

    def __init__(self, model: Blip2ForConditionalGeneration, processor: Blip2Processor) -> None:
        self.model, self.processor = model, processor
        self.tokenizer = processor.tokenizer

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        *,
        max_new_tokens: int | None = None,
        generate_kwargs: Mapping[str, Any] | None = None,
        return_full_text: bool = True,
        batch_size: int = 16,
        **options: Any,
    ) -> list[dict[str, str]]:
        """Write about pictures.

        Args:
            images: a picture a text: PIL images, paths, bytes; or {"images": ..., "text": ...}.
            text: what each text begins from.
            return_full_text: give `text` before what was written.
            options: arguments of `generate`, which may also stand in `generate_kwargs`.
        Returns:
            `input_text` and `generated_text` of each.
        """
        if isinstance(images, Mapping):
            images, text = images.get("images", images.get("image")), images.get("text", text)
        if images is None or text is None:
            raise ConfigError(f"{TASK}: give images and text")
        pictures, texts = images if isinstance(images, list | tuple) else [images], texts_of(text)
        if len(pictures) != len(texts):
            raise ConfigError(f"{TASK}: {len(pictures)} images and {len(texts)} texts; give one a text")
        asked = {**options, **(generate_kwargs or {})}
        if max_new_tokens is not None:
            asked["max_new_tokens"] = max_new_tokens
        records: list[dict[str, str]] = []
        for start in range(0, len(texts), batch_size):
            some = texts[start : start + batch_size]
            written = self._write(pictures[start : start + batch_size], some, asked)
            per = len(written) // len(some)
            asked_of = [each for each in some for _ in range(per)]
            records += [
                {"input_text": each, "generated_text": each + new if return_full_text else new}
                for each, new in zip(asked_of, written, strict=True)
            ]
        return records

    def _write(self, pictures: Sequence[Any], texts: list[str], asked: dict[str, Any]) -> list[str]:
        inputs = self.processor(images=list(pictures), text=texts, return_tensors="pt", padding=True)
        inputs = inputs.to(self.model.device)
        decoder_only = self.model.config.use_decoder_only_language_model
        width = inputs["input_ids"].shape[1] if decoder_only else 1
        language: Any = self.model.language_model
        given = asked.get("generation_config")
        said = {**self.model.generation_config.to_dict(), **(given.to_dict() if given else {}), **asked}
        if said.get("max_new_tokens") is None and said.get("max_length") is None:
            room = language.context - inputs["input_ids"].shape[1]
            asked = {**asked, "max_new_tokens": min(NEW_TOKENS, max(1, room))}
        ids: Tensor = self.model.generate(**inputs, **asked)
        return self.processor.batch_decode(ids[:, width:], skip_special_tokens=True)


def pipeline(
    task: str = TASK,
    model: Any = None,
    processor: Any = None,
    device: Any = None,
    model_kwargs: Mapping[str, Any] | None = None,
    **words: Any,
) -> ImageTextToTextPipeline:
    """A pipeline.

    Args:
        task: `image-text-to-text`.
        model: a directory, a name on the hub, or a loaded model.
        processor: as `model`; the model's own where None.
        device: a name, a torch.device or the number of a CUDA device; the CPU where None.
        model_kwargs, words: of `from_pretrained`: torch_dtype, device_map, revision, ...
    Raises:
        ConfigError: another task, or no model.
    """
    if task != TASK:
        raise ConfigError(f"pipeline {task!r}: blip2 has {TASK!r}")
    if model is None or (processor is None and not isinstance(model, str | Path)):
        raise ConfigError(f"pipeline {task!r}: give a model, and its processor beside a loaded one")
    words = {**words, **(model_kwargs or {})}
    where = {name: words[name] for name in places.WHERE if name in words}
    if processor is None or isinstance(processor, str | Path):
        processor = AutoProcessor.from_pretrained(processor or model, **where)
    if isinstance(model, str | Path):
        model = AutoModelForImageTextToText.from_pretrained(model, **words)
    if device is not None:
        model.to(
            torch.device(
                f"cuda:{device}" if isinstance(device, int) and device >= 0 else "cpu" if device == -1 else device
            )
        )
    return ImageTextToTextPipeline(model, processor)
