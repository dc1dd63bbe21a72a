"""LoRA on the frozen language model, made by PEFT: what of it is trained, and how it is saved.

Source: Hu et al. 2021.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from blip2.errors import ConfigError, MissingExtraError
from blip2.files import replacing
from blip2.train.sections import LoRA
from blip2.weights import adapter


@dataclass(frozen=True)
class Adapter:
    """An adapter within a language model.

    Attributes:
        body: the module that its names count from.
        config: PEFT's, as its file holds it.
        changed: names of the linear layers that it changes.
    """

    body: nn.Module
    config: dict[str, Any]
    changed: tuple[str, ...]

    def layers(self) -> dict[str, nn.Module]:
        """What of it is trained, by name."""
        return {name: part for name, part in self.body.named_modules() if name.endswith((".lora_A", ".lora_B"))}

    def save(self, directory: Path) -> None:
        """PEFT's two files; `adapter.merge` and PEFT itself read them."""
        directory.mkdir(parents=True, exist_ok=True)
        state = {
            f"{adapter.PREFIX}{name}.weight": matrix.detach().cpu().contiguous()
            for name, layer in self.layers().items()
            for matrix in layer.parameters()
        }
        with replacing(directory / adapter.WEIGHTS) as partial:
            save_file(state, partial, {"format": "pt"})
        with replacing(directory / adapter.CONFIG) as partial:
            partial.write_text(json.dumps(self.config, indent=2, sort_keys=True) + "\n")


def inject(language: object, lora: LoRA) -> Adapter:
    """Give a frozen language model an adapter that changes nothing yet, its matrices float32 and trainable.

    Raises:
        ConfigError: a target fits no linear layer, or the model is no torch module.
        MissingExtraError: PEFT is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise MissingExtraError("LoRA", "peft") from error
    if not isinstance(language, nn.Module):
        raise ConfigError("lora: this language model is no torch module; leave it out")
    body = adapter.body(language)
    changed = _targets(body, lora)
    config = peft.LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=list(changed))  # pyright: ignore[reportArgumentType]  (a float scales too)
    peft.inject_adapter_in_model(config, body)
    made = Adapter(body, {**config.to_dict(), "peft_type": "LORA", "target_modules": list(changed)}, changed)
    for layer in made.layers().values():
        layer.to(torch.float32)  # what is trained stays exact beside weights in half precision
    return made


def _targets(body: nn.Module, lora: LoRA) -> tuple[str, ...]:
    """Names of the linear layers that the patterns fit, the head's aside."""
    heads = {id(part) for name in ("head", "lm_head") if (part := getattr(body, name, None)) is not None}
    names = [name for name, part in body.named_modules() if isinstance(part, nn.Linear) and id(part) not in heads]
    for pattern in lora.targets:
        if not any(fnmatchcase(name, pattern) for name in names):
            some = ", ".join(names[:3]) or "not there at all"
            raise ConfigError(f"lora.targets: {pattern!r} fits no linear layer; they are called like {some}")
    return tuple(name for name in names if any(fnmatchcase(name, pattern) for pattern in lora.targets))
