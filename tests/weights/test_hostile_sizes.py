"""Configurations and tokenizers that ask for what no model has: an error at once, before anything is made of them."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import blip2
from blip2.blip2 import Blip2
from blip2.errors import CheckpointError
from blip2.weights import transformers as hers
from published import config, loaded, opt, pictures, t5

HUGE = (-1, 2**20 + 1, 10**18)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Blip2]]:
    """A model of each kind in our own format."""
    found: dict[str, tuple[Path, Blip2]] = {}
    for kind, text in (("opt", opt()), ("t5", t5())):
        place = tmp_path_factory.mktemp(kind)
        _, model = loaded(config(text), place / "theirs")
        model.save(place / "ours")
        found[kind] = place / "ours", model
    return found


@pytest.fixture(params=["opt", "t5"])
def place(saved: dict[str, tuple[Path, Blip2]], request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved[request.param][0], tmp_path / "model"))


def numbers(values: dict[str, Any], *before: str) -> Iterator[tuple[str, ...]]:
    """Keys of all whole numbers but the version's."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from numbers(value, *before, key)
        elif type(value) is int and key not in ("format", "no_repeat_ngram"):
            yield *before, key


def write(place: Path, values: dict[str, Any], keys: tuple[str, ...], value: object) -> None:
    """The configuration with one value changed."""
    changed = json.loads(json.dumps(values))
    inner = changed
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    (place / "config.json").write_text(json.dumps(changed))


def test_no_number_makes_loading_allocate_or_stumble(place: Path) -> None:
    values = json.loads((place / "config.json").read_text())
    checked = list(numbers(values))
    assert len(checked) > 25
    for keys in checked:
        for value in HUGE:
            write(place, values, keys, value)
            with pytest.raises(CheckpointError, match=rf"{keys[-1]} would be {value}, not [01] to 1,048,576"):
                blip2.load(place, device="cpu")


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("qformer", "layers"), 2**20, "qformer: 1048576 layers, and the checkpoint has .* tensors"),
        (("vision", "layers"), 2**20, "vision: 1048576 layers, and the checkpoint has .* tensors"),
        (("language", "layers"), 2**20, "language: 1048576 layers, and the checkpoint has .* tensors"),
        (("qformer", "heads"), 3, "qformer: 3 heads cannot share a width of 16"),
        (("qformer", "cross_attention_every"), 0, "our cross_attention_every would be 0"),
        (("qformer", "dropout"), 3.0, "our dropout would be 3.0, not from 0 to less than 1"),
        (("vision_norm_eps",), -1.0, "config: our vision_norm_eps would be -1.0"),
        (("qformer", "queries"), 9, r"query_tokens is \[1, 4, 16\], the configuration wants \[1, 9, 16\]"),
    ],
)
def test_numbers_that_do_not_go_together_are_named(
    place: Path, keys: tuple[str, ...], value: float, message: str
) -> None:
    write(place, json.loads((place / "config.json").read_text()), keys, value)
    with pytest.raises(CheckpointError, match=message):
        blip2.load(place, device="cpu")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("start_id", 61, "our start_id would be 61, of 61 words"),
        ("max_distance", 16, "32 buckets cannot hold distances up to 16"),
        ("buckets", 2, "2 buckets cannot hold distances up to 128"),
    ],
)
def test_numbers_of_t5_are_held_to_each_other(
    saved: dict[str, tuple[Path, Blip2]], tmp_path: Path, key: str, value: int, message: str
) -> None:
    place = Path(shutil.copytree(saved["t5"][0], tmp_path / "model"))
    write(place, json.loads((place / "config.json").read_text()), ("language", key), value)
    with pytest.raises(CheckpointError, match=message):
        blip2.load(place, device="cpu")


# -- tokenizers --------------------------------------------------------------------------------------------------------


def test_a_tokenizer_that_panics_as_it_is_read_is_a_damaged_one(place: Path) -> None:
    path = place / "language-tokenizer.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "normalizer": {"type": "Precompiled", "precompiled_charsmap": ""}}))
    with pytest.raises(CheckpointError, match=r"language-tokenizer\.json: not a readable tokenizer\.json: Precompiled"):
        blip2.load(place, device="cpu")


def test_a_tokenizer_that_panics_at_a_text_is_a_damaged_one(place: Path) -> None:
    path = place / "language-tokenizer.json"
    values = json.loads(path.read_text())
    table = base64.b64encode(b"\x04\0\0\0\0\0\0\0abc").decode()
    path.write_text(json.dumps({**values, "normalizer": {"type": "Precompiled", "precompiled_charsmap": table}}))
    model = blip2.load(place, device="cpu")
    with pytest.raises(CheckpointError, match=r"the tokenizer gives up: .*get the model's files again"):
        model.caption(pictures(1)[0], prompt="w5")
    assert model.tokenizer is not None
    with pytest.raises(TypeError):  # the caller's mistake stays the caller's
        model.tokenizer.encode([5])  # pyright: ignore[reportArgumentType]


# -- special tokens ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", [lambda model, place: model.save(place), hers.save], ids=["ours", "transformers"])
def test_another_begin_token_comes_back(tmp_path: Path, save: Callable[[Blip2, Path], None]) -> None:
    text = opt()
    text.bos_token_id = 7
    _, model = loaded(config(text), tmp_path / "theirs")
    assert model.tokenizer is not None
    assert model.tokenizer.bos == 7
    save(model, tmp_path / "again")
    back = blip2.load(tmp_path / "again", device="cpu", dtype="float32")
    assert back.tokenizer is not None
    assert back.tokenizer.bos == 7
    photos = pictures(2)
    assert back.caption(photos, max_new_tokens=6) == model.caption(photos, max_new_tokens=6)
