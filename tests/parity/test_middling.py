"""Parity at a middling size: width 256, four layers, eight heads, several hundred positions' worth of sums.

Weights are as at initialisation, and what is compared is the largest difference over the largest value: at these widths
single numbers near zero are sums of large ones. The worst seen is 9e-7, from float32 sums in another order; the promise
is 1e-4.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from blip2.blip2 import Blip2
from blip2.config import VisionConfig
from blip2.model import prefix
from blip2.model.vision import VisionTransformer
from blip2.weights.maps import lavis
from blip2.weights.rules import to_ours
from published import WORDS, config, loaded, pictures, pixels

PROMISE = 1e-4
VISION = {
    "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8, "image_size": 112,
    "patch_size": 14, "hidden_act": "gelu",
}  # fmt: skip
QFORMER = {
    "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8, "intermediate_size": 1024,
    "encoder_hidden_size": 256, "vocab_size": 500, "max_position_embeddings": 64,
}  # fmt: skip


def opt() -> Any:
    return transformers.OPTConfig(
        vocab_size=512, hidden_size=256, word_embed_proj_dim=256, ffn_dim=1024, num_hidden_layers=4,
        num_attention_heads=8, max_position_embeddings=256, pad_token_id=0, bos_token_id=2, eos_token_id=1,
    )  # fmt: skip


def t5() -> Any:
    return transformers.T5Config(
        vocab_size=512, d_model=256, d_kv=32, d_ff=1024, num_layers=4, num_heads=8, feed_forward_proj="gated-gelu",
        dense_act_fn="gelu", pad_token_id=0, bos_token_id=1, eos_token_id=1, decoder_start_token_id=0,
        tie_word_embeddings=False,
    )  # fmt: skip


@pytest.fixture(scope="module", params=[opt, t5])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Blip2]:
    torch.manual_seed(8)
    whole = config(request.param(), vision=VISION, qformer=QFORMER, slot=511, queries=32)
    return loaded(whole, tmp_path_factory.mktemp("saved"), scrambled=False)


def close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert float((found - expected).abs().max() / expected.abs().max()) < PROMISE


@torch.no_grad()
def test_vision_queries_and_logits_step_by_step(pair: tuple[Any, Blip2]):
    theirs, ours = pair
    language, tokenizer = ours.writer()
    images = pictures(3)
    seen = theirs.vision_model(pixels(ours, images)).last_hidden_state
    features = ours.encode(images)
    close(ours.bridge.vision_norm(features.patches), seen)
    queries = theirs.qformer(query_embeds=theirs.query_tokens.expand(3, -1, -1), encoder_hidden_states=seen)
    close(features.queries, queries.last_hidden_state)
    visual = ours.bridge.project(features.queries)
    close(visual, theirs.language_projection(queries.last_hidden_state))

    prompts = tokenizer.prompts(["", "w5 w9 w1 w30 w2 w8 w44", "w3"])
    follow = torch.randint(3, 512, (3, 12), generator=torch.Generator().manual_seed(1))
    logits, cache = language.prefill(*prefix.build(language, visual, prompts, tokenizer.bos, "before_bos"))
    found = [logits, *(language.step(ids, cache) for ids in follow.T)]
    for row, prompt in enumerate(prompts):  # each alone: nothing of theirs depends on padding
        start = [511] * 32 + ([] if tokenizer.bos is None else [tokenizer.bos]) + prompt
        given: dict[str, Any] = {"pixel_values": pixels(ours, images[row : row + 1])}
        if tokenizer.bos is None:
            given["input_ids"] = torch.tensor([start])
            given["decoder_input_ids"] = torch.cat([torch.zeros(1, 1, dtype=torch.int64), follow[row : row + 1]], 1)
        else:
            given["input_ids"] = torch.cat([torch.tensor([start]), follow[row : row + 1]], 1)
        expected = theirs(**given, attention_mask=torch.ones_like(given["input_ids"])).logits[0, -13:]
        close(torch.stack([step[row] for step in found]), expected)


@torch.no_grad()
def test_greedy_and_five_beams_write_the_same(pair: tuple[Any, Blip2]):
    theirs, ours = pair
    images, words = pictures(4), [WORDS.index(word) for word in ("w5", "w9")]
    _, tokenizer = ours.writer()
    start = [*([] if tokenizer.bos is None else [tokenizer.bos]), *words, *([tokenizer.end] if tokenizer.end else [])]
    ids = torch.tensor([[511] * 32 + start]).expand(4, -1)
    skipped = 1 if tokenizer.bos is None else ids.shape[1]
    for beams in (1, 5):
        limits = {"max_new_tokens": 12, "num_beams": beams}
        written = theirs.generate(pixel_values=pixels(ours, images), input_ids=ids, do_sample=False, **limits)
        found = ours.caption(images, prompt="w5 w9", details=True, **limits)
        for text, row in zip(found, written[:, skipped:].tolist(), strict=True):
            assert list(text.ids) == row[: row.index(1) if 1 in row else len(row)]


@torch.no_grad()
def test_a_retrieval_model_matches_and_embeds_as_theirs(tmp_path: Path):
    import blip2
    from published import BERT, save

    torch.manual_seed(9)
    whole = config(opt(), vision=VISION, qformer={**QFORMER, "use_qformer_text_input": True}, slot=None, queries=32)
    theirs = transformers.Blip2ForImageTextRetrieval(whole).eval()
    save(theirs, tmp_path, BERT)
    ours = blip2.load(tmp_path, device="cpu", dtype="float32")
    words = dataclasses.replace(ours.text_tokenizer, frame=(1, 2))  # type: ignore[type-var]
    model = dataclasses.replace(ours, text_tokenizer=words)  # a vocabulary of 500 words has no token 101 for [CLS]
    images, texts = pictures(2), ["w5 w9", "w7 w1 w30 w2 w8 w4 w11"]
    matches = model.match(images, texts)  # a ragged batch
    for row, text in enumerate(texts):
        ids = torch.tensor(words.encode([text])).expand(2, -1)
        given = {"pixel_values": pixels(ours, images), "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        itm = theirs(**given, use_image_text_matching_head=True).logits_per_image.softmax(1)[:, 1]
        close(matches.itm[:, row], itm)
        itc = theirs(**given, use_image_text_matching_head=False)
        close(matches.itc[:, row], itc.logits_per_image[:, 0])
        close(model.embed_images(images), itc.image_embeds)
        close(model.embed_texts([text])[0], itc.text_embeds[0].reshape(-1))


# transformers' CLIP by the names that LAVIS's file of the image encoder has; the attention's three are one there.
CLIP_NAMES = {
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "ln_pre": "pre_layrnorm",
}
CLIP_LAYER = {
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def clip_file(state: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """What `clip_vit_L.pth` would hold of a CLIP of transformers."""
    names = dict(CLIP_NAMES)
    for layer in range(layers):
        block = f"transformer.resblocks.{layer}."
        names |= {f"{block}{theirs}": f"encoder.layers.{layer}.{hers}" for theirs, hers in CLIP_LAYER.items()}
    found = {
        name + end: state[source + end]
        for name, source in names.items()
        for end in ("", ".weight", ".bias")
        if source + end in state
    }
    for layer in range(layers):
        for kind in ("weight", "bias"):
            parts = [state[f"encoder.layers.{layer}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            found[f"transformer.resblocks.{layer}.attn.in_proj_{kind}"] = torch.cat(parts)
    return found


@torch.no_grad()
def test_the_layout_of_clip_gives_what_its_second_last_layer_gives_in_transformers():
    """BLIP-2 takes 23 of ViT-L's 24 layers and no norm after them."""
    torch.manual_seed(6)
    clip = transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig(
            hidden_size=256, intermediate_size=1024, num_hidden_layers=5, num_attention_heads=8, image_size=112,
            patch_size=14, hidden_act="quick_gelu",
        )
    ).eval()  # fmt: skip
    for name, parameter in clip.named_parameters():
        if name.endswith("bias"):  # zero at the start, and then nobody would see one that is lost
            parameter.normal_(std=0.1)
    state = {name.removeprefix("vision_model."): tensor for name, tensor in clip.state_dict().items()}
    shape = VisionConfig(
        image_size=112, width=256, layers=4, heads=8, mlp_width=1024, norm_eps=1e-5, activation="quick_gelu",
        key_bias=True, pre_norm=True, patch_bias=False,
    )  # fmt: skip
    ours = VisionTransformer(shape).eval()
    tensors = to_ours(lavis.vision(shape), clip_file(state, 4), "CLIP")
    ours.load_state_dict({name.removeprefix("vision."): tensor for name, tensor in tensors.items()})
    images = torch.randn(2, 3, 112, 112)
    close(ours(images), clip(images, output_hidden_states=True).hidden_states[-2])
