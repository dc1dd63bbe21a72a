"""What a processor gives: tensors by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from blip2.errors import ConfigError, PromptError


class BatchFeature(dict[str, Any]):
    """A mapping whose values are attributes too, and go to a device together."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    @property
    def data(self) -> dict[str, Any]:
        """The values as a plain dict."""
        return dict(self)

    def to(self, *places: Any, device: Any = None, dtype: torch.dtype | None = None, **options: Any) -> BatchFeature:
        """All tensors on a device; those of floats in a precision besides. In any order, as in `Tensor.to`."""
        for place in places:
            if isinstance(place, torch.dtype):
                dtype = place
            elif place is not None:
                device = place
        for name, value in self.items():
            if isinstance(value, Tensor):
                kind = dtype if value.is_floating_point() else None
                self[name] = value.to(device=device, dtype=kind, **options)
        return self

    def tensors(self, kind: str | None) -> BatchFeature:
        """The lists among the values as tensors (`pt`), arrays (`np`), or as they are (None).

        Raises:
            PromptError: rows are of different lengths.
            ConfigError: another kind.
        """
        if kind is None:
            return self
        if kind not in ("pt", "np"):
            raise ConfigError(f"return_tensors {kind!r}: blip2 gives 'pt', 'np' or, with None, lists")
        for name, value in self.items():
            if isinstance(value, list) and len({len(row) for row in value if isinstance(row, list)}) > 1:
                raise PromptError(f"{name}: the texts are of different lengths; pass padding=True")
            if kind == "pt":
                self[name] = value if isinstance(value, Tensor) else torch.tensor(value)
            else:
                self[name] = value.numpy() if isinstance(value, Tensor) else np.asarray(value)
        return self
