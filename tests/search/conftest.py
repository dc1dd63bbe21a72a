from __future__ import annotations

from pathlib import Path

import pytest
from pictures import rainbow


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of twelve pictures, with a cache directory of its own beside it."""
    monkeypatch.setenv("BLIP2_CACHE", str(tmp_path / "cache"))
    return rainbow(tmp_path / "photos")
