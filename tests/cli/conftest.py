"""The tiny model behind `blip2.load`, so that commands run as a user's do, in milliseconds."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from PIL import Image

import blip2
import tiny_model
from blip2.blip2 import Blip2


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Blip2:
    """The tiny model, which `blip2.load` gives, whatever is asked for."""
    tiny = dataclasses.replace(tiny_model.build(), identity="tiny")
    monkeypatch.setattr(blip2, "load", lambda *_, **__: tiny)  # first: its old value is looked up in the other's module
    monkeypatch.setattr("blip2.loading.load", lambda *_, **__: tiny)
    return tiny


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with `photo.jpg` and a folder `holiday/` of three pictures."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "holiday").mkdir()
    for seed, place in enumerate(("photo.jpg", "holiday/a.jpg", "holiday/b.jpg", "holiday/c.jpg")):
        Image.fromarray(tiny_model.picture(seed)).save(tmp_path / place)
    return tmp_path
