"""BLIP-2: captions, answers, chat, matching, search and training, from any frozen image encoder and language model.

```python
import blip2

model = blip2.load()
model.caption("photo.jpg")
model.ask("photo.jpg", "what is the dog doing?")
model.match("photo.jpg", ["a dog on a beach", "a red car"]).itm
```

The names below are imported when they are first used: `import blip2` alone does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blip2.blip2 import Blip2
    from blip2.chat import Chat
    from blip2.config import PRESETS, Blip2Config
    from blip2.errors import (
        Blip2Error,
        CheckpointError,
        ConfigError,
        DataError,
        ImageError,
        MissingExtraError,
        PromptError,
    )
    from blip2.loading import load
    from blip2.results import Classification, Generation, ImageFeatures, Matches, Ranking
    from blip2.search import ImageIndex

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "Blip2",
    "Blip2Config",
    "Blip2Error",
    "Chat",
    "CheckpointError",
    "Classification",
    "ConfigError",
    "DataError",
    "Generation",
    "ImageError",
    "ImageFeatures",
    "ImageIndex",
    "Matches",
    "MissingExtraError",
    "PromptError",
    "Ranking",
    "__version__",
    "load",
]

_HOMES = {
    "blip2.blip2": ("Blip2",),
    "blip2.chat": ("Chat",),
    "blip2.config": ("PRESETS", "Blip2Config"),
    "blip2.errors": (
        "Blip2Error",
        "CheckpointError",
        "ConfigError",
        "DataError",
        "ImageError",
        "MissingExtraError",
        "PromptError",
    ),
    "blip2.loading": ("load",),
    "blip2.results": ("Classification", "Generation", "ImageFeatures", "Matches", "Ranking"),
    "blip2.search": ("ImageIndex",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'blip2' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
