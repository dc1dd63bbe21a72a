"""Every published configuration, counted on the meta device against the published integers."""

import dataclasses

import pytest
import torch

from blip2.config import EVA_G, PRESETS, QFormerConfig
from blip2.model.bridge import Bridge
from blip2.model.vision import VisionTransformer


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("preset", "trainable"),
    [
        ("pretrain", 186_705_470),
        ("pretrain_vitL", 183_165_758),
        ("pretrain_opt2.7b", 107_133_696),
        ("pretrain_opt6.7b", 108_314_880),
        ("pretrain_flant5xl", 106_739_968),
        ("pretrain_flant5xxl", 108_314_880),
        ("pretrain_vitL_opt2.7b", 103_593_984),
        ("pretrain_flant5xl_vitL", 103_200_256),
    ],
)
def test_the_bridge_has_exactly_the_published_number_of_trainable_parameters(preset: str, trainable: int):
    with torch.device("meta"):
        assert count(Bridge(PRESETS[preset])) == trainable


@pytest.mark.parametrize(("size", "parameters"), [(224, 985_894_528), (364, 986_485_888), (490, 987_258_880)])
def test_eva_vit_g_has_exactly_the_published_number_of_parameters(size: int, parameters: int):
    with torch.device("meta"):
        assert count(VisionTransformer(dataclasses.replace(EVA_G, image_size=size))) == parameters


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [
        ("coco", 1_173_191_358),
        ("caption_coco_opt2.7b", 1_093_619_584),
        ("caption_coco_opt6.7b", 986_485_888 + 108_314_880),
        ("caption_coco_flant5xl", 986_485_888 + 106_739_968),
    ],
)
def test_a_fine_tuned_model_counts_its_vision_tower_too(preset: str, parameters: int):
    config = PRESETS[preset]
    with torch.device("meta"):
        assert count(Bridge(config)) + count(VisionTransformer(config.vision)) == parameters


def test_retrieval_with_vit_l_at_364_pixels_counts_as_published():
    config = PRESETS["pretrain_vitL"]
    with torch.device("meta"):
        vision = VisionTransformer(dataclasses.replace(config.vision, image_size=364))
        assert count(Bridge(config)) + count(vision) == 474_177_342


def test_question_aware_vqa_fine_tuning_counts_as_published():
    config = PRESETS["pretrain_opt2.7b"]
    vqa = config.replace(vision=dataclasses.replace(EVA_G, image_size=490), qformer=QFormerConfig())
    with torch.device("meta"):
        assert count(Bridge(vqa)) + count(VisionTransformer(vqa.vision)) == 1_174_915_072
