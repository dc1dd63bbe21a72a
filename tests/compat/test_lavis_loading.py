"""LAVIS's models by name and type: where their weights are looked for, and what is said where there are none."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from published import COMMIT, picture

import blip2
import tiny_model
from blip2.compat.lavis import models, zoo
from blip2.config import PRESETS, Blip2Config
from blip2.errors import CheckpointError, ConfigError
from blip2.weights import lavis
from blip2.weights.convert import convert
from lavis_files import CONFIGS, write

TYPES = {
    "stage 1": ("blip2_feature_extractor", "pretrain"),
    "stage 1, ViT-L": ("blip2_image_text_matching", "pretrain_vitL"),
    "opt": ("blip2_opt", "pretrain_opt2.7b"),
    "t5, ViT-L": ("blip2_t5", "pretrain_flant5xl_vitL"),
}
Writer = Callable[[str], Path]


@pytest.fixture
def torch_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """LAVIS's own folder, empty."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def written(torch_hub: Path, monkeypatch: pytest.MonkeyPatch) -> Writer:
    """Puts a tiny model into LAVIS's folder under its published names."""

    def put(key: str) -> Path:
        config: Blip2Config = CONFIGS[key]
        _, model_type = TYPES[key]
        monkeypatch.setattr(lavis, "published", lambda *_: config)  # the published sizes are 300 times as large
        entry = zoo.TYPES[model_type]
        write(config, torch_hub)
        (torch_hub / "blip2.pth").rename(torch_hub / entry.file)
        if entry.language:
            (torch_hub / "language").rename(torch_hub / entry.language.partition("/")[2])
        return torch_hub / entry.file

    return put


@pytest.mark.parametrize("key", TYPES)
def test_lavis_s_own_file_is_taken_where_torch_hub_has_it(written: Writer, key: str):
    written(key)
    model, pictures, _ = models.load_model_and_preprocess(*TYPES[key], is_eval=True)
    assert model.core.config == CONFIGS[key]
    assert model.core.config.vision_norm_eps == model.bridge.vision_norm.eps == 1e-5
    pixels = pictures["eval"](picture(0))[None]
    assert pixels.shape == pictures["train"](picture(0))[None].shape == (1, 3, 28, 28)
    if CONFIGS[key].language:
        assert len(model.generate({"image": pixels}, max_length=3)) == 1
    elif key == "stage 1":
        assert model.extract_features({"image": pixels}, mode="image").image_embeds.shape == (1, 4, 16)
    else:
        assert model({"image": pixels, "text_input": "4 5"}).shape == (1, 2)


def test_a_file_is_named_with_its_parts(written: Writer, tmp_path: Path):
    file = written("opt")
    language = (file.parent / "opt-2.7b").rename(tmp_path / "lm")
    moved = file.rename(tmp_path / "mine.pth")
    parts = {"language": language, "vision": file.parent / "eva_vit_g.pth"}
    model = models.load_model(*TYPES["opt"], True, checkpoint=moved, parts=parts)
    assert model.core.config == CONFIGS["opt"]


@pytest.mark.parametrize(
    ("key", "folder", "name"),
    [("opt", "opt-2.7b", "models--facebook--opt-2.7b"), ("stage 1", "bert-base-uncased", "models--bert-base-uncased")],
)
def test_what_lavis_has_from_the_hub_is_found_in_its_cache(
    written: Writer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, key: str, folder: str, name: str
):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    file = written(key)
    place = tmp_path / "cache" / name
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(COMMIT)
    (place / "snapshots").mkdir()
    kept = (file.parent / folder).rename(place / "snapshots" / COMMIT)
    if key == "stage 1":
        (kept / "model.safetensors").write_bytes(b"BERT's own weights, which nothing reads")
    assert models.load_model(*TYPES[key], True).core.config == CONFIGS[key]
    (place / "refs" / "main").unlink()
    with pytest.raises(CheckpointError, match="not in the cache, and the hub cannot be asked"):
        models.load_model(*TYPES[key], offline=True)


@pytest.mark.usefixtures("hub", "torch_hub")
@pytest.mark.parametrize(
    ("name", "model_type", "language"),
    [
        ("blip2_opt", "pretrain_opt2.7b", "opt"),
        ("blip2_opt", "pretrain_opt6.7b", "opt"),
        ("blip2_t5", "pretrain_flant5xl", "t5"),
        ("blip2_t5", "pretrain_flant5xxl", "t5"),
        ("blip2", "pretrain", None),
        ("blip2_feature_extractor", "pretrain", None),
        ("blip2_image_text_matching", "pretrain", None),
    ],
)
def test_else_the_same_weights_come_from_the_hub(name: str, model_type: str, language: str | None):
    model = models.load_model(name, model_type, is_eval=True, device=torch.device("cpu"))
    assert getattr(model.core.config.language, "kind", None) == language
    assert model.core.config.vision_norm_eps == model.bridge.vision_norm.eps == 1e-5, "LAVIS's arithmetic"


@pytest.mark.usefixtures("hub", "torch_hub")
def test_what_the_hub_s_cache_lacks_is_an_error_with_its_name():
    with pytest.raises(CheckpointError, match="Salesforce/blip2-itm-vit-g-coco: not in the cache"):
        models.load_model("blip2", "coco", offline=True)


def test_from_the_hub_s_format_and_from_lavis_s_come_the_same_numbers(written: Writer, tmp_path: Path):
    file = written("opt")
    convert(file, tmp_path / "theirs", "transformers", parts={"language": file.parent / "opt-2.7b"})
    ours = models.load_model(*TYPES["opt"], True)
    theirs = models.load_model(*TYPES["opt"], True, checkpoint=tmp_path / "theirs")
    pixels = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    first, second = (model.features({"image": pixels}).queries for model in (ours, theirs))
    assert torch.equal(first, second)


@pytest.mark.parametrize("model_type", ["pretrain_vitL", "pretrain_flant5xl_vitL"])
def test_a_vit_l_is_asked_for_by_file_and_folder(torch_hub: Path, model_type: str):
    name = "blip2" if model_type == "pretrain_vitL" else "blip2_t5"
    with pytest.raises(CheckpointError) as error:
        models.load_model(name, model_type)
    for part in (zoo.TYPES[model_type].file, str(torch_hub), "clip_vit_L.pth", "checkpoint="):
        assert part in str(error.value)
    assert ("flan-t5-xl/" if name == "blip2_t5" else "bert-base-uncased/") in str(error.value)


def test_a_frozen_part_that_is_missing_is_named(written: Writer):
    file = written("stage 1")
    (file.parent / "eva_vit_g.pth").unlink()
    with pytest.raises(CheckpointError, match=r"frozen part 'vision' is not at .*eva_vit_g\.pth"):
        models.load_model(*TYPES["stage 1"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (("blip2_vicuna_instruct", "vicuna7b"), "'blip2_vicuna_instruct': there are blip2_opt.*not BLIP-2's"),
        (("blip2_t5_instruct", "flant5xl"), "'blip2_t5_instruct': there are blip2_opt"),
        (("blip_caption", "base_coco"), "'blip_caption': there are"),
        (("blip2_opt",), "model_type 'base' of 'blip2_opt': there are pretrain_opt2.7b, pretrain_opt6.7b"),
        (("blip2_t5", "pretrain_opt2.7b"), "'pretrain_opt2.7b' of 'blip2_t5': there are pretrain_flant5xl"),
    ],
)
def test_what_is_no_published_blip_2_is_an_error_with_those_that_are(call: tuple[str, ...], message: str):
    with pytest.raises(ConfigError, match=message):
        models.load_model(*call)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (("blip2_t5", "pretrain_flant5xl"), "opt", "holds opt, and blip2_t5 is a model with t5"),
        (("blip2_opt", "pretrain_opt2.7b"), "itm", "holds no language model, and blip2_opt"),
        (("blip2", "pretrain"), "opt", "has no matching heads, which blip2 is made of"),
    ],
)
def test_a_checkpoint_of_another_kind_is_refused(
    folders: dict[str, Path], call: tuple[str, str], kind: str, message: str
):
    with pytest.raises(CheckpointError, match=message):
        models.load_model(*call, checkpoint=folders[kind])
    with pytest.raises(ConfigError, match="`parts` are those of a LAVIS file"):
        models.load_model(*call, checkpoint=folders[kind], parts={"vision": "x"})


def test_a_model_whose_texts_are_pooled_is_refused(monkeypatch: pytest.MonkeyPatch):
    core = tiny_model.build()
    pooled = dataclasses.replace(core.config.qformer, text_pooling="mean")
    core = dataclasses.replace(core, config=core.config.replace(qformer=pooled))
    monkeypatch.setattr(blip2, "load", lambda *_, **__: core)
    with pytest.raises(CheckpointError, match=r"mini: no model of LAVIS's, its texts are not read from \[CLS\]"):
        models.load_model("blip2", "pretrain", checkpoint="mini")


def test_the_zoo_is_what_is_published():
    listed = dict(models.model_zoo)
    assert {model_type for types in listed.values() for model_type in types} <= PRESETS.keys()
    assert {model_type for types in listed.values() for model_type in types} == zoo.TYPES.keys()
    shown = str(models.model_zoo)
    assert "Architectures" in shown
    for name, types in listed.items():
        assert f"{name:<30} {', '.join(types)}" in shown.splitlines()


def test_modes_and_places_are_a_module_s(folders: dict[str, Path]):
    model: Any = models.load_model("blip2", "pretrain", checkpoint=folders["itm"])
    assert model.training
    assert model.bridge.training
    assert not model.visual_encoder.training, "frozen parts never drop out"
    pixels = torch.zeros(1, 3, 28, 28)
    first, second = (model.extract_features({"image": pixels}, mode="image").image_embeds for _ in range(2))
    assert not torch.equal(first, second), "the Q-Former does, as in LAVIS"
    model.eval()
    first, second = (model.extract_features({"image": pixels}, mode="image").image_embeds for _ in range(2))
    assert torch.equal(first, second)
    assert model.device == torch.device("cpu")
    assert sum(parameter.numel() for parameter in model.parameters()) > 1000


@pytest.mark.parametrize(("call", "kind"), [(TYPES["opt"], "opt"), (("blip2_t5", "pretrain_flant5xl"), "t5")])
def test_precision_is_the_frozen_parts_(folders: dict[str, Path], call: tuple[str, str], kind: str):
    model: Any = models.load_model(*call, is_eval=True, checkpoint=folders[kind]).half()
    assert model.core.dtype == model.visual_encoder.class_token.dtype == torch.float16
    assert model.bridge.qformer.query_tokens.dtype == torch.float32
    if kind == "t5":
        assert model.language_model.encoder[0].mlp.down.weight.dtype == torch.float32, "T5 overflows in float16"
    assert len(model.generate({"image": torch.zeros(1, 3, 28, 28)}, max_length=3)) == 1
    trained = {name.partition(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"bridge"}
    assert model.to("cpu", torch.float32).core.dtype == torch.float32
