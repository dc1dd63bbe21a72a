"""LAVIS's processors: pictures to pixels, captions and questions to the text that its models were trained on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor

from blip2.config import CLIP_MEAN, CLIP_STD
from blip2.errors import ConfigError, ImageError
from blip2.image import RandomView, Transform
from blip2.text import WORDS, published_caption, published_question


class Processor:
    """What all of them share: `build(image_size=364)` gives one of the same kind with other settings."""

    @classmethod
    def build(cls, **settings: Any) -> Self:
        """One with these settings.

        Raises:
            ConfigError: an unknown setting, by name.
        """
        known: Mapping[str, Any] = cls.__dict__.get("__dataclass_fields__", {})
        if unknown := settings.keys() - known.keys():
            raise ConfigError(f"{cls.__name__}: unknown setting {min(unknown)!r}; known are {', '.join(known)}")
        return cls(**{name: value for name, value in settings.items() if value is not None})

    @classmethod
    def from_config(cls, cfg: Mapping[str, Any] | None = None) -> Self:
        """One with the settings of a mapping; its key `name` says which kind, and is left out."""
        return cls.build(**{key: value for key, value in (cfg or {}).items() if key != "name"})


@dataclass(frozen=True)
class BlipImageEvalProcessor(Processor):
    """A picture squeezed to a square, bicubic, and normalised."""

    image_size: int = 384
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

    def __call__(self, item: Image.Image) -> Tensor:
        """Pixels float32[3, S, S] of a PIL image in RGB, taken as it lies: EXIF is not looked at.

        Raises:
            ImageError: it is no PIL image, or of another mode.
        """
        return Transform(self.image_size, self.mean, self.std)(_picture(item))[0]


@dataclass(frozen=True)
class BlipImageTrainProcessor(Processor):
    """A random crop of a picture, resized to a square, mirrored every second time, and normalised.

    Draws follow `torch.manual_seed`. This is LAVIS's `blip2_image_train`; its `blip_image_train` distorts colours and
    angles besides (RandAugment), which none of BLIP-2's own training recipes asks for.
    """

    image_size: int = 384
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    min_scale: float = 0.5
    max_scale: float = 1.0

    def __call__(self, item: Image.Image) -> Tensor:
        """Pixels float32[3, S, S]; see `BlipImageEvalProcessor`."""
        view = RandomView(self.image_size, self.mean, self.std, scale=(self.min_scale, self.max_scale))
        return view(_picture(item), int(torch.randint(2**62, ())))


@dataclass(frozen=True)
class BlipCaptionProcessor(Processor):
    """A caption in lower case, some punctuation turned to spaces, after a prompt."""

    prompt: str = ""
    max_words: int = WORDS

    def __call__(self, caption: str) -> str:
        """`A dog (brown) runs!` is `a dog brown runs`."""
        return self.prompt + published_caption(_text(caption), self.max_words)


@dataclass(frozen=True)
class BlipQuestionProcessor(Processor):
    """A question in lower case, without some punctuation."""

    max_words: int = WORDS

    def __call__(self, question: str) -> str:
        """`What's (roughly) this?` is `what's roughly this?`."""
        return published_question(_text(question), self.max_words)


_KINDS: dict[str, tuple[type[Processor], Mapping[str, Any]]] = {
    "blip_image_eval": (BlipImageEvalProcessor, {}),
    "blip_image_train": (BlipImageTrainProcessor, {}),
    "blip2_image_train": (BlipImageTrainProcessor, {"image_size": 364}),
    "blip_caption": (BlipCaptionProcessor, {}),
    "blip_question": (BlipQuestionProcessor, {}),
}


def load_processor(name: str, cfg: Mapping[str, Any] | None = None) -> Any:
    """A processor by LAVIS's name.

    Args:
        cfg: its settings, such as {"image_size": 224}.
    Raises:
        ConfigError: no such processor, or an unknown setting.
    """
    if name not in _KINDS:
        raise ConfigError(f"processor {name!r}: there are {', '.join(_KINDS)}")
    kind, settings = _KINDS[name]
    return kind.from_config({**settings, **(cfg or {})})


def _picture(item: object) -> Image.Image:
    if not isinstance(item, Image.Image):
        raise ImageError(f"a {type(item).__name__}, not a PIL image: open it with blip2.image.open")
    return item


def _text(given: object) -> str:
    if not isinstance(given, str):
        raise ConfigError(f"a {type(given).__name__}, not a text: process texts one by one")
    return given
