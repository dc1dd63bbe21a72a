"""Whole models: saved by transformers, loaded by `blip2.load`, and the same numbers and tokens from pixels to text.

Every tolerance is for float32 sums in another order; the worst difference seen was 3e-6 of the largest value.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import blip2
from blip2.blip2 import Blip2
from blip2.decoding import Decoding
from blip2.errors import CheckpointError
from blip2.model.bridge import Bridge
from blip2.weights import transformers as format
from blip2.weights import verify
from published import BERT, CLOSE, WORDS, config, loaded, opt, pictures, pixels, save, scramble, t5


@pytest.fixture(scope="module", params=[opt, t5])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Blip2]:
    return loaded(config(request.param()), tmp_path_factory.mktemp("saved"))


@torch.no_grad()
def test_patches_queries_and_the_visual_prefix_are_the_same(pair: tuple[Any, Blip2]):
    theirs, ours = pair
    features = ours.encode(pictures(3))
    seen = theirs.vision_model(pixels(ours, pictures(3))).last_hidden_state
    torch.testing.assert_close(ours.bridge.vision_norm(features.patches), seen, **CLOSE)
    queries = theirs.qformer(query_embeds=theirs.query_tokens.expand(3, -1, -1), encoder_hidden_states=seen)
    torch.testing.assert_close(features.queries, queries.last_hidden_state, **CLOSE)
    prefix = theirs.language_projection(queries.last_hidden_state)
    torch.testing.assert_close(ours.bridge.project(features.queries), prefix, **CLOSE)


METHODS: list[dict[str, Any]] = [
    {"max_new_tokens": 9},
    {"max_new_tokens": 9, "num_beams": 5},
    {"max_new_tokens": 12, "num_beams": 5, "length_penalty": -1.0},
    {"max_new_tokens": 12, "num_beams": 3, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    {"max_new_tokens": 12, "min_new_tokens": 6, "num_beams": 5, "num_return_sequences": 3},
    {"max_new_tokens": 20, "min_new_tokens": 4, "repetition_penalty": 0.8},
    {"max_new_tokens": 16, "num_beams": 4, "length_penalty": 2.0, "early_stopping": True},
    {"max_new_tokens": 7, "num_beams": 2, "no_repeat_ngram_size": 3, "repetition_penalty": 1.1},
]
OURS = {"no_repeat_ngram_size": "no_repeat_ngram", "num_return_sequences": "num_captions"}


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("prompt", ["", "w5 w9", "w7 w1 w30 w2"])
def test_tokens_are_the_same(pair: tuple[Any, Blip2], method: dict[str, Any], prompt: str):
    theirs, ours = pair
    images = pictures(8)
    t5 = theirs.config.text_config.model_type == "t5"
    words = [WORDS.index(word) for word in prompt.split()]
    row = [60] * 4 + ([*words, 1] if t5 else [2, *words])
    ids = torch.tensor([row] * len(images))
    arguments = {"length_penalty": 1.0, **method}
    given: dict[str, Any] = {"input_ids": ids}
    if "repetition_penalty" in method and not t5:  # as LAVIS calls it; by their ids words of the prompt count as said
        given = {"inputs_embeds": theirs.get_input_embeddings()(ids), "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        expected = theirs.generate(pixel_values=pixels(ours, images), do_sample=False, **given, **arguments)
    written = expected[:, 1:] if t5 else expected[:, ids.shape[1] * ("input_ids" in given) :]
    options: dict[str, Any] = {OURS.get(key, key): value for key, value in {"num_beams": 1, **arguments}.items()}
    found = ours.caption(images, prompt=prompt, details=True, **options)
    rows = [text for row in found for text in (row if isinstance(row, list) else [row])]
    assert len(rows) == len(written)
    for text, tokens in zip(rows, written.tolist(), strict=True):
        end = tokens.index(1) if 1 in tokens else len(tokens)
        assert list(text.ids) == tokens[:end]


@pytest.mark.parametrize("beams", [1, 5])
def test_ragged_prompts_in_one_batch_give_what_each_gives_alone(pair: tuple[Any, Blip2], beams: int):
    theirs, ours = pair
    images, prompts = pictures(5), ["w1", "", "w3 w4 w5 w6 w7 w8", "w9 w2", "w11 w12 w13"]
    t5 = theirs.config.text_config.model_type == "t5"
    limits = {"max_new_tokens": 10, "num_beams": beams}
    found = ours.write(ours.encode(images), prompts, Decoding.of(limits))
    for image, prompt, [text] in zip(images, prompts, found, strict=True):
        words = [WORDS.index(word) for word in prompt.split()]
        ids = torch.tensor([[60] * 4 + ([*words, 1] if t5 else [2, *words])])
        with torch.no_grad():
            alone = theirs.generate(pixel_values=pixels(ours, [image]), input_ids=ids, do_sample=False, **limits)[0]
        tokens = (alone[1:] if t5 else alone[ids.shape[1] :]).tolist()
        assert list(text.ids) == tokens[: tokens.index(1) if 1 in tokens else len(tokens)]


@pytest.fixture(scope="module")
def retrieval(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Blip2]:
    whole = config(opt(), slot=None)  # without placeholders before the text, as the published models were
    whole.qformer_config.use_qformer_text_input = True
    theirs = transformers.Blip2ForImageTextRetrieval(whole).eval()
    scramble(theirs)
    place = tmp_path_factory.mktemp("retrieval")
    save(theirs, place, BERT)
    values = json.loads((place / "config.json").read_text())
    ours = blip2.load(place, device="cpu", dtype="float32")
    assert values["architectures"] == ["Blip2ForImageTextRetrieval"]
    return theirs, ours


@torch.no_grad()
def test_matching_and_embeddings_are_the_same(retrieval: tuple[Any, Blip2]):
    theirs, ours = retrieval
    images, texts = pictures(3), ["w5 w9", "w7 w1 w30 w2 w8", "w4"]
    frame = ours.config.qformer.cls_id, ours.config.qformer.sep_id
    assert ours.text_tokenizer is not None
    words = dataclasses.replace(ours.text_tokenizer, frame=(1, 2))
    model = dataclasses.replace(ours, text_tokenizer=words)  # a vocabulary of 60 words has no token 101
    assert frame == (101, 102)
    matches = model.match(images, texts)
    vectors, written = model.embed_images(images), model.embed_texts(texts)
    for row, text in enumerate(texts):
        ids = torch.tensor(words.encode([text]))
        arguments = {"pixel_values": pixels(ours, images), "input_ids": ids.expand(3, -1)}
        mask = torch.ones_like(arguments["input_ids"])
        itm = theirs(**arguments, attention_mask=mask, use_image_text_matching_head=True)
        torch.testing.assert_close(matches.itm[:, row], itm.logits_per_image.softmax(1)[:, 1], **CLOSE)
        itc = theirs(**arguments, attention_mask=mask, use_image_text_matching_head=False)
        torch.testing.assert_close(vectors, itc.image_embeds, **CLOSE)
        torch.testing.assert_close(written[row], itc.text_embeds[0].reshape(-1), **CLOSE)
        torch.testing.assert_close(matches.itc[:, row], itc.logits_per_image[:, 0], **CLOSE)


@pytest.mark.parametrize("shards", [False, True])
def test_shards_and_pickles_load_as_one_file_does(pair: tuple[Any, Blip2], shards: bool, tmp_path: Path):
    theirs, ours = pair
    if shards:
        save(theirs, tmp_path, max_shard_size="20KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 2
    else:
        save(theirs, tmp_path)
        (tmp_path / "model.safetensors").unlink()
        torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    again = blip2.load(tmp_path, device="cpu", dtype="float32")
    for part in ("bridge", "encoder", "language"):
        expected = getattr(ours, part).state_dict()
        found = getattr(again, part).state_dict()
        if part == "language":  # a pickle holds copies of tied weights, and then the head counts as its own
            found = {name: tensor for name, tensor in found.items() if name in expected}
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_head_that_is_not_the_embeddings_it_should_be_tied_to_is_an_error(tmp_path: Path):
    theirs = transformers.Blip2ForConditionalGeneration(config(opt()))
    save(theirs, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    state = dict(theirs.state_dict())
    state["language_model.lm_head.weight"] = state["language_model.lm_head.weight"] + 1
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is not .*embed_tokens\.weight"):
        blip2.load(tmp_path, device="cpu")
    with pytest.raises(CheckpointError, match="holds a model of another format"):
        format.save(blip2.load("mini"), tmp_path)


def damaged(theirs: Any, place: Path, change: str) -> None:
    save(theirs, place)
    path = place / "model.safetensors"
    if change == "cut short":
        path.write_bytes(path.read_bytes()[:-100])
    elif change == "code in a pickle":
        path.unlink()
        (place / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Path("/")}))
    elif change == "no tokenizer":
        (place / "tokenizer.json").unlink()
    else:
        values = json.loads((place / "config.json").read_text())
        section, key, value = change.split(" ")
        (values if section == "-" else values[section])[key] = json.loads(value)
        (place / "config.json").write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("cut short", "damaged or no safetensors"),
        ("code in a pickle", "cannot be read as weights alone"),
        ("no tokenizer", r"tokenizer\.json: missing; save the processor"),
        ('- model_type "llava"', "'llava', not 'blip-2'"),
        ("vision_config num_hidden_layers 3", r"missing vision_model\.encoder\.layers\.2\.layer_norm1\.bias"),
        ("vision_config num_hidden_layers 1", r"unexpected vision_model\.encoder\.layers\.1\.layer_norm1\.bias"),
        ("- num_query_tokens 5", r"query_tokens is \[1, 4, 16\], the configuration wants \[1, 5, 16\]"),
        ('text_config model_type "llama"', "kind 'llama'"),
        ('qformer_config hidden_act "relu"', "hidden_act is 'relu', only 'gelu' is known"),
        ('vision_config hidden_act "relu"', "Input should be 'gelu' or 'quick_gelu'"),
        ("vision_config num_hidden_layers 1000000000", "our layers would be 1000000000, not 1 to 1,048,576"),
        ("vision_config num_attention_heads 5", "5 heads cannot share a width of 12"),
        ("qformer_config cross_attention_frequency 0", "our cross_attention_every would be 0|cannot be understood"),
        ('vision_config hidden_size "wide"', "cannot be understood"),
        ("- vision_config [1]", "cannot be understood"),
    ],
)
def test_what_cannot_be_loaded_is_named(change: str, message: str, tmp_path: Path):
    theirs = transformers.Blip2ForConditionalGeneration(config(opt()))
    damaged(theirs, tmp_path, change)
    with pytest.raises(CheckpointError, match=message):
        blip2.load(tmp_path, device="cpu", dtype="float32")


def test_verify_finds_both_alike_and_says_where_they_are_not(
    pair: tuple[Any, Blip2], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    save(pair[0], tmp_path)
    photo = Path(__file__).parents[2] / "docs" / "cat.jpg"
    lines = verify.verify(str(tmp_path), [photo], ["", "w5 w9"])
    assert [line.what for line in lines if not line.equal] == []
    assert {"patches", "first logits after 'w5 w9'", "5 beams after ''"} <= {line.what for line in lines}

    build = format.build_language
    monkeypatch.setattr(format, "build_language", lambda config: shifted(build(config)))
    wrong = [line.what for line in verify.verify(str(tmp_path), [photo], ["w5"]) if not line.equal]
    assert wrong[0] == "first logits after 'w5'"


def shifted(model: Any) -> Any:
    logits = model.logits
    model.logits = lambda hidden, vocabulary=None: logits(hidden, vocabulary).roll(1, -1)
    return model


def same_model(one: Blip2, other: Blip2) -> None:
    for part in ("bridge", "encoder", "language"):
        if getattr(one, part) is not None:
            torch.testing.assert_close(
                getattr(other, part).state_dict(), getattr(one, part).state_dict(), rtol=0, atol=0
            )


@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
def test_what_we_save_transformers_loads_and_nothing_is_changed(
    pair: tuple[Any, Blip2], shard_bytes: int, tmp_path: Path
):
    theirs, ours = pair
    format.save(ours, tmp_path, shard_bytes=shard_bytes)
    again = transformers.Blip2ForConditionalGeneration.from_pretrained(tmp_path)
    expected, found = theirs.state_dict(), again.state_dict()
    assert expected.keys() == found.keys()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    back = blip2.load(tmp_path, device="cpu", dtype="float32")
    assert back.config == ours.config
    assert back.tokenizer is not None
    assert ours.tokenizer is not None
    assert (back.tokenizer.stop_ids, back.tokenizer.bos) == (ours.tokenizer.stop_ids, ours.tokenizer.bos)
    same_model(ours, back)


def test_what_the_format_lacks_is_kept_beside_it(retrieval: tuple[Any, Blip2], tmp_path: Path):
    _, ours = retrieval
    torch.manual_seed(2)
    bridge = Bridge(ours.config.replace(word_head=True))
    model = dataclasses.replace(ours, bridge=bridge, config=bridge.config)
    format.save(model, tmp_path)
    back = blip2.load(tmp_path, device="cpu", dtype="float32")
    assert back.config == model.config
    same_model(model, back)
    transformers.Blip2ForImageTextRetrieval.from_pretrained(tmp_path)


def test_saving_over_another_model_leaves_nothing_of_it(
    pair: tuple[Any, Blip2], retrieval: tuple[Any, Blip2], tmp_path: Path
):
    _, ours = pair
    format.save(retrieval[1], tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 33}')
    format.save(ours, tmp_path, shard_bytes=20_000)
    format.save(ours, tmp_path)
    names = ["README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    same_model(ours, blip2.load(tmp_path, device="cpu", dtype="float32"))
