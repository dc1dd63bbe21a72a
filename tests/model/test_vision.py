import pytest
import torch
import transformers

from blip2.config import VisionConfig
from blip2.errors import ImageError
from blip2.model.activations import quick_gelu
from blip2.model.vision import VisionTransformer

SMALL = {"image_size": 28, "patch_size": 7, "width": 16, "layers": 2, "heads": 2, "mlp_width": 24}
EVA = VisionConfig(**SMALL)
CLIP = VisionConfig(**SMALL, key_bias=True, pre_norm=True, patch_bias=False, activation="quick_gelu", norm_eps=1e-5)


@pytest.mark.parametrize("config", [EVA, CLIP], ids=["eva", "clip"])
def test_the_class_token_and_every_patch_come_out(config: VisionConfig):
    assert VisionTransformer(config)(torch.randn(2, 3, 28, 28)).shape == (2, 1 + 16, 16)


def test_another_image_size_is_refused_by_name():
    with pytest.raises(ImageError, match=r"28 x 28 pixels, not \(28, 35\)"):
        VisionTransformer(EVA)(torch.randn(1, 3, 28, 35))


def test_eva_has_no_key_bias_and_clip_has_its_norm_before_the_blocks():
    eva, clip = VisionTransformer(EVA).state_dict(), VisionTransformer(CLIP).state_dict()
    assert "blocks.0.attention.query_bias" in eva
    assert "blocks.0.attention.qkv.bias" not in eva
    assert "blocks.0.attention.qkv.bias" in clip
    assert "pre_norm.weight" in clip
    assert "patch_embedding.bias" not in clip


def test_vit_g_layout_equals_transformers_on_the_same_weights():
    """Worst absolute difference seen on these sizes: 3e-7."""
    theirs_config = transformers.Blip2VisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=7
    )
    torch.manual_seed(0)
    theirs = transformers.Blip2VisionModel(theirs_config).eval()
    ours = VisionTransformer(EVA).eval()
    state = theirs.state_dict()
    rename = {
        "class_token": "embeddings.class_embedding",
        "positions": "embeddings.position_embedding",
        "patch_embedding.weight": "embeddings.patch_embedding.weight",
        "patch_embedding.bias": "embeddings.patch_embedding.bias",
    }
    for index in range(2):
        layer, block = f"encoder.layers.{index}.", f"blocks.{index}."
        for kind in ("weight", "bias"):
            rename |= {
                f"{block}norm1.{kind}": f"{layer}layer_norm1.{kind}",
                f"{block}norm2.{kind}": f"{layer}layer_norm2.{kind}",
                f"{block}up.{kind}": f"{layer}mlp.fc1.{kind}",
                f"{block}down.{kind}": f"{layer}mlp.fc2.{kind}",
                f"{block}attention.out.{kind}": f"{layer}self_attn.projection.{kind}",
            }
        rename[f"{block}attention.qkv.weight"] = f"{layer}self_attn.qkv.weight"
    renamed = {name: state[source] for name, source in rename.items()}
    for index in range(2):
        query, _, value = state[f"encoder.layers.{index}.self_attn.qkv.bias"].chunk(3)
        renamed |= {f"blocks.{index}.attention.query_bias": query, f"blocks.{index}.attention.value_bias": value}
    ours.load_state_dict(renamed)
    pixels = torch.randn(2, 3, 28, 28)

    expected = theirs.encoder(theirs.embeddings(pixels)).last_hidden_state

    torch.testing.assert_close(ours(pixels), expected, atol=2e-6, rtol=1e-5)


def test_quick_gelu_is_clips_approximation():
    x = torch.linspace(-3, 3, 7)
    torch.testing.assert_close(quick_gelu(x), x / (1 + torch.exp(-1.702 * x)))
