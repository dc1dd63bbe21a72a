"""LAVIS's files: read with their frozen parts, written again, and not a bit is changed."""

from __future__ import annotations

import dataclasses
import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import blip2
from blip2.blip2 import Blip2
from blip2.config import PRESETS, Blip2Config, OPTConfig, VisionConfig
from blip2.errors import CheckpointError, ConfigError
from blip2.model.bridge import Bridge
from blip2.model.vision import VisionTransformer
from blip2.weights import lavis
from blip2.weights import transformers as transformers_format
from blip2.weights.convert import convert
from blip2.weights.maps import lavis as maps
from blip2.weights.rules import to_theirs, within
from lavis_files import CONFIGS, write

PHOTO = Path(__file__).parents[2] / "docs" / "cat.jpg"


def load(config: Blip2Config, place: Path) -> Blip2:
    parts = {"language": place / "language"} if config.language else {}
    return lavis.load(place / "blip2.pth", torch.device("cpu"), torch.float32, parts=parts, config=config)


@pytest.mark.parametrize("fine_tuned", [False, True])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_what_is_read_and_written_again_is_the_same_bit_for_bit(config: Blip2Config, fine_tuned: bool, tmp_path: Path):
    state = write(config, tmp_path, fine_tuned=fine_tuned)
    model = load(config, tmp_path)
    lavis.save(model, tmp_path / "again" / "blip2.pth", vision=fine_tuned)
    again: dict[str, Any] = torch.load(tmp_path / "again" / "blip2.pth", weights_only=True)["model"]
    assert again.keys() == state.keys()
    for name in state:
        assert torch.equal(again[name], state[name]), name
    if config.language:
        assert model.caption(PHOTO, max_new_tokens=3) is not None
    else:
        assert model.match(PHOTO, "1 2").itm.shape == (1, 1)


def test_an_encoder_with_zero_key_biases_is_written_as_one_without(tmp_path: Path):
    write(CONFIGS["opt"], tmp_path)
    model = load(CONFIGS["opt"], tmp_path)
    assert isinstance(model.config.vision, VisionConfig)
    with_bias = dataclasses.replace(model.config.vision, key_bias=True)
    state = {f"vision.{name}": tensor for name, tensor in model.encoder.state_dict().items()}  # type: ignore[union-attr]
    theirs = to_theirs(maps.vision(model.config.vision), state, "test")
    encoder = VisionTransformer(with_bias)
    joined = {
        name: tensor
        for rule in maps.vision(with_bias)
        for name, tensor in zip(rule.ours, rule.operation.join([theirs[n] for n in rule.theirs]), strict=True)
    }
    encoder.load_state_dict({name.removeprefix("vision."): tensor for name, tensor in joined.items()})
    images = torch.randn(2, 3, 28, 28)
    # one product is packed and the other is not, so their sums run in another order: 1.2e-5 at the most
    torch.testing.assert_close(encoder(images), model.encoder(images), atol=5e-5, rtol=1e-4)
    joined["vision.blocks.0.attention.qkv.bias"] += 1
    with pytest.raises(CheckpointError, match="an attention key of the vision encoder has a bias"):
        to_theirs(maps.vision(with_bias), joined, "test")


# LAVIS's names of what transformers calls otherwise, as transformers' own conversion script and users' threads tell.
FROM_TRANSFORMERS = [
    (r"^vision_model\.embeddings\.class_embedding$", "visual_encoder.cls_token"),
    (r"^vision_model\.embeddings\.position_embedding$", "visual_encoder.pos_embed"),
    (r"^vision_model\.embeddings\.patch_embedding\.", "visual_encoder.patch_embed.proj."),
    (r"^vision_model\.encoder\.layers\.(\d+)\.layer_norm(\d)\.", r"visual_encoder.blocks.\1.norm\2."),
    (r"^vision_model\.encoder\.layers\.(\d+)\.self_attn\.projection\.", r"visual_encoder.blocks.\1.attn.proj."),
    (r"^vision_model\.encoder\.layers\.(\d+)\.self_attn\.qkv\.", r"visual_encoder.blocks.\1.attn.qkv."),
    (r"^vision_model\.encoder\.layers\.(\d+)\.mlp\.", r"visual_encoder.blocks.\1.mlp."),
    (r"^vision_model\.post_layernorm\.", "ln_vision."),
    (r"^qformer\.layernorm\.", "Qformer.bert.embeddings.LayerNorm."),
    (r"^qformer\.(.*attention)\.attention\.", r"Qformer.bert.\1.self."),
    (r"^qformer\.", "Qformer.bert."),
    (r"^language_projection\.", "opt_proj."),
]


def test_every_name_and_shape_is_transformers_own_under_lavis_s_name():
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        hers = transformers.Blip2ForConditionalGeneration(transformers.Blip2Config(text_config={"model_type": "opt"}))
    expected: dict[str, tuple[int, ...]] = {}
    for name, tensor in hers.state_dict().items():
        if name.startswith("language_model."):
            continue
        for pattern, lavis_name in FROM_TRANSFORMERS:
            name, changed = re.subn(pattern, lavis_name, name)
            if changed:
                break
        if name.endswith("attn.qkv.bias"):  # one there, two here
            width = len(tensor) // 3
            expected |= {name.replace("qkv.bias", f"{part}_bias"): (width,) for part in "qv"}
        else:
            expected[name] = tuple(tensor.shape)
    config = PRESETS["caption_coco_opt2.7b"].replace(vision=PRESETS["pretrain"].vision, language=OPTConfig(width=768))
    assert isinstance(config.vision, VisionConfig)
    with torch.device("meta"):
        parts = {"bridge": Bridge(config), "vision": VisionTransformer(config.vision)}
        state = {f"{key}.{name}": t for key, part in parts.items() for name, t in part.state_dict().items()}
        rules = maps.trained(config) + within(maps.vision(config.vision), theirs="visual_encoder.")
        found = to_theirs(rules, state, "test")
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == expected


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "mini"])
def test_the_shapes_in_a_file_tell_which_model_it_is(preset: str):
    config = PRESETS[preset]
    with torch.device("meta"):
        state = {f"bridge.{name}": tensor for name, tensor in Bridge(config).state_dict().items()}
        theirs = to_theirs(maps.trained(config), state, preset)
        if preset.startswith(("coco", "caption")):
            tower = {f"vision.{name}": t for name, t in VisionTransformer(config.vision).state_dict().items()}
            named = to_theirs(maps.vision(config.vision), tower, preset)
            theirs |= {f"visual_encoder.{name}": tensor for name, tensor in named.items()}
    assert lavis.published(lavis.Pickled(theirs), preset) == config


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("eva_vit_g.pth", "frozen part 'vision' is not at .*put eva_vit_g.pth beside"),
        ("bert-base-uncased", "frozen part 'text' is not at .*put bert-base-uncased beside"),
    ],
)
def test_a_frozen_part_that_is_not_there_is_asked_for(missing: str, message: str, tmp_path: Path):
    write(CONFIGS["stage 1"], tmp_path)
    (tmp_path / missing).rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=message):
        load(CONFIGS["stage 1"], tmp_path)


def test_a_language_model_may_come_with_the_older_files_of_a_tokenizer(tmp_path: Path):
    write(CONFIGS["opt"], tmp_path)
    (tmp_path / "language" / "tokenizer.json").unlink()
    (tmp_path / "language" / "vocab.json").write_text(json.dumps({"<pad>": 1, "</s>": 2, "a": 3, "b": 4}))
    (tmp_path / "language" / "merges.txt").write_text("#version: 0.2\n")
    model = load(CONFIGS["opt"], tmp_path)
    assert model.tokenizer is not None
    assert model.tokenizer.encode(["ab"]) == [[3, 4]]
    with pytest.raises(ConfigError, match="'visoin' is none of vision, language and text"):
        lavis.load(tmp_path / "blip2.pth", torch.device("cpu"), None, parts={"visoin": "x"})


def test_what_is_no_lavis_file_is_an_error_and_runs_nothing(tmp_path: Path):
    path = tmp_path / "model.pth"
    path.write_bytes(pickle.dumps({"model": {"a": Path("/")}}))
    with pytest.raises(CheckpointError, match="cannot be read as weights alone"):
        blip2.load(path, device="cpu")
    torch.save({"model": {"a": torch.zeros(3)}}, path)
    with pytest.raises(CheckpointError, match="none of the published models"):
        blip2.load(path, device="cpu")
    torch.save({"model": {"a": 3}}, path)
    with pytest.raises(CheckpointError, match="a is no tensor but a int"):
        blip2.load(path, device="cpu")
    torch.save([torch.zeros(3)], path)
    with pytest.raises(CheckpointError, match="holds a list"):
        blip2.load(path, device="cpu")
    with pytest.raises(CheckpointError, match="missing"):
        blip2.load(tmp_path / "none.pth", device="cpu")
    with pytest.raises(ConfigError, match="`parts` are those of a LAVIS file"):
        blip2.load("mini", parts={"vision": "x"})


def test_from_lavis_to_transformers_and_back_is_the_same_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = CONFIGS["opt"]
    state = write(config, tmp_path)
    state["opt_proj.weight"] = state["opt_proj.weight"].half()  # whatever type a tensor has, it keeps
    torch.save({"model": state}, tmp_path / "blip2.pth")
    monkeypatch.setattr(lavis, "published", lambda *_: config)
    parts = {"language": tmp_path / "language"}
    convert(tmp_path / "blip2.pth", tmp_path / "theirs", "transformers", parts=parts)
    convert(tmp_path / "theirs", tmp_path / "again.pth", "lavis")
    again: dict[str, Any] = torch.load(tmp_path / "again.pth", weights_only=True)["model"]
    assert again.keys() == state.keys()
    assert all(again[name].dtype == tensor.dtype and torch.equal(again[name], tensor) for name, tensor in state.items())


def test_what_a_format_cannot_hold_is_refused_before_anything_is_written(tmp_path: Path):
    write(CONFIGS["stage 1, ViT-L"], tmp_path)
    with pytest.raises(CheckpointError, match="EVA ViT-g layout only"):
        transformers_format.save(load(CONFIGS["stage 1, ViT-L"], tmp_path), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(CheckpointError, match="its `vision` is a named frozen part"):
        convert("mini", tmp_path / "out", "transformers")
    with pytest.raises(CheckpointError, match="neither the directory of a model nor a LAVIS file"):
        convert(tmp_path / "nowhere", tmp_path / "out", "transformers")
