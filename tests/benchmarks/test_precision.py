"""The report of every precision against float32, at a tiny size."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import geometry, precision
from benchmarks.exactness import TINY


def test_every_precision_is_near_float32_and_float32_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(precision, "PRECISIONS", {"float32": {"dtype": "float32"}, **precision.PRECISIONS})
    geometry.write(TINY, tmp_path)
    found = precision.report(tmp_path, precision.pictures_of(None, 2), list(precision.PRECISIONS))
    assert found.pop("float32") == {"same captions": 1.0, "same word": 1.0, "KL": 0.0, "largest KL": 0.0}
    assert set(found) == {"bfloat16", "int8", "int8, bfloat16", "fp8", "int4"}
    for line in found.values():
        assert 0 < line["KL"] <= line["largest KL"] < 0.1  # weights are tiny: no precision moves a word by much


def test_pictures_come_from_a_folder_or_are_noise(tmp_path: Path):
    noise = precision.pictures_of(None, 3)
    assert len({each.tobytes() for each in noise}) == 3
    noise[0].save(tmp_path / "one.jpg")
    assert [each.size for each in precision.pictures_of(tmp_path, 5)] == [(320, 240)]


def test_a_geometry_is_shortened_in_both_towers():
    short = geometry.shortened(TINY, 1)
    assert short.vision.layers == short.language.layers == 1
    assert geometry.shortened(TINY, None) is TINY
