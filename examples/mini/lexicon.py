"""The words that the rules know, from `lexicon.yaml`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml


def _split(value: Any) -> Any:
    """Values are words parted by spaces; `_` stands for a space within one."""
    if isinstance(value, str):
        return [word.replace("_", " ") for word in value.split()]
    return {key: _split(inner) for key, inner in value.items()}


LEXICON: dict[str, Any] = _split(yaml.safe_load((Path(__file__).parent / "lexicon.yaml").read_text(encoding="utf-8")))
