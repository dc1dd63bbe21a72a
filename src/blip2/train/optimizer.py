"""AdamW's parameters in groups, and the choice of which parameters train at all."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase

import torch
from torch import nn

from blip2.errors import ConfigError
from blip2.train.recipe import Recipe

_BLOCK = re.compile(r"vision\.blocks\.(\d+)\.")


def choose(module: nn.Module, recipe: Recipe) -> dict[str, nn.Parameter]:
    """The parameters that the recipe trains, by name; the others no longer ask for a gradient.

    Raises:
        ConfigError: a pattern of `train`, `lr_scale` or `start_share` fits no parameter.
    """
    trainable = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    for key, patterns in _patterns(recipe):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in trainable):
                some = ", ".join(list(trainable)[:3])
                raise ConfigError(f"{key}: {pattern!r} fits no trainable parameter; they are named like {some}")
    for name, parameter in trainable.items():
        parameter.requires_grad_(any(fnmatchcase(name, pattern) for pattern in recipe.train))
    return {name: parameter for name, parameter in trainable.items() if parameter.requires_grad}


def start_shares(parameters: Iterable[str], recipe: Recipe) -> dict[str, float]:
    """How much of each parameter's weights at the start comes back, by name; without those that none does of."""
    shares = {name: _factor(name, recipe.start_share, 0.0) for name in parameters}
    return {name: share for name, share in shares.items() if share}


def _patterns(recipe: Recipe) -> Iterator[tuple[str, Iterable[str]]]:
    return ((key, getattr(recipe, key)) for key in ("train", "lr_scale", "start_share"))


def _factor(name: str, factors: Mapping[str, float], otherwise: float) -> float:
    return next((factor for pattern, factor in factors.items() if fnmatchcase(name, pattern)), otherwise)


def adamw(parameters: dict[str, nn.Parameter], recipe: Recipe) -> torch.optim.AdamW:
    """The optimizer: a group for each factor on the learning rate, with and without weight decay.

    Matrices decay, vectors do not; the temperature, a scalar, as the recipe says.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    blocks = 1 + max((int(found[1]) for name in parameters if (found := _BLOCK.match(name))), default=-1)
    for name, parameter in parameters.items():
        scale = _factor(name, recipe.lr_scale, 1.0)
        scale *= layer_decay(name, blocks, recipe.vision.layer_decay)
        decays = parameter.ndim > 1 or (parameter.ndim == 0 and recipe.decay_temperature)
        groups.setdefault((scale, decays), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": group, "scale": scale, "weight_decay": recipe.weight_decay if decays else 0.0}
            for (scale, decays), group in groups.items()
        ],
        lr=recipe.lr,
        betas=recipe.betas,
        fused=True,  # one pass over the weights, on a CPU too
    )


def layer_decay(name: str, blocks: int, decay: float) -> float:
    """The factor of a parameter's depth on its learning rate; 1 for what is not of the image encoder.

    Source: BLIP-2, appendix (fine-tuning); as in BEiT, Bao et al. 2022: the last of `blocks` blocks has the factor
    `decay`, each one below it once more, and the embeddings below them all.
    """
    if not name.startswith("vision."):
        return 1.0
    block = _BLOCK.match(name)
    return decay ** (blocks - int(block[1]) if block else blocks + 1)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The learning rate of the next update, times each group's factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]
