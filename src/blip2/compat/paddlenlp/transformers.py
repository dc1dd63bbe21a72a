"""PaddleNLP's two names for BLIP-2, on directories of PaddleNLP or transformers; the tensors are torch's.

`return_tensors="pt"`, as PaddleNLP's own model card writes, and `"pd"` both give them.
"""

from __future__ import annotations

from typing import Any

from blip2.compat.transformers import BatchFeature
from blip2.compat.transformers import Blip2ForConditionalGeneration as _Model
from blip2.compat.transformers import Blip2Processor as _Processor

__all__ = ["Blip2ForConditionalGeneration", "Blip2Processor"]


class Blip2Processor(_Processor):
    """Pictures and texts to a model's inputs."""

    def __call__(
        self, images: Any = None, text: Any = None, *, return_tensors: str | None = None, **options: Any
    ) -> BatchFeature:
        """As transformers' `Blip2Processor`; `pd` is taken for `pt`."""
        kind = "pt" if return_tensors == "pd" else return_tensors
        return super().__call__(images, text, return_tensors=kind, **options)


class Blip2ForConditionalGeneration(_Model):
    """A model that writes about images."""
