"""Processors give the inputs that transformers' give: pixels bit for bit, ids and masks equal."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from published import picture

from blip2.compat import transformers as compat
from blip2.errors import CheckpointError, ConfigError, ImageError, PromptError

transformers = pytest.importorskip("transformers")

TEXTS = ["what is it?", "a", "", "two  dogs and\na cat"]
Pair = tuple[Any, Any]


@pytest.fixture(params=["opt", "t5", "itm"])
def pair(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Pair:
    """Theirs and ours, from one folder."""
    return tuple(of.Blip2Processor.from_pretrained(folders[request.param]) for of in (transformers, compat))


def same(found: Any, expected: Any) -> None:
    assert list(found) == list(expected)
    for name in expected:
        if isinstance(expected[name], list):
            assert found[name] == expected[name]
        else:
            torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "options",
    [
        {"padding": True},
        {"padding": "longest"},
        {"padding": "max_length", "max_length": 16},
        {"padding": True, "truncation": True, "max_length": 9},
        {"padding": True, "add_special_tokens": False},
    ],
    ids=str,
)
def test_batches_are_the_same(pair: Pair, side: str, options: dict[str, Any]):
    pictures = [picture(seed) for seed in range(len(TEXTS))]
    for processor in pair:
        processor.tokenizer.padding_side = side
    if options.get("truncation") or options["padding"] != "max_length":
        arguments = {"images": pictures, "text": TEXTS, "return_tensors": "pt", **options}
        same(pair[1](**arguments), pair[0](**arguments))
    texts = TEXTS[1:3]
    arguments = {"text": texts, "return_tensors": "pt", **options}
    same(pair[1](**arguments), pair[0](**arguments))


def test_texts_are_cut_where_the_tokenizer_s_settings_say(folders: dict[str, Path], tmp_path: Path):
    place = tmp_path / "short"
    shutil.copytree(folders["t5"], place)
    settings = json.loads((place / "tokenizer_config.json").read_text())
    (place / "tokenizer_config.json").write_text(json.dumps({**settings, "model_max_length": 8}))
    theirs, ours = (of.Blip2Processor.from_pretrained(place) for of in (transformers, compat))
    arguments = {"text": TEXTS, "padding": True, "truncation": True, "return_tensors": "pt"}
    same(ours(**arguments), theirs(**arguments))


def test_every_calling_order(pair: Pair):
    photo, text = picture(1), "a cat"
    expected = pair[0](images=photo, text=text, return_tensors="pt")
    for found in (
        pair[1](photo, text, return_tensors="pt"),
        pair[1](text=text, images=photo, return_tensors="pt"),
        pair[1](text, photo, return_tensors="pt"),
        pair[1]([photo], [text], return_tensors="pt"),
    ):
        same(found, expected)
    same(pair[1](photo, return_tensors="pt"), pair[0](photo, return_tensors="pt"))
    same(pair[1](text=text, return_tensors="pt"), pair[0](text=text, return_tensors="pt"))
    same({**pair[1](text=TEXTS)}, {**pair[0](text=TEXTS)})
    with pytest.raises(PromptError, match="give images, text, or both"):
        pair[1](return_tensors="pt")
    with pytest.raises(PromptError, match="pass padding=True"):
        pair[1]([photo, photo], TEXTS[:2], return_tensors="pt")
    with pytest.raises(PromptError, match="give a string"):
        pair[1](photo, [3], return_tensors="pt")


@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "RGBA", "P", "CMYK", "1", "I;16"])
@pytest.mark.parametrize("size", [(40, 31), (7, 200), (28, 28), (1, 1), (513, 300)], ids=str)
def test_pixels_are_the_same_of_every_mode_and_size(folders: dict[str, Path], mode: str, size: tuple[int, int]):
    photo = picture(3, size)
    photo = Image.fromarray(np.asarray(photo.convert("L"), np.uint16) * 200) if mode == "I;16" else photo.convert(mode)
    theirs, ours = (of.Blip2Processor.from_pretrained(folders["opt"]) for of in (transformers, compat))
    same(ours(photo, return_tensors="pt"), theirs(photo, return_tensors="pt"))


def test_arrays_tensors_and_lists_are_pictures_too(folders: dict[str, Path], tmp_path: Path):
    theirs, ours = (of.Blip2Processor.from_pretrained(folders["opt"]) for of in (transformers, compat))
    array = np.asarray(picture(3))
    for source in (
        array,
        torch.from_numpy(array.copy()).permute(2, 0, 1),
        np.ascontiguousarray(array.transpose(2, 0, 1)),
    ):
        same(ours(source, return_tensors="pt"), theirs(source, return_tensors="pt"))
    stacked = np.stack([array, array[::-1]])
    same(ours(stacked, return_tensors="pt"), theirs(list(stacked), return_tensors="pt"))
    picture(3).save(tmp_path / "a.png")
    same(ours(str(tmp_path / "a.png"), return_tensors="pt"), theirs(picture(3), return_tensors="pt"))
    with pytest.raises(ImageError, match="fetching is off"):
        ours("http://127.0.0.1/none.jpg", return_tensors="pt")


def test_a_picture_that_says_how_it_was_held_is_not_turned(folders: dict[str, Path], tmp_path: Path):
    exif = Image.Exif()
    exif[274] = 6
    picture(3).save(tmp_path / "held.jpg", exif=exif, quality=95)
    theirs, ours = (of.Blip2Processor.from_pretrained(folders["opt"]) for of in (transformers, compat))
    with Image.open(tmp_path / "held.jpg") as photo:
        same(ours(photo, return_tensors="pt"), theirs(photo, return_tensors="pt"))
        turned = ours(str(tmp_path / "held.jpg"), return_tensors="pt")["pixel_values"]
        assert not torch.equal(turned, ours(photo, return_tensors="pt")["pixel_values"])


def test_texts_come_back(pair: Pair):
    ids = pair[0](text=TEXTS, padding=True, return_tensors="pt")["input_ids"]
    for skip in (True, False):
        assert pair[1].batch_decode(ids, skip_special_tokens=skip) == pair[0].batch_decode(
            ids, skip_special_tokens=skip
        )
        assert pair[1].decode(ids[0], skip_special_tokens=skip) == pair[0].decode(ids[0], skip_special_tokens=skip)
    assert pair[1].decode(ids[0].tolist()) == pair[0].decode(ids[0].tolist())
    for name in ("pad_token_id", "eos_token_id", "bos_token_id", "pad_token", "unk_token_id"):
        assert getattr(pair[1].tokenizer, name) == getattr(pair[0].tokenizer, name)
    assert len(pair[1].tokenizer) == len(pair[0].tokenizer)
    assert pair[1].tokenizer("a cat")["input_ids"] == pair[0].tokenizer("a cat")["input_ids"]
    tokens = pair[0].tokenizer.convert_ids_to_tokens(ids[0].tolist())
    assert pair[1].tokenizer.convert_ids_to_tokens(ids[0].tolist()) == tokens
    assert pair[1].tokenizer.convert_tokens_to_ids("<image>") == pair[0].tokenizer.convert_tokens_to_ids("<image>")


def test_inputs_go_to_a_device_and_only_floats_to_a_precision(folders: dict[str, Path]):
    processor = compat.AutoProcessor.from_pretrained(folders["opt"])
    for places, options in (
        (("cpu", torch.float16), {}),
        ((torch.float16,), {}),
        ((), {"device": torch.device("cpu"), "dtype": torch.float16}),
    ):
        given = processor(picture(1), "a", return_tensors="pt").to(*places, **options)
        assert given.pixel_values.dtype == torch.float16
        assert given["input_ids"].dtype == given.attention_mask.dtype == torch.int64
    with pytest.raises(AttributeError):
        given.labels  # noqa: B018
    assert isinstance(processor(picture(1), "a", return_tensors="np")["pixel_values"], np.ndarray)
    with pytest.raises(ConfigError, match="return_tensors 'tf'"):
        processor(picture(1), "a", return_tensors="tf")


def test_the_name_on_the_model_cards_fills_the_image_s_slots(folders: dict[str, Path]):
    theirs, ours = (of.BlipProcessor.from_pretrained(folders["t5"]) for of in (transformers, compat))
    lost = theirs(picture(1), "how many?", return_tensors="pt")["input_ids"]
    found = ours(picture(1), "how many?", return_tensors="pt")["input_ids"]
    token = ours.tokenizer.image_token_id
    assert found.tolist() == [[token] * 4 + lost[0].tolist()]
    assert token not in lost


def test_what_is_saved_both_read_back(pair: Pair, tmp_path: Path):
    pair[1].tokenizer.padding_side = "left"
    pair[1].save_pretrained(tmp_path)
    arguments = {"images": [picture(1)] * 2, "text": ["a cat", "no"], "return_tensors": "pt", "padding": True}
    expected = pair[1](**arguments)
    for of in (transformers, compat):
        same(of.Blip2Processor.from_pretrained(tmp_path)(**arguments), expected)


def test_older_folders_have_their_settings_in_other_files(folders: dict[str, Path], tmp_path: Path):
    """As the published ones: `preprocessor_config.json`, and special tokens in a file of their own."""
    place = tmp_path / "old"
    shutil.copytree(folders["opt"], place)
    settings = json.loads((place / "processor_config.json").read_text())
    (place / "preprocessor_config.json").write_text(json.dumps(settings.pop("image_processor")))
    (place / "processor_config.json").write_text(json.dumps(settings))
    tokens = json.loads((place / "tokenizer_config.json").read_text())
    named = {name: {"content": tokens.pop(name)} for name in ("pad_token", "eos_token", "bos_token")}
    (place / "tokenizer_config.json").write_text(json.dumps(tokens))
    (place / "special_tokens_map.json").write_text(json.dumps(named))
    arguments = {"images": [picture(1)] * 2, "text": ["a cat", "no"], "return_tensors": "pt", "padding": True}
    expected = compat.Blip2Processor.from_pretrained(folders["opt"])(**arguments)
    same(compat.Blip2Processor.from_pretrained(place)(**arguments), expected)
    (place / "processor_config.json").unlink()  # the model itself says how many queries it has
    same(compat.Blip2Processor.from_pretrained(place)(**arguments), expected)
    whole = json.loads((place / "tokenizer.json").read_text())
    whole["post_processor"] = None  # and which token begins a text
    (place / "tokenizer.json").write_text(json.dumps(whole))
    same(compat.Blip2Processor.from_pretrained(place)(**arguments), expected)
    (place / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match="neither processor_config"):
        compat.Blip2Processor.from_pretrained(place)


def test_what_the_pictures_cannot_be_turned_into_is_named(folders: dict[str, Path]):
    for settings, message in (
        ({"do_resize": False}, "do_resize=False"),
        ({"size": {"height": 28, "width": 14}}, "squeezes pictures to a square"),
        ({"resample": 2}, "bicubic"),
    ):
        with pytest.raises(ConfigError, match=message):
            compat.BlipImageProcessor(**settings)
    processor = compat.Blip2Processor.from_pretrained(folders["opt"])
    assert processor(picture(1), return_tensors="pt", size=42)["pixel_values"].shape == (1, 3, 42, 42)
