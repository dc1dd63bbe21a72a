"""`generate`'s arguments as `Decoding`, and its rows of ids as transformers lays them out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from blip2.compat.transformers.outputs import GenerateOutput
from blip2.decoding import Decoding
from blip2.errors import ConfigError
from blip2.generate import Tokens

NEW_TOKENS = 20  # where nobody says how many
DEFAULTS: Mapping[str, Any] = {
    "num_beams": 1, "do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0, "length_penalty": 1.0, "early_stopping": False, "num_return_sequences": 1,
    "max_length": None, "max_new_tokens": None, "min_length": 0, "min_new_tokens": None, "eos_token_id": None,
    "pad_token_id": None, "return_dict_in_generate": False,
}  # fmt: skip
# What changes no text, or what the model's own configuration says already.
WITHOUT_EFFECT = frozenset(
    (
        "use_cache", "synced_gpus", "cache_implementation", "transformers_version", "_from_model_config",
        "bos_token_id",
        "decoder_start_token_id", "num_assistant_tokens", "num_assistant_tokens_schedule", "disable_compile",
        "assistant_confidence_threshold", "assistant_lookbehind", "target_lookbehind",
    )
)  # fmt: skip
# What blip2 has not, and the value at which it does nothing.
NEUTRAL: Mapping[str, Any] = {
    "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "encoder_repetition_penalty": 1.0, "num_beam_groups": 1,
    "encoder_no_repeat_ngram_size": 0, "diversity_penalty": 0.0, "output_scores": False, "output_logits": False,
    "output_attentions": False, "output_hidden_states": False, "remove_invalid_values": False, "token_healing": False,
    "renormalize_logits": False,
}  # fmt: skip


class GenerationConfig:
    """`generate`'s arguments as a value, of a model or of a call."""

    def __init__(self, **values: Any) -> None:
        for name, value in values.items():
            setattr(self, name, value)

    def __getattr__(self, name: str) -> Any:
        """What was not given has transformers' default."""
        if name in DEFAULTS:
            return DEFAULTS[name]
        raise AttributeError(name)

    def update(self, **values: Any) -> None:
        """Change some."""
        vars(self).update(values)

    def to_dict(self) -> dict[str, Any]:
        """Those that were given."""
        return dict(vars(self))


@dataclass(frozen=True)
class Plan:
    """One call of `generate`.

    Attributes:
        decoding: how tokens are chosen.
        stop_ids: tokens that end a text.
        pad: id that fills rows.
        as_dict: give a `GenerateOutput` instead of a tensor.
    """

    decoding: Decoding
    stop_ids: tuple[int, ...]
    pad: int
    as_dict: bool


def plan(*sources: Mapping[str, Any], begun: int, room: int) -> Plan:
    """What is asked for.

    Args:
        sources: arguments by name, the first that has one wins; None is as if it were not there.
        begun: positions that `max_length` and `min_length` count before the first new token.
        room: new tokens that the language model's context has left.
    Raises:
        ConfigError: an argument that blip2 does not have, by name, or that does not fit with another.
    """
    given: dict[str, Any] = {}
    for source in reversed(sources):
        given |= {name: value for name, value in source.items() if value is not None}
    for name, value in given.items():
        if name not in DEFAULTS and name not in WITHOUT_EFFECT and (name not in NEUTRAL or value != NEUTRAL[name]):
            raise ConfigError(f"generate: blip2 has no {name!r}; leave it out")
    asked = {**DEFAULTS, **given}
    most = _most(asked, begun, room)
    least = asked["min_new_tokens"]
    least = max(0, asked["min_length"] - begun) if least is None else least
    draws = bool(asked["do_sample"])
    decoding = Decoding(
        num_beams=asked["num_beams"],
        do_sample=draws,
        temperature=asked["temperature"] if draws else None,
        top_k=asked["top_k"] if draws else None,
        top_p=asked["top_p"] if draws else None,
        max_new_tokens=most,
        min_new_tokens=min(least, most),
        repetition_penalty=asked["repetition_penalty"],
        no_repeat_ngram=asked["no_repeat_ngram_size"],
        length_penalty=asked["length_penalty"],
        early_stopping=asked["early_stopping"],
        num_captions=asked["num_return_sequences"],
    )
    ends = asked["eos_token_id"]
    stops = [] if ends is None else list(ends) if isinstance(ends, list | tuple) else [int(ends)]
    pad = asked["pad_token_id"]
    if pad is None:
        pad = stops[0] if stops else 0
    return Plan(decoding, tuple(stops), int(pad), bool(asked["return_dict_in_generate"]))


def _most(asked: Mapping[str, Any], begun: int, room: int) -> int:
    """How many new tokens at most."""
    if asked["max_new_tokens"] is not None:
        return asked["max_new_tokens"]
    if asked["max_length"] is None:
        return min(NEW_TOKENS, max(1, room))  # a full context is the engine's error to tell
    if asked["max_length"] <= begun:
        raise ConfigError(
            f"max_length is {asked['max_length']}, and the prompt has {begun} positions already, the image's among "
            "them: use max_new_tokens"
        )
    return asked["max_length"] - begun


def laid_out(found: Sequence[Sequence[Tokens]], before: Tensor | None, asked: Plan, device: torch.device) -> Any:
    """Rows as transformers gives them: what stands before, then the new tokens with the ending one, then padding.

    Args:
        found: `num_return_sequences` texts for each of B prompts.
        before: int64[B, S], a prompt's ids or an encoder-decoder's first token; None for nothing.
    Returns:
        int64[B * num_return_sequences, T], or a `GenerateOutput` of it.
    """
    texts = [text for row in found for text in row]
    new = [[*text.ids, *([] if text.end is None else [text.end])] for text in texts]
    width = max(map(len, new))
    rows = torch.tensor([[*ids, *[asked.pad] * (width - len(ids))] for ids in new], device=device)
    if before is not None:
        rows = torch.cat([before.repeat_interleave(asked.decoding.num_captions, 0), rows], dim=1)
    if not asked.as_dict:
        return rows
    scores = torch.tensor([text.score for text in texts], device=device) if asked.decoding.num_beams > 1 else None
    return GenerateOutput(rows, scores)
