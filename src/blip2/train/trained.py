"""What a run may change, as one module: the bridge, and if the recipe says so the image encoder and LoRA's layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

from torch import nn

from blip2.model.bridge import Bridge


class Trained(nn.Module):
    """Its parameters have the names that recipes and checkpoints know them by.

    Those of the bridge have the bridge's own, those of the image encoder begin with `vision.`, LoRA's with `language.`.

    Args:
        vision: the image encoder where it is trained.
        lora: the language model's layers that are trained, by their names in it.
    """

    def __init__(
        self, bridge: Bridge, vision: nn.Module | None = None, lora: Mapping[str, nn.Module] | None = None
    ) -> None:
        super().__init__()
        self._bridge = (bridge,)  # within a tuple: its parts stand here themselves
        for name, part in bridge.named_children():
            self.add_module(name, part)
        if vision is not None:
            self.add_module("vision", vision)
        for name, layer in (lora or {}).items():
            _place(self, f"language.{name}", layer)

    def train(self, mode: bool = True) -> Self:
        """The bridge itself knows it too."""
        self._bridge[0].train(mode)
        return super().train(mode)


def _place(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module where a path of names says, with empty ones on the way."""
    *folders, last = path.split(".")
    for name in folders:
        if not hasattr(root, name):
            root.add_module(name, nn.Module())
        root = root.get_submodule(name)
    root.add_module(last, module)
