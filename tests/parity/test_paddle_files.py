"""PaddleNLP's directories. `paddle/*.pdparams` were written by paddlepaddle 3.3.1 (`paddle.save`) from the arrays that
`arrays` makes, the projection's bias as bfloat16 and the queries as float16; `linear` is a layer's own state."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from torch import Tensor

import blip2
from blip2.calibration import Calibration
from blip2.config import Blip2Config, OPTConfig, QFormerConfig, T5Config, VisionConfig
from blip2.errors import CheckpointError
from blip2.model.bridge import Bridge
from blip2.model.vision import VisionTransformer
from blip2.weights import calibrated, paddle, pdparams
from blip2.weights.convert import convert
from blip2.weights.maps import paddle as maps
from blip2.weights.maps import transformers_config as keys
from blip2.weights.rules import to_theirs
from blip2.weights.transformers import build_language

FILES = Path(__file__).parent / "paddle"
PHOTO = Path(__file__).parents[2] / "docs" / "cat.jpg"
VISION = VisionConfig(image_size=28, patch_size=14, width=12, layers=2, heads=2, mlp_width=16, key_bias=True)
QFORMER = QFormerConfig(
    width=16, layers=3, heads=2, mlp_width=24, queries=4, encoder_width=12, vocab_size=40, positions=16, text=False,
    decoder_id=39,
)  # fmt: skip
LANGUAGES = {
    "opt": OPTConfig(width=16, layers=2, heads=2, mlp_width=24, vocab_size=40, context=64),
    "t5": T5Config(width=16, layers=2, heads=2, head_width=8, mlp_width=24, vocab_size=40),
}
ENDS = {"opt": {"eos_token_id": 2, "pad_token_id": 1}, "t5": {"eos_token_id": 1, "pad_token_id": 0}}


def config(kind: str) -> Blip2Config:
    prompts = keys.T5_PROMPTS if kind == "t5" else keys.OPT_PROMPTS
    return Blip2Config(
        vision=VISION, qformer=QFORMER, language=LANGUAGES[kind], heads=False, vision_norm_eps=1e-6, word_head=False,
        prompts=prompts,
    )  # fmt: skip


def arrays(kind: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Tensors by our names and by Paddle's."""
    whole = config(kind)
    parts = {"vision": VisionTransformer(VISION), "bridge": Bridge(whole), "language": build_language(LANGUAGES[kind])}
    generator = torch.Generator().manual_seed(7)
    ours = {
        f"{key}.{name}": torch.randn(tensor.shape, generator=generator)
        for key, part in parts.items()
        for name, tensor in part.state_dict().items()
    }
    theirs = to_theirs(maps.blip2(whole), ours, "test")
    if kind == "opt":
        theirs["language_projection.bias"] = theirs["language_projection.bias"].bfloat16()
        theirs["query_tokens"] = theirs["query_tokens"].half()
    return ours, theirs


def directory(kind: str, place: Path) -> Path:
    """As PaddleNLP leaves it: keys of its own in `config.json`, the tokenizer in GPT-2's two files."""
    shutil.copy(FILES / f"{kind}.pdparams", place / "model_state.pdparams")
    values: dict[str, Any] = keys.values(config(kind), stop_ids=(ENDS[kind]["eos_token_id"],), pad_id=1)
    values["text_config"] |= ENDS[kind]
    if kind == "opt":
        text = values["text_config"]
        for theirs, ours in (("intermediate_size", "ffn_dim"), ("hidden_act", "activation_function")):
            text[theirs] = text.pop(ours)
        text["normalize_before"] = text.pop("do_layer_norm_before")
    (place / "config.json").write_text(json.dumps(values))
    alphabet = ["<s>", "<pad>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz", "Ġ", "Q", ":", "?", "A", ".", "\u010a"]
    (place / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(alphabet)}))
    (place / "merges.txt").write_text("#version: 0.2\n")
    return place


@pytest.mark.parametrize("kind", LANGUAGES)
def test_what_paddle_wrote_is_read_to_the_bit(kind: str):
    found, expected = pdparams.read(FILES / f"{kind}.pdparams"), arrays(kind)[1]
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def test_a_layers_own_state_is_read_without_its_table_of_names():
    found = pdparams.read(FILES / "linear.pdparams")
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == {"weight": (3, 2), "bias": (2,)}


@pytest.mark.parametrize("kind", LANGUAGES)
def test_a_directory_is_a_model_and_converts_and_comes_back_bit_for_bit(kind: str, tmp_path: Path):
    place = directory(kind, tmp_path)
    model = blip2.load(place, device="cpu", dtype="float32")
    assert model.config == config(kind)
    for name, tensor in arrays(kind)[0].items():
        key, _, path = name.partition(".")
        part = {"vision": model.encoder, "bridge": model.bridge, "language": model.language}[key]
        assert isinstance(part, torch.nn.Module)
        rounded = name in ("bridge.language_projection.bias", "bridge.qformer.query_tokens") and kind == "opt"
        torch.testing.assert_close(part.state_dict()[path], tensor, rtol=0.01 if rounded else 0, atol=0)
    assert isinstance(model.caption(PHOTO, max_new_tokens=4), str)

    calibrated.write(calibrated.place(place), Calibration(2.0), model.identity)
    convert(place, tmp_path / "theirs", "transformers")
    convert(tmp_path / "theirs", tmp_path / "again", "paddle")
    again, expected = pdparams.read(tmp_path / "again" / "model_state.pdparams"), arrays(kind)[1]
    assert again.keys() == expected.keys()
    assert all(again[name].dtype == t.dtype and torch.equal(again[name], t) for name, t in expected.items())
    back = blip2.load(tmp_path / "again", device="cpu")
    assert (back.config, back.calibration) == (config(kind), Calibration(2.0))


def test_linear_weights_lie_the_other_way_round_and_no_others():
    ours, theirs = arrays("opt")
    assert torch.equal(theirs["language_projection.weight"], ours["bridge.language_projection.weight"].T)
    assert torch.equal(
        theirs["language_model.opt.decoder.layers.1.linear1.weight"], ours["language.layers.1.up.weight"].T
    )
    assert torch.equal(theirs["language_model.opt.embeddings.word_embeddings.weight"], ours["language.words.weight"])
    opt = "language_model.opt"
    kept = {f"{opt}.embeddings.{part}_embeddings.weight" for part in ("word", "position")}
    same = {name for name, tensor in theirs.items() if tensor.ndim == 2} - kept
    transposed = {
        name for rule in maps.blip2(config("opt")) if "Transposed" in repr(rule.operation) for name in rule.theirs
    }
    assert same == transposed


class Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return print, ("it ran",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps({"a": Evil()}), "names builtins.print, which no array needs; nothing of it was run"),
        (pickle.dumps({"a": np.array([None])}), "an array of type 'O8'"),
        (pickle.dumps({"a": np.ones(3, ">f4")}), "another byte order"),
        (pickle.dumps({"a": "text"}), "a is no array"),
        (pickle.dumps([np.ones(3)]), "holds a list, no arrays by name"),
        (pickle.dumps({"a": np.ones(300)})[:-700], "damaged or no Paddle file"),
        (b"not a pickle", "damaged or no Paddle file"),
        (
            pickle.dumps({"a": b"x"}, 2).replace(b"c_codecs\nencode\n", b"c_codecs\nencode\n}b"),
            "gives a state to what has none",
        ),
        (pickle.dumps({"a": np.ones(3)}).replace(b"K\x03\x85", b"K\x04\x85"), r"an array of shape \[4\] in 24 bytes"),
    ],
)
def test_a_hostile_or_damaged_file_is_an_error_and_runs_nothing(
    content: bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "model_state.pdparams"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        pdparams.read(path)
    assert capsys.readouterr().out == ""


def test_an_index_beyond_all_memory_takes_none(tmp_path: Path):
    (tmp_path / "x").write_bytes(b"\x80\x02}r\x00\x00\x00\x7f.")  # stores the empty dict under number 2^31 - 2^24
    assert pdparams.read(tmp_path / "x") == {}


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("kind", [np.float32, np.float16, np.float64, np.int64, np.int32, np.uint8, np.bool_])
def test_arrays_of_every_kind_and_order_come_back(kind: Any, order: Any, tmp_path: Path):
    made = {
        "a": np.arange(24).reshape(2, 3, 4).astype(kind, order=order),
        "b": np.array(3, kind),
        "c": np.ones((0, 2), kind),
    }
    (tmp_path / "x").write_bytes(pickle.dumps(made, protocol=2))
    for name, tensor in pdparams.read(tmp_path / "x").items():
        assert np.array_equal(tensor.numpy(), made[name])


def test_old_tokenizer_files_say_what_theirs_says(tmp_path: Path):
    place = directory("opt", tmp_path)
    model = blip2.load(place, device="cpu", dtype="float32")
    assert model.tokenizer is not None
    assert model.tokenizer.decode(model.tokenizer.encode(["a dog?"])[0]) == "a dog?"
    assert (model.tokenizer.stop_ids, model.tokenizer.bos) == ((2,), 2)
    (place / "merges.txt").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: missing"):
        blip2.load(place, device="cpu")
    assert isinstance(model.tokenizer.rust, tokenizers.Tokenizer)
    assert paddle.holds(place)
