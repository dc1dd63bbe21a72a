"""`state_dict` and `load_state_dict` under transformers' names, over modules of ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from blip2.weights.rules import Rule


def speak(module: nn.Module, places: Mapping[str, str], rules: Sequence[Rule], beside: Sequence[str]) -> None:
    """Make a module speak transformers' names, also where it is a part of another.

    Args:
        places: where our parts lie in the module: `vision.` is `vision_model.transformer.`, say.
        rules: from transformers' names to ours.
        beside: names that a state may hold beside, copies of tied weights.
    """
    here = [Rule(tuple(_placed(name, places) for name in rule.ours), rule.theirs, rule.operation) for rule in rules]

    def theirs(module: nn.Module, state: dict[str, Any], prefix: str, metadata: object) -> None:
        del module, metadata
        for rule in here:
            if all(prefix + name in state for name in rule.ours):
                made = rule.operation.split(_taken(state, prefix, rule.ours))
                state.update({prefix + name: part for name, part in zip(rule.theirs, made, strict=True)})

    def ours(module: nn.Module, state: dict[str, Any], prefix: str, *others: object) -> None:
        del module, others
        for name in beside:
            state.pop(prefix + name, None)
        for rule in here:
            if all(prefix + name in state for name in rule.theirs):
                made = rule.operation.join(_taken(state, prefix, rule.theirs))
                state.update({prefix + name: part for name, part in zip(rule.ours, made, strict=True)})

    module.register_state_dict_post_hook(theirs)
    module.register_load_state_dict_pre_hook(ours)


def _taken(state: dict[str, Any], prefix: str, names: Sequence[str]) -> list[Tensor]:
    return [state.pop(prefix + name) for name in names]


def _placed(name: str, places: Mapping[str, str]) -> str:
    """Our name of a tensor as the module has it."""
    for ours, place in places.items():
        if name.startswith(ours):
            return place + name.removeprefix(ours)
    return name
