from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from blip2 import kernels
from blip2.cli import app
from blip2.config import HUB, PRESETS, PartConfig, write_config
from blip2.errors import ConfigError
from blip2.weights.inventory import GIB, Memory, Place, parts_of, places


def shown(*words: str) -> str:
    return CliRunner().invoke(app, ["info", *words], catch_exceptions=False).stdout


@pytest.mark.parametrize("name", PRESETS)
def test_every_configuration_shows_its_parts(name: str):
    found = json.loads(shown(name, "--json"))
    assert [part["role"] for part in found["parts"]][:2] == ["image encoder", "bridge"]
    assert all(part["parameters"] > 0 and part["licence"] and part["risks"] for part in found["parts"])
    assert not any(part["licence"] == "its own" for part in found["parts"])
    sizes = [line["inference"] for line in found["memory"]]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == 4 * sum(part["parameters"] for part in found["parts"])
    trained = sum(part["parameters"] for part in found["parts"] if part["trained"])
    assert all(line["bridge"] == line["inference"] + 12 * trained for line in found["memory"])
    assert [line["everything"] for line in found["memory"]] == [4 * sizes[0], 2 * sizes[0], None, None, None]
    assert found["machine"][0]["name"] == "RAM"
    assert list(found["kernels"]) == ["float32", "bfloat16", "half", "int8", "fp8", "int4"]
    assert all(kernel in " ".join(shown(name).split()) for kernel in found["kernels"].values())


def test_what_a_gpu_multiplies_with_is_told_where_there_is_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert json.loads(shown("mini", "--json"))["kernels_on_cuda"] == {}
    assert "on CUDA" not in shown("mini")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(kernels, "multiplies_whole_numbers", lambda _: True)
    monkeypatch.setattr(kernels, "multiplies_fp8", lambda _: False)
    monkeypatch.setattr(kernels, "reads_tiles", lambda _: True)
    found = json.loads(shown("mini", "--json"))["kernels_on_cuda"]
    assert found == {"int8": kernels.HALVES, "fp8": kernels.PLAINLY, "int4": "weight-only kernel, in tiles"}
    assert "products with them on CUDA" in shown("mini")


def test_the_published_opt_has_its_true_size_and_beside_it_what_its_card_says():
    found = json.loads(shown("Salesforce/blip2-opt-2.7b", "--json"))
    assert sum(part["parameters"] for part in found["parts"]) == 3_744_679_936
    assert [line["card"] for line in found["memory"]] == [14.43, 7.21, 3.61, None, 1.8]
    twice = 3_744_679_936 + 50_272 * 2560  # the card's count
    widths = (4, 2, 1, 0.5)
    assert [round(twice * width / 2**30, 2) for width in widths[:3]] == [14.43, 7.21, 3.61]
    assert int(twice * widths[3] / 2**30 * 10) / 10 == 1.8
    text = shown("Salesforce/blip2-opt-2.7b")
    assert "13.95" in text
    assert "14.43" in text
    assert "490.94 MiB" in text
    assert "counts OPT's tied output matrix twice" in text
    assert json.loads(shown("Salesforce/blip2-opt-6.7b", "--json"))["memory"][0]["card"] is None


@pytest.mark.parametrize("name", HUB)
def test_every_model_on_the_hub_is_known_by_its_name(name: str):
    parts = json.loads(shown(f"Salesforce/{name}", "--json"))["parts"]
    assert parts == json.loads(shown(name, "--json"))["parts"]
    assert ("language model" in [part["role"] for part in parts]) == ("itm" not in name)


def test_int8_and_int4_make_blocks_small_and_leave_the_rest():
    config = PRESETS["pretrain_flant5xl"]
    language = parts_of(config)[-1]
    assert language.parameters is not None
    linear = sum(rows * columns for rows, columns in language.linear)
    assert language.parameters - linear < 2.1 * 32128 * 2048  # embeddings and head
    scales = 4 * sum(rows for rows, _ in language.linear)
    assert language.bytes("fp8") == language.bytes("int8") == linear + scales + 2 * (language.parameters - linear)
    assert 0.5 < (language.bytes("int4") or 0) / linear < 0.7


def test_what_fits_is_told_for_what_is_there_and_what_is_free():
    memory = Memory("float32", 10 * GIB, 0, None, None)
    fits = [Place("RAM", total * GIB, free * GIB).fits(memory) for total, free in ((12, 12), (12, 3), (10, 10))]
    assert fits == ["yes", "not now", "no"]
    here = places()[0]
    assert 0 < here.free <= here.total


def test_the_table_has_a_total_and_the_gemma_terms():
    text = shown("mini")
    assert "total" in text
    assert "Gemma terms" in text
    assert "risks:" in text


def test_a_directory_is_read_and_unknown_parts_have_no_total(tmp_path: Path):
    write_config(PRESETS["mini"].replace(language=PartConfig("transformers:my-model", 640)), tmp_path / "config.json")
    result = CliRunner().invoke(app, ["info", str(tmp_path)], catch_exceptions=False)
    assert "transformers:my-model" in result.stdout
    assert "total" not in result.stdout
    assert "no total" in result.stderr


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"pretrain_opt2\.7b"):
        CliRunner().invoke(app, ["info", "nothing"], catch_exceptions=False)
