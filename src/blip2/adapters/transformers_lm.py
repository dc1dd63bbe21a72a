"""Any language model of transformers behind `protocols.LanguageModel`: decoder-only and encoder-decoder.

Letters: B rows, S prefix positions, T target positions, D width, V vocabulary, K a part of it.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip2.errors import ConfigError
from blip2.model.scoring import (
    PADDING,
    HeadRows,
    by_length,
    check_prefix,
    chosen_log_probs,
    first_of_each,
    packed,
    pick,
)

UNBOUNDED = 4096  # context where positions are relative and the configuration names no limit (T5, BLOOM)


class TransformersLM(nn.Module):
    """A frozen language model of transformers; satisfies `protocols.LanguageModel`.

    Args:
        model: with its language-model head, such as `Gemma3ForCausalLM` or `T5ForConditionalGeneration`. Its
            parameters are frozen and it stays in evaluation mode.
    Raises:
        ConfigError: the model has no output head, or computes its scores in a way that is not known here.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        if model.get_output_embeddings() is None:
            raise ConfigError(f"{type(model).__name__} has no language-model head; load it with one")
        self.model = model.requires_grad_(False)
        config = model.config.get_text_config(decoder=True)
        self._scale = _score_scale(config)
        self._softcap: float | None = getattr(config, "final_logit_softcapping", None)
        self._context = int(getattr(config, "max_position_embeddings", None) or UNBOUNDED)
        self._rows = HeadRows()
        self._body = _EncoderDecoder(model) if model.config.is_encoder_decoder else _DecoderOnly(model)
        self.train(False)
        self._check_scores()

    @property
    def width(self) -> int:
        """Width of an embedding."""
        return self.model.get_input_embeddings().weight.shape[1]

    @property
    def vocab_size(self) -> int:
        """Number of tokens that the head scores."""
        return self.model.get_output_embeddings().weight.shape[0]

    @property
    def context(self) -> int:
        """The most positions that prefix and text may fill together."""
        return self._context

    @property
    def encoder_decoder(self) -> bool:
        """Whether the prefix is read by an encoder of its own."""
        return isinstance(self._body, _EncoderDecoder)

    @property
    def start_id(self) -> int | None:
        """The token that every text of an encoder-decoder begins from."""
        return self._body.first if isinstance(self._body, _EncoderDecoder) else None

    def train(self, mode: bool = True) -> TransformersLM:  # noqa: ARG002
        """Stays in evaluation mode: the model is frozen, and dropout would disturb what is trained through it."""
        return super().train(False)

    def embed(self, ids: Tensor) -> Tensor:
        """Token embeddings as the first layer takes them: int64[...] to float[..., D]."""
        return self.model.get_input_embeddings()(ids)

    def prefill(self, prefix: Tensor, lengths: Tensor, vocabulary: Tensor | None = None) -> tuple[Tensor, Reading]:
        """Read the prefix once.

        Args:
            prefix: float[B, S, D], right-padded.
            lengths: int64[B], at least 1.
            vocabulary: int64[K], sorted: the head runs over these tokens only.
        Returns:
            float32[B, V or K], logits of the first new token, and the cache to go on from.
        Raises:
            PromptError: a row is empty.
        """
        hidden, cache = self._body.prefill(self._cast(prefix, lengths), lengths)
        return self._scores(hidden, vocabulary), cache

    def step(self, ids: Tensor, cache: Reading, vocabulary: Tensor | None = None) -> Tensor:
        """Read one more token a row, int64[B], into the cache; float32[B, V or K], logits of the next."""
        return self._scores(self._body.step(ids, cache), vocabulary)

    def log_probs(
        self,
        prefix: Tensor,
        lengths: Tensor,
        targets: Tensor,
        vocabulary: Tensor | None = None,
        alike: tuple[Tensor, int] | None = None,
    ) -> Tensor:
        """Log-probability of each target given the prefix and the targets before it, with gradient to `prefix`.

        The head runs at target positions only, and over `vocabulary` only: at 262,144 tokens it costs more than the
        layers below it.

        Args:
            prefix: float[B, S, D], right-padded.
            lengths: int64[B], at least 1.
            targets: int64[B, T], right-padded with -100.
            vocabulary: int64[K], sorted; every target must be in it.
            alike: owners int64[B], not falling, and how many positions the rows of one have in common: a decoder-only
                model reads them once for all.
        Returns:
            float32[B, T], 0 where the target is padding.
        Raises:
            PromptError: a row of the prefix is empty.
            ConfigError: a target is not in the vocabulary.
        """
        words, counts = targets.clamp(min=0), (targets != PADDING).sum(1)
        hidden = self._body.predict(self._cast(prefix, lengths), lengths, words, counts, alike)  # (B, T, D)
        return chosen_log_probs(hidden, targets, vocabulary, self.vocab_size, lambda x: self._scores(x, vocabulary))

    def _cast(self, prefix: Tensor, lengths: Tensor) -> Tensor:
        check_prefix(lengths)
        return prefix.to(self.model.get_input_embeddings().weight.dtype)

    def _scores(self, hidden: Tensor, vocabulary: Tensor | None = None) -> Tensor:
        """float[N, D] to float32[N, V or K]; a model in float64 keeps its precision."""
        head = self.model.get_output_embeddings()
        logits = (
            head(hidden) if vocabulary is None else F.linear(hidden, *self._rows(vocabulary, head.weight, head.bias))
        )
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * self._scale
        return logits if self._softcap is None else torch.tanh(logits / self._softcap) * self._softcap

    @torch.no_grad()
    def _check_scores(self) -> None:
        """Compare one position with the model's own logits: a scale unknown to `_score_scale` must not pass unseen."""
        prefix = self.embed(torch.zeros(1, 1, dtype=torch.long, device=self.model.device))
        start = self._body.start(prefix)
        expected = self.model(inputs_embeds=prefix, **start).logits[:, -1].float()
        ours, _ = self.prefill(prefix, torch.ones(1, dtype=torch.long, device=prefix.device))
        tolerance = 0.02 * expected.abs().max().item()  # half-precision rounding stays below; a missed factor does not
        if not torch.allclose(ours.float(), expected, rtol=0, atol=tolerance):
            raise ConfigError(f"{type(self.model).__name__} scales its logits in a way that blip2 does not know")


@dataclass
class Reading:
    """What a model has read; satisfies `protocols.Cache`.

    Attributes:
        states: transformers' cache of keys and values.
        mask: int64[B, L], 1 where what was read is real: of the decoder, or of the encoder where there is one.
        positions: int64[B], of the next token.
        encoded: float[B, S, D], the encoder's output; None for a decoder-only model.
    """

    states: Any
    mask: Tensor
    positions: Tensor
    encoded: Tensor | None = None

    def select(self, rows: Tensor) -> Reading:
        """The rows in a new order, int64[N]; what was read here stays as it is."""
        encoded = None if self.encoded is None else self.encoded.index_select(0, rows)
        return Reading(
            _select_states(self.states, rows),
            self.mask.index_select(0, rows),
            self.positions.index_select(0, rows),
            encoded,
        )

    @property
    def joins(self) -> bool:
        """Whether `join` can be: not of an encoder-decoder, nor where a layer keeps a window only."""
        layers = [] if self.encoded is not None else getattr(self.states, "layers", [])
        return bool(layers) and all(type(layer).__name__ == "DynamicLayer" for layer in layers)

    def join(self, other: Reading) -> Reading:
        """These rows and then those of another reading, padded on the left as prefixes are."""
        size = max(self.mask.shape[1], other.mask.shape[1])
        mask = torch.cat([F.pad(each.mask, (size - each.mask.shape[1], 0)) for each in (self, other)])
        states = copy.copy(self.states)
        states.layers = [copy.copy(layer) for layer in self.states.layers]
        for layer, theirs in zip(states.layers, other.states.layers, strict=True):
            layer.keys = torch.cat([_longer(layer.keys, size), _longer(theirs.keys, size)])
            layer.values = torch.cat([_longer(layer.values, size), _longer(theirs.values, size)])
        return Reading(states, mask, torch.cat([self.positions, other.positions]))


def _longer(x: Tensor, size: int) -> Tensor:
    """[B, A, S, d], padded on the left to so many positions."""
    return F.pad(x, (0, 0, size - x.shape[2], 0))


class _DecoderOnly:
    """Prefix and text are one sequence."""

    def __init__(self, model: Any) -> None:
        self._layers = model.base_model
        parameters = inspect.signature(self._layers.forward).parameters
        self._takes_positions = "position_ids" in parameters  # not where positions are relative (BLOOM)

    def start(self, prefix: Tensor) -> dict[str, Any]:  # noqa: ARG002
        return {}

    def prefill(self, prefix: Tensor, lengths: Tensor) -> tuple[Tensor, Reading]:
        # To the left: then the window of a sliding-attention layer counts real positions only.
        size = prefix.shape[1]
        positions = torch.arange(size, device=prefix.device) - (size - lengths)[:, None]  # (B, S), negative in padding
        mask = (positions >= 0).long()
        positions = positions.clamp(min=0)
        hidden, states = self._run(pick(prefix, positions), mask, positions, None)
        return hidden, Reading(states, mask, lengths)

    def step(self, ids: Tensor, cache: Reading) -> Tensor:
        cache.mask = F.pad(cache.mask, (0, 1), value=1)
        embeds = self._layers.get_input_embeddings()(ids[:, None])
        hidden, cache.states = self._run(embeds, cache.mask, cache.positions[:, None], cache.states)
        cache.positions = cache.positions + 1
        return hidden

    def _run(self, embeds: Tensor, mask: Tensor, positions: Tensor, states: Any) -> tuple[Tensor, Any]:
        extra = {"position_ids": positions} if self._takes_positions else {}
        output = self._layers(
            inputs_embeds=embeds, attention_mask=mask, past_key_values=states, use_cache=True, **extra
        )
        return output.last_hidden_state[:, -1], output.past_key_values

    def predict(
        self, prefix: Tensor, lengths: Tensor, words: Tensor, counts: Tensor, alike: tuple[Tensor, int] | None
    ) -> Tensor:
        """float[B, T, D], what each of the first words, int64[B, T] of which `counts` matter, is predicted from."""
        count = words.shape[1]
        rows = packed(prefix, lengths, self._layers.get_input_embeddings()(words[:, :-1]))  # (B, S + T - 1, D)
        ends = lengths + counts.clamp(min=1) - 1  # (B,) positions that have to be read
        places = lengths[:, None] - 1 + torch.arange(count, device=prefix.device)
        if alike is None or not self._takes_positions:
            hidden = by_length(ends, lambda some, end: self._read(rows[some, :end], {}))
        else:
            owners, common = alike
            hidden = self._continue(rows, ends, owners, common)
            places = places - (common - 1)
        return pick(hidden, places.clamp(max=hidden.shape[1] - 1))

    def _continue(self, rows: Tensor, ends: Tensor, owners: Tensor, common: int) -> Tensor:
        """float[B, L - common + 1, D]: what comes of the last position that rows of one owner share, and of the rest.

        Gradients add up in the shared keys and values.
        """
        first, which = first_of_each(owners)
        shared = self._layers(inputs_embeds=rows[first, :common], use_cache=True)

        def go_on(some: Tensor, length: int) -> Tensor:
            positions = torch.arange(common, common + length, device=rows.device).expand(len(some), -1)
            states = _select_states(shared.past_key_values, which[some])
            more = {"past_key_values": states, "position_ids": positions}
            return self._read(rows[some, common : common + length], more)

        rest = by_length(ends - common, go_on)
        return torch.cat([shared.last_hidden_state[which, -1:], rest], dim=1)

    def _read(self, embeds: Tensor, more: dict[str, Any]) -> Tensor:
        if not embeds.shape[1]:
            return embeds
        return self._layers(inputs_embeds=embeds, use_cache=bool(more), **more).last_hidden_state


class _EncoderDecoder:
    """The encoder reads the prefix, the decoder the text."""

    def __init__(self, model: Any) -> None:
        self._encoder, self._decoder = model.get_encoder(), model.get_decoder()
        config = model.config
        first = config.pad_token_id if config.decoder_start_token_id is None else config.decoder_start_token_id
        if first is None:
            raise ConfigError(f"{type(model).__name__}: its configuration needs decoder_start_token_id")
        self.first: int = first

    def start(self, prefix: Tensor) -> dict[str, Any]:
        return {"decoder_input_ids": self._starts(prefix)}

    def _starts(self, prefix: Tensor) -> Tensor:
        return torch.full((len(prefix), 1), self.first, device=prefix.device)

    def _encode(self, prefix: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        mask = (torch.arange(prefix.shape[1], device=prefix.device) < lengths[:, None]).long()
        return self._encoder(inputs_embeds=prefix, attention_mask=mask).last_hidden_state, mask

    def prefill(self, prefix: Tensor, lengths: Tensor) -> tuple[Tensor, Reading]:
        encoded, mask = self._encode(prefix, lengths)
        cache = Reading(None, mask, torch.zeros_like(lengths), encoded)
        return self.step(self._starts(prefix)[:, 0], cache), cache

    def step(self, ids: Tensor, cache: Reading) -> Tensor:
        output = self._decoder(
            input_ids=ids[:, None],
            encoder_hidden_states=cache.encoded,
            encoder_attention_mask=cache.mask,
            past_key_values=cache.states,
            use_cache=True,
        )
        cache.states = output.past_key_values
        cache.positions = cache.positions + 1
        return output.last_hidden_state[:, -1]

    def predict(
        self,
        prefix: Tensor,
        lengths: Tensor,
        words: Tensor,
        counts: Tensor,  # noqa: ARG002
        alike: tuple[Tensor, int] | None,  # noqa: ARG002
    ) -> Tensor:
        """float[B, T, D], what each of the words, int64[B, T], is predicted from."""
        encoded, mask = self._encode(prefix, lengths)
        return self._decoder(
            input_ids=torch.cat([self._starts(prefix), words[:, :-1]], dim=1),
            encoder_hidden_states=encoded,
            encoder_attention_mask=mask,
            use_cache=False,
        ).last_hidden_state


def _score_scale(config: Any) -> float:
    """What a family multiplies its logits by: T5's tied head, Cohere, Granite."""
    scale = config.d_model**-0.5 if getattr(config, "scale_decoder_outputs", False) else 1.0
    return scale * (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)


def _select_states(states: Any, rows: Tensor) -> Any:
    """A copy of transformers' cache with these rows; its own method changes the layers in place."""
    chosen = copy.copy(states)
    if hasattr(states, "cross_attention_cache"):
        chosen.self_attention_cache = _select_states(states.self_attention_cache, rows)
        chosen.cross_attention_cache = _select_states(states.cross_attention_cache, rows)
        chosen.is_updated = dict(states.is_updated)
        return chosen
    chosen.layers = [copy.copy(layer) for layer in states.layers]
    chosen.reorder_cache(rows)
    return chosen
