"""What the models give: values indexable by name and by position, without those that are None."""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, KeysView, ValuesView
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

Tensors = tuple[Tensor, ...]


class ModelOutput:
    """A mapping over a dataclass's fields; what is None is not there."""

    def _present(self) -> dict[str, Any]:
        found = {field.name: getattr(self, field.name) for field in fields(self)}  # pyright: ignore[reportArgumentType]
        return {name: value for name, value in found.items() if value is not None}

    def __getitem__(self, key: str | int | slice) -> Any:
        return self._present()[key] if isinstance(key, str) else self.to_tuple()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._present())

    def __len__(self) -> int:
        return len(self._present())

    def __contains__(self, key: object) -> bool:
        return key in self._present()

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a name, or the default where there is none."""
        return self._present().get(key, default)

    def keys(self) -> KeysView[str]:
        """Names of what is there, in order."""
        return self._present().keys()

    def values(self) -> ValuesView[Any]:
        """What is there, in order."""
        return self._present().values()

    def items(self) -> ItemsView[str, Any]:
        """Names and values."""
        return self._present().items()

    def to_tuple(self) -> tuple[Any, ...]:
        """The values without their names, outputs within it too."""
        return tuple(value.to_tuple() if isinstance(value, ModelOutput) else value for value in self.values())


@dataclass
class BaseModelOutputWithPooling(ModelOutput):
    """Of an encoder.

    Attributes:
        last_hidden_state: float[B, N, D].
        pooler_output: float[B, D], the first position; in `get_image_features` of a model that writes, the visual
            prefix float[B, Q, D].
        hidden_states: before the first layer and after each, where asked for.
        vision_outputs, qformer_outputs: what it was made from.
    """

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    hidden_states: Tensors | None = None
    vision_outputs: BaseModelOutputWithPooling | None = None
    qformer_outputs: BaseModelOutputWithPooling | None = None


@dataclass
class LanguageModelOutput(ModelOutput):
    """Of the language model.

    Attributes:
        logits: float32[B, T, V].
        hidden_states: of a decoder-only model, where asked for.
        encoder_last_hidden_state: float[B, S, D], of an encoder-decoder.
        decoder_hidden_states, encoder_hidden_states: of an encoder-decoder, where asked for.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: Tensors | None = None
    decoder_hidden_states: Tensors | None = None
    encoder_last_hidden_state: Tensor | None = None
    encoder_hidden_states: Tensors | None = None


@dataclass
class Blip2ForConditionalGenerationModelOutput(ModelOutput):
    """Of `Blip2ForConditionalGeneration` and `Blip2Model`.

    Attributes:
        loss: mean cross-entropy over the labels, where they were given.
        logits: float32[B, T, V]; zeros where the attention mask is.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    vision_outputs: BaseModelOutputWithPooling | None = None
    qformer_outputs: BaseModelOutputWithPooling | None = None
    language_model_outputs: LanguageModelOutput | None = None


@dataclass
class Blip2ImageTextMatchingModelOutput(ModelOutput):
    """Of `Blip2ForImageTextRetrieval`.

    Attributes:
        logits_per_image: (no match, match) of each pair, float[B, 2]; or cosines float[N, M].
        logits_per_text: the same, transposed.
        text_embeds, image_embeds: unit vectors float[M, E] and float[N, Q, E]; with the matching head the hidden states
            of queries and text, and the patches.
    """

    loss: Tensor | None = None
    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None
    text_embeds: Tensor | None = None
    image_embeds: Tensor | None = None
    text_model_output: BaseModelOutputWithPooling | None = None
    vision_model_output: BaseModelOutputWithPooling | None = None


@dataclass
class Blip2TextModelOutput(ModelOutput):
    """Of `Blip2TextModelWithProjection`: `text_embeds` float[B, T, E], unit vectors; the first is the text's."""

    text_embeds: Tensor | None = None
    last_hidden_state: Tensor | None = None
    hidden_states: Tensors | None = None


@dataclass
class Blip2VisionModelOutput(ModelOutput):
    """Of `Blip2VisionModelWithProjection`: `image_embeds` float[B, Q, E], unit vectors."""

    image_embeds: Tensor | None = None
    last_hidden_state: Tensor | None = None
    hidden_states: Tensors | None = None


@dataclass
class GenerateOutput(ModelOutput):
    """Of `generate(..., return_dict_in_generate=True)`.

    Attributes:
        sequences: int64[N, T], as `generate` gives them otherwise.
        sequences_scores: float32[N], with beams.
    """

    sequences: Tensor | None = None
    sequences_scores: Tensor | None = None
