from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from blip2.cli import app
from blip2.config import PRESETS, PartConfig, write_config
from blip2.errors import ConfigError


def shown(*words: str) -> str:
    return CliRunner().invoke(app, ["info", *words], catch_exceptions=False).stdout


@pytest.mark.parametrize("name", PRESETS)
def test_every_configuration_shows_its_parts(name: str):
    lines = [json.loads(line) for line in shown(name, "--json").splitlines()]
    assert [line["role"] for line in lines][:2] == ["image encoder", "bridge"]
    assert all(line["parameters"] > 0 and line["licence"] for line in lines)
    assert all(line["bfloat16_bytes"] == line["parameters"] * (4 if line["trained"] else 2) for line in lines)


def test_the_table_has_a_total_and_the_gemma_terms():
    text = shown("mini")
    assert "total" in text
    assert "Gemma terms" in text.replace("\n", " ")


def test_a_directory_is_read_and_unknown_parts_have_no_total(tmp_path: Path):
    write_config(PRESETS["mini"].replace(language=PartConfig("transformers:my-model", 640)), tmp_path / "config.json")
    result = CliRunner().invoke(app, ["info", str(tmp_path)], catch_exceptions=False)
    assert "transformers:my-model" in result.stdout
    assert "total" not in result.stdout
    assert "no total" in result.stderr


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"pretrain_opt2\.7b"):
        CliRunner().invoke(app, ["info", "nothing"], catch_exceptions=False)
