"""Prompts: the queries in their places among the words, and what the language model says at every position.

Letters: B rows, N images, Q queries, S positions, T target positions, D width of the language model, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from blip2.compat.transformers.modules import of, recorded
from blip2.compat.transformers.outputs import LanguageModelOutput
from blip2.errors import ConfigError, PromptError
from blip2.model.decoder import Decoder
from blip2.model.scoring import PADDING, pick
from blip2.model.t5 import T5


@dataclass(frozen=True)
class Prompt:
    """What a language model reads.

    Attributes:
        embeds: float[B, S, D].
        mask: bool[B, S], False where a position is padding, wherever in the row that is.
        ids: int64[B, S], None where embeddings were given; of an older model without the queries before them.
    """

    embeds: Tensor
    mask: Tensor
    ids: Tensor | None

    def packed(self) -> tuple[Tensor, Tensor, Tensor]:
        """The real positions of each row side by side: float[B, S, D], lengths int64[B], and where each came from."""
        order = (~self.mask).long().argsort(dim=1, stable=True)
        return pick(self.embeds, order), self.mask.sum(1), order

    def said(self) -> Tensor | None:
        """The real ids of each row, int64[B, S], those of short rows after copies of their first; None without ids."""
        if self.ids is None:
            return None
        mask = self.mask[:, -self.ids.shape[1] :]  # an older model's queries have no ids
        order = mask.long().argsort(dim=1, stable=True)  # padding first
        first = self.ids.gather(1, mask.long().argmax(1, keepdim=True))
        return torch.where(mask.gather(1, order), self.ids.gather(1, order), first)


def build(
    language: Any,
    visual: Tensor,
    token: int | None,
    ids: Tensor | None,
    mask: Tensor | None,
    embeds: Tensor | None,
    *,
    older: bool = False,
) -> Prompt:
    """The queries among the words.

    Args:
        visual: float[N, Q, D], the images' queries, projected.
        token: id of the placeholder, None where there is none.
        ids: int64[B, S]; several images may stand in one row.
        mask: [B, S], 0 where a position is padding; all are real where None.
        embeds: float[B, S, D] instead of ids.
        older: the model's configuration has no placeholder: without one, the queries stand before the words.
    Raises:
        PromptError: the placeholders do not match the images and their queries; transformers takes as many as there
            are and says nothing.
    """
    if ids is not None and int(ids.max()) >= language.vocab_size:
        raise PromptError(f"input_ids hold {int(ids.max())}, and the language model has {language.vocab_size} tokens")
    words = language.embed(ids) if embeds is None else embeds
    shape = words.shape[:2]
    real = torch.ones(shape, dtype=torch.bool, device=words.device) if mask is None else mask.bool()
    if real.shape != shape:
        raise PromptError(f"attention_mask is {list(real.shape)}, the prompts are {list(shape)}")
    visual = visual.to(words.device, words.dtype)
    slots = _slots(language, token, ids, words) & real
    if older and not bool(slots.any()):
        if len(words) != len(visual):
            raise PromptError(f"{len(visual)} images and {len(words)} prompts: this model takes an image a prompt")
        return Prompt(torch.cat([visual, words], 1), torch.cat([real.new_ones(visual.shape[:2]), real], 1), ids)
    queries, counts = visual.shape[1], slots.sum(1)
    if int(counts.sum()) != len(visual) * queries or bool((counts % queries).any()):
        raise PromptError(
            f"the prompts have {counts.tolist()} image placeholders (id {token}), {len(visual)} images need {queries} "
            "each: let Blip2Processor fill them in, with images and text in one call"
        )
    return Prompt(words.masked_scatter(slots[..., None], visual), real, ids)


def _slots(language: Any, token: int | None, ids: Tensor | None, words: Tensor) -> Tensor:
    """Where placeholders stand, bool[B, S]."""
    if token is None or token >= language.vocab_size:
        return torch.zeros(words.shape[:2], dtype=torch.bool, device=words.device)
    if ids is not None:
        return ids == token
    return (words == language.embed(torch.tensor(token, device=words.device))).all(-1)


def read(language: Decoder, prompt: Prompt, states: bool | None) -> LanguageModelOutput:
    """Logits of a decoder-only model at every position; zeros where padding is."""
    rows, lengths, order = prompt.packed()
    with recorded(language.layers, states) as found:  # pyright: ignore[reportArgumentType]
        last, _ = language.read(rows, lengths)
    back = order.argsort(1)
    real = prompt.mask[..., None]
    hidden = [pick(each, back) * real for each in [*found[:-1], last]]
    return LanguageModelOutput(logits=language.logits(hidden[-1]), hidden_states=tuple(hidden) if states else None)


def answer(language: T5, prompt: Prompt, targets: Tensor, states: bool | None) -> LanguageModelOutput:
    """Logits of an encoder-decoder after each of the targets, int64[B, T]."""
    rows, lengths, order = prompt.packed()
    with recorded(language.encoder, states) as read:
        encoded = language.encode(rows, lengths)
    with recorded(language.decoder, states) as written:
        hidden = language.write(targets, language.remember(encoded, lengths))
    back = order.argsort(1)
    seen = [pick(each, back) * prompt.mask[..., None] for each in [*read[:-1], encoded]]
    found = LanguageModelOutput(logits=language.logits(hidden), encoder_last_hidden_state=seen[-1])
    if states:
        found.encoder_hidden_states, found.decoder_hidden_states = tuple(seen), (*written[:-1], hidden)
    return found


def respond(language: Any, prompt: Prompt, words: dict[str, Any], states: bool | None) -> LanguageModelOutput:
    """What the language model says, and its loss where there are labels.

    Args:
        words: labels int64[B, T], -100 where nothing is learnt; for an encoder-decoder decoder_input_ids int64[B, T]
            instead, or besides.
    """
    labels: Tensor | None = words.get("labels")
    if not isinstance(language, T5):
        found = read(language, prompt, states)
        if labels is not None:
            found.logits = of(found.logits)[:, -labels.shape[1] :]
            found.loss = _loss(found.logits[:, :-1], labels[:, 1:])
        return found
    targets: Tensor | None = words.get("decoder_input_ids")
    mask: Tensor | None = words.get("decoder_attention_mask")
    if mask is not None and bool((mask[:, 1:] > mask[:, :-1]).any()):
        raise ConfigError("decoder_attention_mask: targets are padded on the right only")
    if targets is None and labels is None:
        raise ConfigError("an encoder-decoder needs decoder_input_ids or labels: what the logits come after")
    if targets is None:
        start = of(labels).new_full((len(of(labels)), 1), language.start_id)
        targets = torch.cat([start, of(labels)[:, :-1].clamp(min=0)], dim=1)
    found = answer(language, prompt, targets, states)
    found.loss = None if labels is None else _loss(of(found.logits), labels)
    return found


def features(language: Any, ids: Tensor, mask: Tensor | None, states: bool | None) -> tuple[Tensor, Any]:
    """Hidden states of words alone, float[B, S, D], and those of all layers where asked for."""
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    prompt = Prompt(language.embed(ids), real, ids)
    rows, lengths, order = prompt.packed()
    layers = language.encoder if isinstance(language, T5) else language.layers
    with recorded(layers, states) as found:
        last = (
            language.encode(rows, lengths)
            if isinstance(language, T5)
            else cast("Decoder", language).read(rows, lengths)[0]
        )
    back = order.argsort(1)
    hidden = [pick(each, back) * real[..., None] for each in [*found[:-1], last]]
    return hidden[-1], tuple(hidden) if states else None


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.to(logits.device).flatten(), ignore_index=PADDING)
