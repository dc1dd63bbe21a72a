"""transformers' names for BLIP-2 over blip2's own parts: change `from transformers import` and the rest runs.

What differs from transformers 5.23 is listed in `docs/compatibility.md`. transformers itself is not needed.
"""

from blip2.compat.transformers.configuration import (
    BitsAndBytesConfig,
    Blip2Config,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    OPTConfig,
    T5Config,
)
from blip2.compat.transformers.features import BatchFeature
from blip2.compat.transformers.generation import GenerationConfig
from blip2.compat.transformers.modules import Blip2QFormerModel, Blip2VisionModel
from blip2.compat.transformers.pipelines import AutoModelForImageTextToText, pipeline
from blip2.compat.transformers.processing import AutoProcessor, Blip2Processor, BlipImageProcessor, BlipProcessor
from blip2.compat.transformers.retrieval import (
    Blip2ForImageTextRetrieval,
    Blip2TextModelWithProjection,
    Blip2VisionModelWithProjection,
)
from blip2.compat.transformers.writing import Blip2ForConditionalGeneration, Blip2Model

__all__ = [
    "AutoModelForImageTextToText",
    "AutoProcessor",
    "BatchFeature",
    "BitsAndBytesConfig",
    "Blip2Config",
    "Blip2ForConditionalGeneration",
    "Blip2ForImageTextRetrieval",
    "Blip2Model",
    "Blip2Processor",
    "Blip2QFormerConfig",
    "Blip2QFormerModel",
    "Blip2TextModelWithProjection",
    "Blip2VisionConfig",
    "Blip2VisionModel",
    "Blip2VisionModelWithProjection",
    "BlipImageProcessor",
    "BlipProcessor",
    "GenerationConfig",
    "OPTConfig",
    "T5Config",
    "pipeline",
]
