"""The models that write: `Blip2Model` and `Blip2ForConditionalGeneration`.

Letters: B rows, N images, Q queries, S positions, D width, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from blip2 import generate
from blip2.blip2 import Blip2
from blip2.compat.transformers import generation, places, prompting
from blip2.compat.transformers.configuration import Blip2Config
from blip2.compat.transformers.generation import GenerationConfig
from blip2.compat.transformers.modules import Seeing, cast_to, given, of, refuse_attentions
from blip2.compat.transformers.naming import speak
from blip2.compat.transformers.outputs import BaseModelOutputWithPooling, Blip2ForConditionalGenerationModelOutput
from blip2.compat.transformers.tokens import IMAGE_TOKEN
from blip2.config import VisionConfig
from blip2.errors import ConfigError
from blip2.files import replacing
from blip2.model.bridge import Bridge
from blip2.model.t5 import T5
from blip2.model.vision import VisionTransformer
from blip2.weights import transformers as format
from blip2.weights.maps import transformers as maps

ENDS = "generation_config.json"
PLACES = {  # where our parts lie in a model of this kind
    "vision.": "vision_model.transformer.",
    "bridge.vision_norm.": "vision_model.post_layernorm.",
    "bridge.qformer.": "qformer.transformer.",
    "bridge.language_projection.": "language_projection.",
    "language.": "language_model.",
}


class Writing(Seeing):
    """Encoder, Q-Former, projection and language model.

    Args:
        config: a configuration; the weights are random.
        model: a loaded model to be the face of.
    Attributes:
        generation_config: what `generate` does where nothing else is said.
    """

    def __init__(self, config: Blip2Config, model: Blip2 | None = None) -> None:
        model = model or random(config)
        if model.language is None or model.bridge.language_projection is None:
            raise ConfigError("this model matches and embeds, but does not write: use Blip2ForImageTextRetrieval")
        super().__init__(config, model)
        self.language_projection = model.bridge.language_projection
        self.language_model = cast("nn.Module", model.language)
        self.generation_config = GenerationConfig()
        speak(self, PLACES, maps.blip2(model.config), maps.BESIDE)

    @classmethod
    def from_pretrained(cls, name: str | Path, **words: Any) -> Self:
        """From a directory or a name on the hub.

        Args:
            words: see `places.load`. Without `device_map` the model lies on the CPU, as in transformers.
        Raises:
            CheckpointError: no such model, or it is damaged; nothing is drawn at random in silence.
        """
        model, values, directory = places.load(name, **words)
        found = cls(Blip2Config.from_dict(values), model)
        ends = directory / ENDS
        if ends.is_file():
            found.generation_config.update(**format.read_json(ends))
        return found.eval()

    def save_pretrained(self, directory: str | Path, **words: Any) -> None:
        """Write what `from_pretrained` reads, here and in transformers."""
        super().save_pretrained(directory, **words)
        ends = Path(directory) / ENDS
        values = {**format.read_json(ends), **self.generation_config.to_dict()}
        with replacing(ends) as partial:
            partial.write_text(json.dumps(values, indent=2) + "\n")

    def get_input_embeddings(self) -> nn.Module:
        """The language model's words."""
        return self.language_model.get_submodule("words")

    def _features(self, pixels: Tensor, interpolate: bool | None, states: bool | None) -> BaseModelOutputWithPooling:
        """Patches, queries, and the visual prefix as `pooler_output`."""
        seen, queries = self.look(pixels, interpolate, states)
        prefix = self.language_projection(cast_to(of(queries.last_hidden_state), self.language_projection))
        return BaseModelOutputWithPooling(seen.last_hidden_state, prefix, seen.hidden_states, seen, queries)

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        interpolate_pos_encoding: bool | None = False,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        output_attentions: bool | None = None,
    ) -> Any:
        """What the language model says at every position.

        Args:
            pixel_values: float[N, 3, H, W].
            input_ids: int64[B, S], the images' placeholders among them; or `inputs_embeds`, float[B, S, D].
            attention_mask: [B, S], 0 where a position is padding; on which side never changes a row.
            decoder_input_ids, decoder_attention_mask: of an encoder-decoder; from the labels where None.
            labels: int64, -100 where nothing is learnt.
        Returns:
            `Blip2ForConditionalGenerationModelOutput`, or a tuple where `return_dict` is False.
        Raises:
            PromptError: the placeholders do not match the images.
        """
        refuse_attentions(output_attentions)
        seen = self._features(pixel_values, interpolate_pos_encoding, output_hidden_states)
        prompt = self._prompt(of(seen.pooler_output), input_ids, attention_mask, inputs_embeds)
        words = {
            "labels": labels,
            "decoder_input_ids": decoder_input_ids,
            "decoder_attention_mask": decoder_attention_mask,
        }
        said = prompting.respond(self.language_model, prompt, words, output_hidden_states)
        found = Blip2ForConditionalGenerationModelOutput(
            said.loss, said.logits, seen.vision_outputs, seen.qformer_outputs, said
        )
        return given(found, return_dict)

    def _prompt(
        self, visual: Tensor, ids: Tensor | None, mask: Tensor | None, embeds: Tensor | None
    ) -> prompting.Prompt:
        token, older = self.config.image_token_index, self.config.image_token_index is None
        if ids is None and embeds is None:  # as transformers: the image, then the token that begins a text
            begin = getattr(self.config.text_config, "bos_token_id", None)
            slots = [] if token is None else [token] * self.config.num_query_tokens
            row = [*slots, *([] if begin is None else [begin])]
            ids = torch.tensor([row] * len(visual), dtype=torch.long, device=visual.device)
        if older and self._model.tokenizer is not None:
            token = self._model.tokenizer.rust.token_to_id(IMAGE_TOKEN)
        return prompting.build(self.language_model, visual, token, ids, mask, embeds, older=older)


class Blip2Model(Writing):
    """A model for its parts' features and for logits."""

    def get_image_features(
        self,
        pixel_values: Tensor,
        interpolate_pos_encoding: bool | None = False,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """The image encoder's output, as of `Blip2VisionModel`."""
        return self.vision_model(pixel_values, interpolate_pos_encoding, output_hidden_states, return_dict)

    def get_qformer_features(self, pixel_values: Tensor, interpolate_pos_encoding: bool | None = False) -> Tensor:
        """What the queries read from images: float[N, Q, D]."""
        return of(self.look(pixel_values, interpolate_pos_encoding, None)[1].last_hidden_state)

    def get_text_features(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """The language model's last hidden states of a text, float[B, S, D]; of an encoder-decoder, its encoder's."""
        last, states = prompting.features(self.language_model, input_ids, attention_mask, output_hidden_states)
        return given(BaseModelOutputWithPooling(last, hidden_states=states), return_dict)


class Blip2ForConditionalGeneration(Writing):
    """A model that writes about images."""

    def get_image_features(
        self,
        pixel_values: Tensor,
        interpolate_pos_encoding: bool | None = False,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Patches as `last_hidden_state`, and as `pooler_output` the visual prefix, float[N, Q, D]."""
        return given(self._features(pixel_values, interpolate_pos_encoding, output_hidden_states), return_dict)

    @torch.no_grad()
    def generate(
        self,
        pixel_values: Tensor,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        interpolate_pos_encoding: bool | None = False,
        generation_config: Any = None,
        **options: Any,
    ) -> Any:
        """Texts about images, as rows of ids.

        Args:
            pixel_values, input_ids, attention_mask, inputs_embeds: as of `forward`; without words a text begins itself.
            generation_config, options: transformers' arguments, see `generation.DEFAULTS`.
        Returns:
            int64[B * num_return_sequences, T]: of a decoder-only model the prompt's ids and then the new ones, of an
            encoder-decoder its first token and then the new ones; padded on the right.
        Raises:
            ConfigError: an argument that blip2 does not have; it is named.
            PromptError: the placeholders do not match the images, or prompt and text do not fit the context.
        """
        seen = self._features(pixel_values, interpolate_pos_encoding, None)
        prompt = self._prompt(of(seen.pooler_output), input_ids, attention_mask, inputs_embeds)
        rows, lengths, _ = prompt.packed()
        language: Any = self.language_model
        writes_alone = isinstance(language, T5)
        asked = generation.plan(
            options,
            _values(generation_config),
            self.generation_config.to_dict(),
            {name: getattr(self.config.text_config, name, None) for name in ("eos_token_id", "pad_token_id")},
            begun=1 if writes_alone else (prompt.embeds if prompt.ids is None else prompt.ids).shape[1],
            room=language.context - int(lengths.max()),
        )
        said = None if writes_alone else prompt.said()
        method, limits = asked.decoding.method, asked.decoding.limits
        found = generate.generate(language, rows, lengths, method, limits, asked.stop_ids, said=said)
        before = prompt.ids
        if writes_alone:
            before = torch.full((len(rows), 1), language.start_id, device=rows.device)
        return generation.laid_out(found, before, asked, rows.device)


def random(config: Blip2Config, *, retrieves: bool = False) -> Blip2:
    """A model of a configuration, its weights as they are drawn."""
    ours = config.ours(retrieves=retrieves)
    assert isinstance(ours.vision, VisionConfig)
    language = None if retrieves else format.build_language(cast("Any", ours.language))
    encoder = VisionTransformer(ours.vision)
    return Blip2(ours, encoder, Bridge(ours), language, None, None, torch.device("cpu"))


def _values(config: Any) -> Mapping[str, Any]:
    if config is None or isinstance(config, Mapping):
        return config or {}
    return config.to_dict()
