"""Every published checkpoint, by the names and shapes of its tensors: our loaders take each whole, on the meta device.

The tables in `published/` are facts of their own. transformers' is held against its classes here; LAVIS's against the
counts of parameters that its authors and users report.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from blip2.config import PRESETS, Blip2Config, LanguageConfig, OPTConfig, T5Config, VisionConfig
from blip2.errors import CheckpointError
from blip2.model.bridge import Bridge
from blip2.model.vision import VisionTransformer
from blip2.weights import lavis
from blip2.weights.fill import Part, fill
from blip2.weights.maps import lavis as lavis_maps
from blip2.weights.maps import transformers as maps
from blip2.weights.maps import transformers_config as keys
from blip2.weights.placement import Home
from blip2.weights.rules import within
from blip2.weights.skeleton import skeleton
from blip2.weights.transformers import build_language

Shapes = dict[str, tuple[int, ...]]
META = torch.device("meta")


@dataclass(frozen=True)
class Listed:
    """A checkpoint of which nothing but names and shapes is there; satisfies `Tensors`."""

    shapes: Shapes

    def names(self) -> set[str]:
        return set(self.shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def get(self, name: str) -> Tensor:
        return torch.empty(self.shapes[name], device=META)


def table(name: str) -> dict[str, Shapes]:
    """Its parts, each with the shape of every tensor."""
    parts: dict[str, Shapes] = {}
    for line in (Path(__file__).parent / "published" / name).read_text().splitlines():
        if line.startswith("["):
            parts[line.strip("[]")] = {}
        elif line and not line.startswith("#"):
            tensor, shape, *layers = line.split("  ")
            numbers = tuple(int(size) for size in shape.split() if size != "-")
            ends, _, step = (layers[0] if layers else "0").partition("/")
            first, _, last = ends.partition("-")
            for layer in range(int(first), int(last or first) + 1, int(step or 1)):
                parts[list(parts)[-1]][tensor.replace("*", str(layer))] = numbers
    return parts


def joined(parts: Mapping[str, Shapes], names: Sequence[str]) -> Shapes:
    found: Shapes = {}
    for name in names:
        assert not found.keys() & parts[name].keys()
        found |= parts[name]
    return found


def count(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


# -- transformers ------------------------------------------------------------------------------------------------------

HERS = table("transformers.txt")
BOTH = ("vit-g", "q-former")
# Name on the hub: its parts beside ViT-g and the Q-Former, our preset, and its parameters.
HUB: dict[str, tuple[tuple[str, ...], str, int]] = {
    "blip2-opt-2.7b": (("vit-g at 224", "opt-2.7b"), "pretrain_opt2.7b", 3_744_679_936),
    "blip2-opt-2.7b-coco": (("vit-g at 364", "opt-2.7b"), "caption_coco_opt2.7b", 3_745_271_296),
    "blip2-opt-6.7b": (("vit-g at 224", "opt-6.7b"), "pretrain_opt6.7b", 7_752_738_304),
    "blip2-opt-6.7b-coco": (("vit-g at 364", "opt-6.7b"), "caption_coco_opt6.7b", 7_753_329_664),
    "blip2-flan-t5-xl": (("vit-g at 224", "flan-t5-xl"), "pretrain_flant5xl", 3_942_446_592),
    "blip2-flan-t5-xl-coco": (("vit-g at 364", "flan-t5-xl"), "caption_coco_flant5xl", 3_943_037_952),
    "blip2-flan-t5-xxl": (("vit-g at 224", "flan-t5-xxl"), "pretrain_flant5xxl", 12_229_596_672),
    "blip2-itm-vit-g": (("vit-g at 224", "retrieval"), "pretrain", 1_172_032_258),
    "blip2-itm-vit-g-coco": (("vit-g at 364", "retrieval"), "coco", 1_172_623_618),
}


def values(name: str) -> dict[str, Any]:
    """The keys of a published `config.json` that say more than its class's defaults."""
    preset = PRESETS[HUB[name][1]]
    assert isinstance(preset.vision, VisionConfig)
    found: dict[str, Any] = {
        "model_type": "blip-2",
        "architectures": ["Blip2ForConditionalGeneration"],
        "num_query_tokens": 32,
        "vision_config": {"image_size": preset.vision.image_size, "qkv_bias": True},
        "qformer_config": {},
    }
    if isinstance(preset.language, OPTConfig):
        sizes = {"2.7b": (2560, 10240), "6.7b": (4096, 16384)}["2.7b" if "2.7b" in name else "6.7b"]
        shape = {"hidden_size": sizes[0], "word_embed_proj_dim": sizes[0], "ffn_dim": sizes[1]}
        found["text_config"] = {"model_type": "opt", "num_hidden_layers": 32, "num_attention_heads": 32, **shape}
    elif isinstance(preset.language, T5Config):
        width, wide, heads = (4096, 10240, 64) if "xxl" in name else (2048, 5120, 32)
        shape = {"d_model": width, "d_ff": wide, "d_kv": 64, "num_heads": heads, "num_layers": 24}
        kind = {"feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu", "tie_word_embeddings": False}
        found["text_config"] = {"model_type": "t5", "vocab_size": 32128, **shape, **kind}
    else:
        found["architectures"] = ["Blip2ForImageTextRetrieval"]
        found["qformer_config"] = {"vocab_size": 30523, "use_qformer_text_input": True}
    return found


@pytest.mark.parametrize("name", HUB)
def test_the_table_has_the_tensors_of_the_classes_of_transformers(name: str):
    own, _, parameters = HUB[name]
    listed = joined(HERS, [*BOTH, *own])
    assert count(listed) == parameters
    kind = getattr(transformers, values(name)["architectures"][0])
    with META:
        model = kind(transformers.Blip2Config(**values(name)))
    found = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    copies = found.keys() - listed.keys()  # of embeddings
    assert copies <= {f"language_model.{copy}" for copy in ("lm_head.weight", *COPIES)}
    assert {name: shape for name, shape in found.items() if name not in copies} == listed


COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")


def filled(config: Blip2Config, tensors: Listed, ignored: Sequence[str]) -> dict[str, Part]:
    """Our modules, from a checkpoint of this format; nothing may be missing or left over."""
    assert isinstance(config.vision, VisionConfig)
    with skeleton():
        parts = {"vision": Part.of(VisionTransformer(config.vision), None), "bridge": Part.of(Bridge(config), None)}
        if isinstance(config.language, LanguageConfig):
            parts["language"] = Part.of(build_language(config.language), None)
    rules = maps.blip2(config)
    given = ["bridge.heads.temperature"] if config.heads else []
    beside = set(ignored) - {name for rule in rules for name in rule.theirs}
    fill(parts, rules, tensors, "table", Home(META), ignored=beside, given=given)
    return parts


@pytest.mark.parametrize("copies", [False, True], ids=["safetensors", "with copies"])
@pytest.mark.parametrize("name", HUB)
def test_a_published_checkpoint_fills_our_modules_and_nothing_is_left_over(name: str, copies: bool):
    own, preset, parameters = HUB[name]
    shapes = joined(HERS, [*BOTH, *own])
    more: Shapes = {}
    if copies and preset != "pretrain" and preset != "coco":  # as the .bin files hold them
        words = next(shape for name, shape in shapes.items() if name.endswith(("embed_tokens.weight", "shared.weight")))
        kinds = ("lm_head.weight",) if "opt" in own[-1] else COPIES
        more = {f"language_model.{kind}": words for kind in kinds}
    tensors = Listed(shapes | more)
    names = tensors.names() - {"language_model.lm_head.weight"} if "opt" in own[-1] else tensors.names()
    config = keys.config(values(name), "table", names)
    expected = PRESETS[preset]
    assert config.language == expected.language
    assert isinstance(config.vision, VisionConfig)
    assert isinstance(expected.vision, VisionConfig)
    assert (config.vision.image_size, config.vision.layers) == (expected.vision.image_size, expected.vision.layers)
    parts = filled(config, tensors, maps.BESIDE)
    found = sum(parameter.numel() for part in parts.values() for parameter in part.module.parameters())
    assert found == parameters + (1 if config.heads else 0)  # and the temperature, which the format lacks


@pytest.mark.parametrize("change", ["missing", "unexpected", "misshapen"])
def test_a_published_checkpoint_with_one_tensor_wrong_is_refused(change: str):
    shapes = joined(HERS, [*BOTH, *HUB["blip2-opt-2.7b"][0]])
    config = keys.config(values("blip2-opt-2.7b"), "table", shapes)
    name = "qformer.encoder.layer.10.crossattention.attention.key.weight"
    if change == "missing":
        del shapes[name]
    elif change == "unexpected":
        shapes["qformer.encoder.layer.11.crossattention.attention.key.weight"] = (768, 1408)
    else:
        shapes[name] = (768, 1024)
    message = rf"{change} .*crossattention" if change != "misshapen" else r"\[768, 1024\], the configuration wants"
    with pytest.raises(CheckpointError, match=message):
        filled(config, Listed(shapes), maps.BESIDE)


# -- LAVIS -------------------------------------------------------------------------------------------------------------

THEIRS = table("lavis.txt")
G = ("ln_vision of ViT-g", "q-former", "crossing to ViT-g")
L = ("ln_vision of ViT-L", "q-former", "crossing to ViT-L")
# Name of the file: its parts, our preset, and how many parameters were trained: as logs and papers tell.
FILES: dict[str, tuple[tuple[str, ...], str, int]] = {
    "blip2_pretrained.pth": ((*G, "stage 1"), "pretrain", 186_705_470),
    "blip2_pretrained_vitL.pth": ((*L, "stage 1"), "pretrain_vitL", 183_165_758),
    "blip2_finetune_coco.pth": ((*G, "stage 1", "visual_encoder at 364"), "coco", 1_173_191_358),
    "blip2_pretrained_opt2.7b.pth": ((*G, "opt2.7b"), "pretrain_opt2.7b", 107_133_696),
    "blip2_pretrained_opt6.7b.pth": ((*G, "opt6.7b"), "pretrain_opt6.7b", 108_314_880),
    "blip2_pretrained_flant5xl.pth": ((*G, "flant5xl"), "pretrain_flant5xl", 106_739_968),
    "blip2_pretrained_flant5xl_vitL.pth": ((*L, "flant5xl"), "pretrain_flant5xl_vitL", 103_200_256),
    "blip2_pretrained_flant5xxl.pth": ((*G, "flant5xxl"), "pretrain_flant5xxl", 108_314_880),
    "blip2_caption_opt2.7b.pth": ((*G, "opt2.7b", "visual_encoder at 364"), "caption_coco_opt2.7b", 1_093_619_584),
    "blip2_caption_opt6.7b.pth": ((*G, "opt6.7b", "visual_encoder at 364"), "caption_coco_opt6.7b", 1_094_800_768),
    "blip2_caption_flant5xl.pth": ((*G, "flant5xl", "visual_encoder at 364"), "caption_coco_flant5xl", 1_093_225_856),
}
SECOND = "stage 1, under a second name"
BUFFER = {"Qformer.bert.embeddings.position_ids": (1, 512)}


@pytest.mark.parametrize("file", FILES)
def test_a_lavis_file_is_recognised_and_fills_what_was_trained(file: str):
    own, preset, parameters = FILES[file]
    shapes = joined(THEIRS, own)
    assert count(shapes) == parameters
    if "stage 1" in own:
        shapes |= THEIRS[SECOND] | BUFFER
    config = lavis.published(Listed(shapes), file)
    assert config == PRESETS[preset]
    assert isinstance(config.vision, VisionConfig)
    with skeleton():
        modules = {"vision": Part.of(VisionTransformer(config.vision), None), "bridge": Part.of(Bridge(config), None)}
    rules = lavis_maps.trained(config)
    if "visual_encoder at 364" in own:
        rules += within(lavis_maps.vision(config.vision), theirs="visual_encoder.")
    else:
        del modules["vision"]
    fill(modules, rules, Listed(shapes), file, Home(META), ignored=lavis_maps.BESIDE)
    assert sum(tensor.numel() for part in modules.values() for tensor in part.module.parameters()) == parameters


@pytest.mark.parametrize(("file", "preset"), [("eva_vit_g.pth", "pretrain"), ("clip_vit_L.pth", "pretrain_vitL")])
def test_an_image_encoder_s_own_file_fills_it_but_for_the_last_block(file: str, preset: str):
    config = PRESETS[preset].vision
    assert isinstance(config, VisionConfig)
    with META:
        tensors = {name: torch.empty(shape) for name, shape in THEIRS[file].items()}
    last = {name for name in tensors if f".{config.layers}." in name}
    assert len(last) in (12, 13)
    with skeleton():
        part = Part.of(VisionTransformer(config), None)
    fill({"vision": part}, lavis_maps.vision(config), Listed(THEIRS[file]), file, Home(META), ignored=last)
    assert count(THEIRS[file]) - sum(tensors[name].numel() for name in last) == sum(
        parameter.numel() for parameter in part.module.parameters()
    )
