"""The models that match and embed: `Blip2ForImageTextRetrieval` and its two halves.

Letters: B rows, N images, M texts, Q queries, T text positions, E width of the image-text space.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from blip2.blip2 import Blip2
from blip2.compat.transformers.configuration import Blip2Config
from blip2.compat.transformers.modules import (
    PreTrainedModel,
    Seeing,
    cast_to,
    given,
    of,
    opened,
    refuse_attentions,
)
from blip2.compat.transformers.naming import speak
from blip2.compat.transformers.outputs import (
    BaseModelOutputWithPooling,
    Blip2ImageTextMatchingModelOutput,
    Blip2TextModelOutput,
    Blip2VisionModelOutput,
)
from blip2.compat.transformers.writing import PLACES, random
from blip2.errors import ConfigError, PromptError
from blip2.model.heads import StageOneHeads
from blip2.weights.maps import transformers as maps

HEADS = {**PLACES, "bridge.heads.": "heads."}


class Matching(Seeing):
    """Encoder, Q-Former with its text side, and the heads.

    Args:
        config: a configuration; the weights are random.
        model: a loaded model to be the face of.
    """

    def __init__(self, config: Blip2Config, model: Blip2 | None = None) -> None:
        model = model or random(config, retrieves=True)
        if model.bridge.heads is None:
            raise ConfigError("this model writes, but does not match or embed: use Blip2ForConditionalGeneration")
        super().__init__(config, model)
        self.heads: StageOneHeads = model.bridge.heads
        speak(self, HEADS, maps.blip2(model.config), maps.BESIDE)

    @classmethod
    def from_pretrained(cls, name: str | Path, **words: Any) -> Self:
        """From a directory or a name on the hub; `words` as of `places.load`."""
        return cls(*opened(name, **words)).eval()

    def words(self, ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """A text without the placeholders before it, and its mask; int64[B, T] and bool[B, T].

        Raises:
            PromptError: a row does not begin with as many placeholders as there are queries, and no others.
        """
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        token, count = self.config.image_token_index, self.config.num_query_tokens
        if token is None:
            return ids, real
        slots = (ids == token).sum(1)
        if bool((slots != count).any()) or not bool((ids[:, :count] == token).all()):
            raise PromptError(
                f"the texts have {slots.tolist()} image placeholders (id {token}), each needs {count} first: "
                "let Blip2Processor fill them in, with images and text in one call"
            )
        return ids[:, count:], real[:, count:]

    def image_vectors(self, queries: BaseModelOutputWithPooling) -> Tensor:
        """Queries in the image-text space: float[N, Q, E], unit length."""
        head = self.heads.vision_proj
        return F.normalize(head(cast_to(of(queries.last_hidden_state), head)), dim=-1)

    def text_vectors(self, hidden: Tensor) -> Tensor:
        """Hidden states of texts in the image-text space: unit length."""
        return F.normalize(self.heads.text_proj(cast_to(hidden, self.heads.text_proj)), dim=-1)


class Blip2ForImageTextRetrieval(Matching):
    """How well images and texts fit."""

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        use_image_text_matching_head: bool | None = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Match pairs, or compare all with all.

        Args:
            pixel_values: float[N, 3, H, W].
            input_ids, attention_mask: int64[M, T]; placeholders stand before each text where the model has an id for
                them.
            use_image_text_matching_head: True for the matching head, on pairs (M is N, or one of them is 1); False for
                cosines of all images and texts.
        Returns:
            `Blip2ImageTextMatchingModelOutput`, or a tuple where `return_dict` is False.
        """
        refuse_attentions(output_attentions)
        ids, real = self.words(input_ids, attention_mask)
        embeds = self.qformer.embeddings(ids)
        if use_image_text_matching_head:
            return given(self._match(pixel_values, embeds, real, output_hidden_states), return_dict)
        seen, queries = self.look(pixel_values, False, output_hidden_states)
        read: BaseModelOutputWithPooling = self.qformer(embeds, query_length=0, attention_mask=real)
        images, texts = self.image_vectors(queries), self.text_vectors(of(read.pooler_output))
        cosines = (images @ texts.mT).amax(1)  # (N, M), each text with its best query
        found = Blip2ImageTextMatchingModelOutput(None, cosines, cosines.mT, texts, images, read, seen)
        return given(found, return_dict)

    def _match(
        self, pixels: Tensor, embeds: Tensor, real: Tensor, states: bool | None
    ) -> Blip2ImageTextMatchingModelOutput:
        seen: BaseModelOutputWithPooling = self.vision_model(pixels, False, states)
        patches, queries = of(seen.last_hidden_state), self.query_tokens
        pairs, count = max(len(patches), len(embeds)), queries.shape[1]
        if {len(patches), len(embeds)} - {1, pairs}:
            raise PromptError(f"{len(patches)} images and {len(embeds)} texts: the matching head takes pairs")
        both = torch.cat([queries.expand(pairs, -1, -1), embeds.expand(pairs, -1, -1)], dim=1)  # (B, Q + T, D)
        whole = torch.cat([real.new_ones(pairs, count), real.expand(pairs, -1)], dim=1)
        joined: BaseModelOutputWithPooling = self.qformer(
            both, count, whole, patches.expand(pairs, -1, -1), output_hidden_states=states
        )
        hidden = of(joined.last_hidden_state)
        logits = self.heads.itm_head(cast_to(hidden[:, :count], self.heads.itm_head)).mean(1)  # (B, 2)
        return Blip2ImageTextMatchingModelOutput(None, logits, logits.mT, hidden, patches, joined, seen)


class Blip2VisionModelWithProjection(Matching):
    """Images in the image-text space."""

    def forward(
        self,
        pixel_values: Tensor,
        interpolate_pos_encoding: bool | None = False,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """`image_embeds` float[B, Q, E], unit length, one a query; `last_hidden_state` are the patches."""
        seen, queries = self.look(pixel_values, interpolate_pos_encoding, output_hidden_states)
        found = Blip2VisionModelOutput(self.image_vectors(queries), seen.last_hidden_state, seen.hidden_states)
        return given(found, return_dict)


class Blip2TextModelWithProjection(PreTrainedModel):
    """Texts in the image-text space. The image encoder is not kept.

    Args:
        config: a configuration; the weights are random.
        model: a loaded model to be the face of.
    """

    main_input_name = "input_ids"
    config: Blip2Config

    def __init__(self, config: Blip2Config, model: Blip2 | None = None) -> None:
        super().__init__()
        whole = Matching(config, model)
        self.config, self.qformer, self.text_projection = config, whole.qformer, whole.heads.text_proj

    @classmethod
    def from_pretrained(cls, name: str | Path, **words: Any) -> Self:
        """From a directory or a name on the hub; `words` as of `places.load`."""
        return cls(*opened(name, **words)).eval()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """`text_embeds` float[B, T, E], unit length: the first position is the text's vector."""
        embeds = self.qformer.embeddings(input_ids, position_ids)
        read: BaseModelOutputWithPooling = self.qformer(
            embeds, query_length=0, attention_mask=attention_mask, output_hidden_states=output_hidden_states
        )
        hidden = of(read.last_hidden_state)
        vectors = F.normalize(self.text_projection(cast_to(hidden, self.text_projection)), dim=-1)
        return given(Blip2TextModelOutput(vectors, hidden, read.hidden_states), return_dict)
