"""Processors: pictures and texts to what a model takes, with a placeholder for every query of the Q-Former."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

from PIL import Image
from torch import Tensor, from_numpy

from blip2 import image
from blip2.compat.transformers import places
from blip2.compat.transformers.features import BatchFeature
from blip2.compat.transformers.tokens import IMAGE_TOKEN, Tokenizer, texts_of
from blip2.config import CLIP_MEAN, CLIP_STD
from blip2.errors import CheckpointError, ConfigError, PromptError
from blip2.files import replacing
from blip2.weights.transformers import read_json

CONFIG, IMAGES = "processor_config.json", "preprocessor_config.json"
STEPS = ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb")  # always taken


class BlipImageProcessor:
    """Pictures to pixels: RGB, squeezed to a square, normalised.

    Args:
        size: side of the square, as a number or as {"height": n, "width": n}.
        image_mean, image_std: of each channel on 0..1; CLIP's.
        others: further values of a configuration: steps that are always taken, and what is without effect.
    Raises:
        ConfigError: the size is no square, or a step is switched off.
    """

    model_input_names: ClassVar = ["pixel_values"]

    def __init__(
        self,
        size: Any = 384,
        image_mean: Sequence[float] = CLIP_MEAN,
        image_std: Sequence[float] = CLIP_STD,
        **others: Any,
    ) -> None:
        off = [step for step in STEPS if others.get(step) is False]
        if off:
            raise ConfigError(f"{off[0]}=False: blip2 takes this step always; give the pixels to the model yourself")
        if others.get("resample", 3) != 3:  # Pillow's number of it
            raise ConfigError("resample: the models were trained on bicubic (3) pictures, and blip2 makes no others")
        self.side = _side(size)
        self.image_mean, self.image_std = list(image_mean), list(image_std)

    @property
    def size(self) -> dict[str, int]:
        """Height and width of the pixels."""
        return {"height": self.side, "width": self.side}

    @classmethod
    def read(cls, directory: Path) -> Self:
        """From the directory of a processor.

        Raises:
            CheckpointError: none lies there.
        """
        for name in (CONFIG, IMAGES):
            if (directory / name).is_file():
                values = read_json(directory / name)
                values = values.get("image_processor", values)
                if "image_mean" in values or "size" in values:
                    return cls(**values)
        raise CheckpointError(f"{directory}: neither {CONFIG} nor {IMAGES}; save the processor with save_pretrained")

    @classmethod
    def from_pretrained(cls, name: str | Path, **where: Any) -> Self:
        """From a directory or a name on the hub; `where` as of `places.find`."""
        return cls.read(places.find(name, **where))

    def to_dict(self) -> dict[str, Any]:
        """As `preprocessor_config.json` has it."""
        return {
            "image_processor_type": "BlipImageProcessor",
            **dict.fromkeys(STEPS, True),
            "image_mean": self.image_mean,
            "image_std": self.image_std,
            "resample": 3,
            "rescale_factor": 1 / 255,
            "size": self.size,
        }

    def __call__(self, images: Any, return_tensors: str | None = "pt", size: Any = None) -> BatchFeature:
        """Pixels.

        Args:
            images: one picture or many: PIL images, arrays, tensors, paths, bytes. A PIL image is taken as it is, as
                transformers does; files are turned upright as their EXIF says.
            size: instead of the configured one.
        Returns:
            `pixel_values`, float32[B, 3, S, S].
        Raises:
            ImageError: a picture cannot be read; the message names it.
        """
        mean, std = ((float(v[0]), float(v[1]), float(v[2])) for v in (self.image_mean, self.image_std))
        transform = image.Transform(self.side if size is None else _side(size), mean, std)
        pixels = transform([_rgb(each) for each in _pictures(images)])
        return BatchFeature(pixel_values=pixels).tensors(return_tensors)


class Blip2Processor:
    """Pictures and texts to a model's inputs.

    Args:
        image_processor, tokenizer: of the two kinds of input.
        num_query_tokens: placeholders before each text that goes with a picture; none where None, as older models want.
    """

    def __init__(
        self, image_processor: BlipImageProcessor, tokenizer: Tokenizer, num_query_tokens: int | None = None
    ) -> None:
        self.image_processor, self.tokenizer, self.num_query_tokens = image_processor, tokenizer, num_query_tokens
        self.image_token = IMAGE_TOKEN

    @classmethod
    def from_pretrained(cls, name: str | Path, **words: Any) -> Self:
        """From a directory or a name on the hub.

        Args:
            words: of `places.find`; `num_query_tokens` and `padding_side` instead of the configured ones.
        """
        count, side = words.pop("num_query_tokens", None), words.pop("padding_side", None)
        directory = places.find(name, **words)
        tokenizer = Tokenizer.read(directory)
        tokenizer.padding_side = side or tokenizer.padding_side
        return cls(BlipImageProcessor.read(directory), tokenizer, count or _queries(directory))

    def save_pretrained(self, directory: str | Path) -> None:
        """Write what `from_pretrained` reads, here and in transformers."""
        place = Path(directory)
        self.tokenizer.save_pretrained(place)
        values = {"image_processor": self.image_processor.to_dict(), "num_query_tokens": self.num_query_tokens}
        for name, content in ((CONFIG, values), (IMAGES, self.image_processor.to_dict())):
            with replacing(place / name) as partial:
                partial.write_text(json.dumps({**content, "processor_class": "Blip2Processor"}, indent=2) + "\n")

    def __call__(
        self,
        images: Any = None,
        text: Any = None,
        *,
        return_tensors: str | None = None,
        padding: Any = False,
        truncation: bool = False,
        max_length: int | None = None,
        add_special_tokens: bool = True,
        size: Any = None,
    ) -> BatchFeature:
        """A model's inputs.

        Args:
            images: one picture or many, see `BlipImageProcessor`; None for texts alone.
            text: one text or many; None for pictures alone.
            return_tensors: `pt`, `np`, or None for lists.
            padding, truncation, max_length: of the texts; the placeholders count in `max_length`.
        Returns:
            `input_ids` and `attention_mask`, int64[B, T], the placeholders first; `pixel_values`, float32[N, 3, S, S].
        Raises:
            PromptError: neither of both; or texts of different lengths without padding.
        """
        if images is None and text is None:
            raise PromptError("give images, text, or both")
        if _is_text(images) and text is not None and not _is_text(text):
            images, text = text, images  # the other way round, as older code calls it
        found = BatchFeature()
        if text is not None:
            slots = self.num_query_tokens or 0
            room = None if max_length is None else max_length - slots
            rows = self.tokenizer.rows(
                texts_of(text), truncation=truncation, max_length=room, special=add_special_tokens
            )
            found.update(self.tokenizer.padded(rows, padding, room))
            if images is not None:
                found["input_ids"] = [[self.tokenizer.image_token_id] * slots + row for row in found["input_ids"]]
                found["attention_mask"] = [[1] * slots + row for row in found["attention_mask"]]
        if images is not None:
            found["pixel_values"] = self.image_processor(images, size=size)["pixel_values"]
        return found.tensors(return_tensors)

    def decode(self, ids: Any, **options: Any) -> Any:
        """As the tokenizer's."""
        return self.tokenizer.decode(ids, **options)

    def batch_decode(self, ids: Any, **options: Any) -> list[str]:
        """As the tokenizer's."""
        return self.tokenizer.batch_decode(ids, **options)

    @property
    def model_input_names(self) -> list[str]:
        """The names of what it gives."""
        return ["input_ids", "attention_mask", "pixel_values"]


class BlipProcessor(Blip2Processor):
    """The name on BLIP-2's model cards. In transformers it leaves the placeholders out, and the picture is lost."""


class AutoProcessor:
    """The processor of a directory or name: `Blip2Processor`, the only one here."""

    @staticmethod
    def from_pretrained(name: str | Path, **words: Any) -> Blip2Processor:
        """As `Blip2Processor.from_pretrained`."""
        return Blip2Processor.from_pretrained(name, **words)


def _queries(directory: Path) -> int | None:
    """How many placeholders the processor's configuration asks for; a model with their id asks for its queries."""
    if (directory / CONFIG).is_file() and (count := read_json(directory / CONFIG).get("num_query_tokens")):
        return int(count)
    model = read_json(directory / "config.json") if (directory / "config.json").is_file() else {}
    return int(model.get("num_query_tokens") or 32) if model.get("image_token_index") is not None else None


def _side(size: Any) -> int:
    if isinstance(size, Mapping):
        sides = {int(value) for value in size.values()}
        if len(sides) != 1:
            raise ConfigError(f"size {dict(size)}: blip2 squeezes pictures to a square; give one height and width")
        return sides.pop()
    return int(size)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list | tuple) and bool(value) and isinstance(value[0], str))


def _pictures(images: Any) -> list[Any]:
    """One picture or many as a list; lists within it are laid flat, stacked arrays taken apart."""
    if isinstance(images, list | tuple):
        return [picture for each in images for picture in _pictures(each)]
    return list(images) if getattr(images, "ndim", 0) == 4 else [images]


def _rgb(source: Any) -> Image.Image:
    if isinstance(source, Image.Image):
        return source.convert("RGB")
    if not isinstance(source, Tensor) and getattr(source, "ndim", 0) == 3 and source.shape[0] in (1, 3, 4):
        source = from_numpy(source)  # channels first, which arrays of ours never are
    return image.open(source)
