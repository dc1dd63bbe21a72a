"""What every model here has in common, and the two parts that may also stand alone: image encoder and Q-Former.

Letters: B rows, N positions, P patches, Q queries, D width.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from threading import get_ident
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from blip2.blip2 import Blip2
from blip2.compat.transformers import places
from blip2.compat.transformers.configuration import Blip2Config, Blip2QFormerConfig, Blip2VisionConfig
from blip2.compat.transformers.outputs import BaseModelOutputWithPooling, ModelOutput
from blip2.config import VisionConfig
from blip2.errors import ConfigError, PromptError
from blip2.files import replacing
from blip2.model.qformer import QFormer
from blip2.model.t5 import T5
from blip2.model.vision import VisionTransformer
from blip2.packed import plain_weights
from blip2.weights import transformers as format


class PreTrainedModel(nn.Module):
    """A module with a configuration, loaded by `from_pretrained`."""

    main_input_name: ClassVar = "pixel_values"
    config: Any

    @property
    def device(self) -> torch.device:
        """Of the first weight."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the frozen parts: of the first weight."""
        return next(self.parameters()).dtype

    def num_parameters(self, only_trainable: bool = False) -> int:
        """How many numbers the weights hold."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not only_trainable)


def opened(name: str | Path, **words: Any) -> tuple[Blip2Config, Blip2]:
    """A whole model from a directory or a name on the hub, and its configuration; `words` as of `places.load`."""
    model, values, _ = places.load(name, **words)
    return Blip2Config.from_dict(values), model


@contextmanager
def recorded(layers: nn.ModuleList, wanted: bool | None) -> Generator[list[Tensor]]:
    """What enters the first of some layers within, and what leaves each; empty where nobody wants it."""
    states: list[Tensor] = []
    here = get_ident()  # another thread's call goes through the same layers

    def entering(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        del module
        if get_ident() == here:
            states.append(inputs[0])

    def leaving(module: nn.Module, inputs: object, output: Tensor) -> None:
        del module, inputs
        if get_ident() == here:
            states.append(output)

    hooks: list[Any] = []
    if wanted:
        hooks = [layers[0].register_forward_pre_hook(entering)]
        hooks += [layer.register_forward_hook(leaving) for layer in layers]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()


def given(output: ModelOutput, return_dict: bool | None) -> Any:
    """An output as it is asked for: itself, or a tuple where `return_dict` is False."""
    return output.to_tuple() if return_dict is False else output


def refuse_attentions(wanted: Any) -> None:
    """Raises ConfigError where attention weights are asked for."""
    if wanted:
        raise ConfigError("output_attentions: attention is computed without keeping its weights; leave it out")


class Blip2VisionModel(PreTrainedModel):
    """The image encoder with the norm after it.

    Args:
        parts: encoder and norm of a loaded model; random ones of the configuration where None.
    """

    config: Blip2VisionConfig

    def __init__(
        self, config: Blip2VisionConfig | None = None, parts: tuple[VisionTransformer, nn.LayerNorm] | None = None
    ) -> None:
        super().__init__()
        self.config = config or Blip2VisionConfig()
        if parts is None:
            made = Blip2Config(vision_config=self.config).ours().vision
            assert isinstance(made, VisionConfig)
            parts = VisionTransformer(made), nn.LayerNorm(made.width, made.norm_eps)
        self.transformer, self.post_layernorm = parts

    @classmethod
    def from_pretrained(cls, name: str | Path, **words: Any) -> Self:
        """Of a whole model; transformers itself draws random weights there and says so in a table."""
        config, model = opened(name, **words)
        assert isinstance(model.encoder, VisionTransformer)
        return cls(config.vision_config, (model.encoder, model.bridge.vision_norm)).eval()

    def forward(
        self,
        pixel_values: Tensor,
        interpolate_pos_encoding: bool | None = False,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        output_attentions: bool | None = None,
    ) -> Any:
        """Patch features after the norm.

        Args:
            pixel_values: float[B, 3, H, W]; H and W as configured, or any where positions are interpolated.
        Returns:
            `last_hidden_state` float[B, P, D], `pooler_output` float[B, D]; `hidden_states` before the norm.
        Raises:
            ImageError: another size; transformers computes something, with the wrong positions.
        """
        refuse_attentions(output_attentions)
        weight = self.transformer.patch_embedding.weight
        with recorded(self.transformer.blocks, output_hidden_states) as states:
            patches = self.transformer(pixel_values.to(weight.dtype), resized=bool(interpolate_pos_encoding))
        last = self.post_layernorm(patches.to(self.post_layernorm.weight.dtype))
        pooled = self.post_layernorm(last[:, 0])  # normed twice, as in transformers and EVA before it
        found = BaseModelOutputWithPooling(last, pooled, hidden_states=tuple(states) or None)
        return given(found, return_dict)


class Blip2QFormerModel(PreTrainedModel):
    """The Q-Former on any embeddings.

    Args:
        transformer: of a loaded model; a random one of the configuration where None.
    """

    config: Blip2QFormerConfig

    def __init__(self, config: Blip2QFormerConfig | None = None, transformer: QFormer | None = None) -> None:
        super().__init__()
        self.config = config or Blip2QFormerConfig()
        beside = {"hidden_size": self.config.encoder_hidden_size, "num_attention_heads": 1}
        whole = Blip2Config(vision_config=beside, qformer_config=self.config)
        self.transformer = transformer or QFormer(whole.ours(retrieves=self.config.use_qformer_text_input).qformer)

    @classmethod
    def from_pretrained(cls, name: str | Path, **words: Any) -> Self:
        """Of a whole model."""
        config, model = opened(name, **words)
        return cls(config.qformer_config, model.bridge.qformer).eval()

    def forward(
        self,
        query_embeds: Tensor,
        query_length: int | None = None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        output_attentions: bool | None = None,
    ) -> Any:
        """Hidden states of queries and text.

        Args:
            query_embeds: float[B, N, D], not normed yet: queries first, then the embeddings of a text.
            query_length: how many are queries; all where None.
            attention_mask: [B, N], 0 where a position is padding.
            encoder_hidden_states: float[B, P, E], normed patches; None where nothing looks at an image.
        Returns:
            `last_hidden_state` float[B, N, D], `pooler_output` float[B, D].
        Raises:
            ConfigError: a mask over the patches: an image has no padding.
        """
        refuse_attentions(output_attentions)
        if encoder_attention_mask is not None and not bool(encoder_attention_mask.all()):
            raise ConfigError("encoder_attention_mask: an image has no padding; leave it out")
        qformer = self.transformer
        embeds = query_embeds.to(qformer.norm.weight.dtype)
        real = embeds.new_ones(embeds.shape[:2]) if attention_mask is None else attention_mask
        sight = None if encoder_hidden_states is None else qformer.see(encoder_hidden_states.to(embeds.dtype))
        queries = embeds.shape[1] if query_length is None else query_length
        with recorded(qformer.layers, output_hidden_states) as states:
            hidden = qformer.through(qformer.dropout(qformer.norm(embeds)), queries, real.bool(), sight)
        found = BaseModelOutputWithPooling(hidden, hidden[:, 0], hidden_states=tuple(states) or None)
        return given(found, return_dict)

    def embeddings(self, ids: Tensor, positions: Tensor | None = None) -> Tensor:
        """Words and positions of a text, int64[B, T]: float[B, T, D], not normed yet.

        Raises:
            PromptError: an id that the Q-Former does not know, or more of them than it has positions.
        """
        qformer = self.transformer
        where = torch.arange(ids.shape[1], device=ids.device) if positions is None else positions
        words, longest = qformer.words.num_embeddings, qformer.positions.num_embeddings
        if int(ids.max()) >= words:
            raise PromptError(f"input_ids hold {int(ids.max())}, and the Q-Former has {words} tokens")
        if int(where.max()) >= longest:
            raise PromptError(f"a text of {ids.shape[1]} tokens, and the Q-Former has {longest} positions: cut it")
        return qformer.words(ids) + qformer.positions(where)


class Seeing(PreTrainedModel):
    """A model that begins with an image: encoder and Q-Former, and the way from pixels to queries."""

    config: Blip2Config

    def __init__(self, config: Blip2Config, model: Blip2) -> None:
        super().__init__()
        assert isinstance(model.encoder, VisionTransformer)
        self.config = config
        self.vision_model = Blip2VisionModel(config.vision_config, (model.encoder, model.bridge.vision_norm))
        self.qformer = Blip2QFormerModel(config.qformer_config, model.bridge.qformer)
        self._model = model

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What `to`, `half`, `cuda` and the like stand on; the bridge keeps computing in float32."""
        super()._apply(fn, recurse)
        self._model.bridge.float()
        weight = next(self.vision_model.parameters())
        if weight.dtype == torch.float16 and isinstance(self._model.language, T5):
            self._model.language.half_safe()
        self._model = dataclasses.replace(self._model, device=weight.device, dtype=weight.dtype)
        return self

    def save_pretrained(self, directory: str | Path, **words: Any) -> None:
        """Write what `from_pretrained` reads, here and in transformers.

        Raises:
            CheckpointError: it cannot be written.
        """
        places.refuse(words, "save_pretrained")
        place = Path(directory)
        with plain_weights(self):
            format.save(self._model, place)
        written = format.read_json(place / "config.json")
        same = {name: written[name] for name in ("architectures", "dtype")}  # of the weights as they are now
        with replacing(place / "config.json") as partial:
            partial.write_text(json.dumps({**self.config.to_dict(), **same}, indent=2, sort_keys=True) + "\n")

    @property
    def query_tokens(self) -> Tensor:
        """The learned queries, float[1, Q, D]."""
        return self.qformer.transformer.query_tokens

    def look(
        self, pixel_values: Tensor, interpolate: bool | None, states: bool | None
    ) -> tuple[BaseModelOutputWithPooling, BaseModelOutputWithPooling]:
        """Patches and queries of pictures, float[B, 3, H, W]."""
        seen: BaseModelOutputWithPooling = self.vision_model(pixel_values, interpolate, states)
        assert seen.last_hidden_state is not None
        queries = self.query_tokens.expand(len(pixel_values), -1, -1)
        return seen, self.qformer(queries, encoder_hidden_states=seen.last_hidden_state, output_hidden_states=states)


def of(value: Tensor | None) -> Tensor:
    """A tensor that is there."""
    assert value is not None
    return value


def cast_to(tensor: Tensor, layer: nn.Module) -> Tensor:
    """A tensor in the precision of a layer's weights."""
    return tensor.to(next(layer.parameters()).dtype)
