"""The model card beside a saved model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from blip2.config import PRESETS, PartConfig
from blip2.weights import card
from blip2.weights.inventory import parts_of
from blip2.weights.notices import NOTICES, UNKNOWN, notice


@pytest.mark.parametrize("name", PRESETS)
def test_a_card_names_every_part_with_its_licence_and_risks(name: str):
    text = card.card(PRESETS[name])
    for part in parts_of(PRESETS[name]):
        assert part.notice is not UNKNOWN
        row = next(line for line in text.splitlines() if line.startswith(f"| {part.role} "))
        assert f"{part.parameters:,}" in row
        assert part.notice.licence in row
        assert f"**{part.name}**: {part.notice.risks}" in text
    assert re.search(r"\| float32 \| \d+\.\d\d \| \d+\.\d\d \| \d+\.\d\d \|", text)


def test_every_notice_is_used_by_some_model():
    names = {part.name for config in PRESETS.values() for part in parts_of(config)}
    assert {known for known in NOTICES if any(name.startswith(known) for name in names)} == set(NOTICES)
    assert notice("somebody's model") is UNKNOWN


def test_a_card_of_unknown_parts_has_no_total():
    text = card.card(PRESETS["mini"].replace(language=PartConfig("transformers:my-model", 640)))
    assert "| language model | transformers:my-model | ? |" in text
    assert "Together" not in text


def test_a_card_is_written_anew_until_somebody_takes_it_over(tmp_path: Path):
    card.write(tmp_path, PRESETS["pretrain"])
    card.write(tmp_path, PRESETS["pretrain_opt2.7b"])
    path = tmp_path / "README.md"
    assert "OPT-2.7B" in path.read_text()
    path.write_text("# My own words")
    card.write(tmp_path, PRESETS["pretrain"])
    assert path.read_text() == "# My own words"
