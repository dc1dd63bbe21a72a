import dataclasses
import json
import sys

import pytest
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import blip2
import tiny_model
from blip2 import weights
from blip2.adapters.transformers_lm import TransformersLM
from blip2.blip2 import Blip2
from blip2.config import Blip2Config, PartConfig, QFormerConfig, VisionConfig
from blip2.errors import CheckpointError, ConfigError
from blip2.model.bridge import Bridge
from blip2.model.vision import VisionTransformer
from blip2.weights.bert import start_from_bert
from published import config, loaded, opt, pictures, t5

QFORMER = QFormerConfig(
    width=16, layers=2, heads=2, mlp_width=32, queries=4, encoder_width=12, vocab_size=30, positions=8
)
VISION = VisionConfig(image_size=14, patch_size=7, width=12, layers=1, heads=2, mlp_width=8)
CONFIG = Blip2Config(vision=VISION, qformer=QFORMER, embedding_width=8, language=PartConfig("lm", 20, "ab" * 32))


def test_a_model_comes_back_as_it_was_saved(tmp_path):
    bridge, vision = Bridge(CONFIG), VisionTransformer(VISION)
    weights.save(tmp_path, CONFIG, bridge, vision)
    back = weights.load(tmp_path)

    assert back.config == CONFIG
    torch.testing.assert_close(back.bridge.state_dict(), bridge.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(back.vision.state_dict(), vision.state_dict(), rtol=0, atol=0)
    assert not any(parameter.requires_grad for parameter in back.vision.parameters())


def test_words_of_a_frozen_part_are_not_saved_and_are_given_back(tmp_path):
    config = CONFIG.replace(vision=PartConfig("e", 12), qformer=dataclasses.replace(QFORMER, frozen_words=True))
    bridge = Bridge(config)
    weights.save(tmp_path, config, bridge, dtype=torch.float16)

    stored = load_file(tmp_path / "bridge.safetensors")
    assert "qformer.words.weight" not in stored
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    back = weights.load(tmp_path, words=bridge.qformer.words.weight).bridge
    assert not back.qformer.words.weight.requires_grad
    assert back.qformer.query_tokens.dtype == torch.float32
    with pytest.raises(CheckpointError, match=r"missing qformer\.words\.weight"):
        weights.load(tmp_path)


def test_the_written_vocabulary_comes_back_and_is_checked(tmp_path):
    words = torch.tensor([1, 5, 9])
    weights.save(tmp_path, CONFIG, Bridge(CONFIG), VisionTransformer(VISION), torch.float16, vocabulary=words)

    back = weights.load(tmp_path)
    assert back.config.vocabulary == 3
    torch.testing.assert_close(back.vocabulary, words, rtol=0, atol=0)
    for wrong in ([1, 5], [5, 1, 9], [1, 5, 5], [-1, 5, 9]):
        save_file({"ids": torch.tensor(wrong)}, tmp_path / "vocabulary.safetensors")
        with pytest.raises(CheckpointError, match="`ids`, 3 tokens in order"):
            weights.load(tmp_path)
    (tmp_path / "vocabulary.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"vocabulary\.safetensors: missing"):
        weights.load(tmp_path)


def test_what_does_not_fit_is_named(tmp_path):
    weights.save(tmp_path, CONFIG, Bridge(CONFIG), VisionTransformer(VISION))
    path = tmp_path / "bridge.safetensors"
    whole = load_file(path)
    cases = {
        "missing qformer.query_tokens": {k: v for k, v in whole.items() if k != "qformer.query_tokens"},
        "unexpected stranger": whole | {"stranger": torch.zeros(1)},
        r"heads.itm_head.weight is \[3, 16\], the configuration wants \[2, 16\]": whole
        | {"heads.itm_head.weight": torch.zeros(3, 16)},
    }
    for message, state in cases.items():
        save_file(state, path)
        with pytest.raises(CheckpointError, match=message):
            weights.load(tmp_path)


def test_a_damaged_file_a_missing_one_and_a_newer_format_are_errors_that_name_them(tmp_path):
    with pytest.raises(CheckpointError, match="no model here"):
        weights.load(tmp_path)
    weights.save(tmp_path, CONFIG, Bridge(CONFIG), VisionTransformer(VISION))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"format": 99, "new": 1}))
    with pytest.raises(ConfigError, match="format 99 is newer"):
        weights.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"qformer": config["qformer"] | {"widht": 3}}))
    with pytest.raises(ConfigError, match=r"qformer\.widht"):
        weights.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    path = tmp_path / "bridge.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"bridge\.safetensors: damaged"):
        weights.load(tmp_path)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"bridge\.safetensors: missing"):
        weights.load(tmp_path)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left on device")])
def test_a_failed_write_leaves_the_old_model_whole(tmp_path, monkeypatch, error):
    bridge = Bridge(CONFIG)
    weights.save(tmp_path, CONFIG, bridge, VisionTransformer(VISION))

    def full(*_: object) -> None:
        raise error

    monkeypatch.setattr(sys.modules["blip2.weights.save"], "save_file", full)
    with pytest.raises(CheckpointError, match="No space left"):
        weights.save(tmp_path, CONFIG, Bridge(CONFIG), VisionTransformer(VISION))
    torch.testing.assert_close(weights.load(tmp_path).bridge.state_dict(), bridge.state_dict(), rtol=0, atol=0)
    assert {path.name for path in tmp_path.iterdir()} == {
        "README.md",
        "config.json",
        "bridge.safetensors",
        "vision.safetensors",
    }


def test_a_qformer_started_from_bert_reads_text_as_bert_does():
    bert = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
            max_position_embeddings=8,
        )
    ).eval()  # fmt: skip
    bridge = Bridge(CONFIG).eval()
    start_from_bert(bridge.qformer, bert.state_dict())
    ids = torch.tensor([[1, 5, 7, 2], [1, 9, 2, 0]])

    expected = bert(ids, attention_mask=(ids != 0).long()).last_hidden_state

    torch.testing.assert_close(bridge.qformer.read(ids)[ids != 0], expected[ids != 0], atol=1e-5, rtol=1e-5)
    layer = bridge.qformer.layers[0]
    torch.testing.assert_close(layer.query_feed_forward.up.weight, layer.text_feed_forward.up.weight)


def test_a_bert_of_another_shape_is_refused_by_name():
    bridge = Bridge(CONFIG)
    with pytest.raises(CheckpointError, match=r"has no embeddings\.LayerNorm\.weight"):
        start_from_bert(bridge.qformer, {})


def same_model(one: Blip2, other: Blip2) -> None:
    assert one.config == other.config
    for part in ("bridge", "encoder", "language"):
        mine, theirs = getattr(one, part), getattr(other, part)
        assert type(mine) is type(theirs)
        if mine is not None:
            torch.testing.assert_close(theirs.state_dict(), mine.state_dict(), rtol=0, atol=0)
    for tokenizer in ("tokenizer", "text_tokenizer"):
        mine, theirs = getattr(one, tokenizer), getattr(other, tokenizer)
        assert (mine is None) == (theirs is None)
        if mine is not None:
            assert mine.rust.to_str() == theirs.rust.to_str()
            assert [getattr(mine, key) for key in IDS] == [getattr(theirs, key) for key in IDS]


IDS = ("bos", "pad", "stop_ids", "end", "frame")


@pytest.mark.parametrize("kind", [opt, t5])
def test_a_model_with_its_own_language_model_comes_back_whole(tmp_path, kind):
    _, model = loaded(config(kind()), tmp_path / "theirs")
    model.save(tmp_path / "ours")
    back = blip2.load(tmp_path / "ours", device="cpu", dtype="float32")
    same_model(model, back)
    again = model.caption(pictures(2), prompt="w5 w9", max_new_tokens=6)
    assert back.caption(pictures(2), prompt="w5 w9", max_new_tokens=6) == again
    half = blip2.load(tmp_path / "ours", device="cpu", dtype="float16")
    assert half.language.words.weight.dtype == torch.float16
    assert half.bridge.qformer.query_tokens.dtype == torch.float32
    names = {"README.md", "bridge.safetensors", "config.json", "language-tokenizer.json", "language.safetensors"}
    assert {path.name for path in (tmp_path / "ours").iterdir()} == names | {"tokenizers.json", "vision.safetensors"}
    card = (tmp_path / "ours" / "README.md").read_text()
    assert "OPT" in card or "Flan-T5" in card


def test_a_model_that_matches_keeps_its_tokenizer(tmp_path):
    model = tiny_model.build(language=False)
    model.save(tmp_path)
    back = blip2.load(tmp_path, device="cpu", dtype="float32")
    same_model(model, back)
    matches = model.match(tiny_model.picture(0), "a dog runs")
    torch.testing.assert_close(back.match(tiny_model.picture(0), "a dog runs").itm, matches.itm, rtol=0, atol=0)


def test_weights_that_are_not_the_plain_language_model_s_are_not_saved(tmp_path):
    theirs, model = loaded(config(opt()), tmp_path / "theirs")
    other = dataclasses.replace(model, language=TransformersLM(theirs.language_model))
    with pytest.raises(CheckpointError, match=r"not the plain opt of its configuration .* quantised"):
        other.save(tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("language.safetensors", r"language\.safetensors: missing"),
        ("tokenizers.json", "names no tokenizer of the language model"),
        ("language-tokenizer.json", r"language-tokenizer\.json: not a readable"),
        ("cut", r"language\.safetensors: damaged"),
        ("ids", r"tokenizers\.json: language\.stop_ids: .*valid"),
        ("more", r"unexpected stranger"),
    ],
)
def test_a_language_model_that_is_not_whole_is_named(tmp_path, change, message):
    _, model = loaded(config(opt()), tmp_path / "theirs")
    place = tmp_path / "ours"
    model.save(place)
    if change == "cut":
        (place / "language.safetensors").write_bytes((place / "language.safetensors").read_bytes()[:-9])
    elif change == "ids":
        values = json.loads((place / "tokenizers.json").read_text())
        values["language"]["stop_ids"] = "end"
        (place / "tokenizers.json").write_text(json.dumps(values))
    elif change == "more":
        save_file(
            load_file(place / "language.safetensors") | {"stranger": torch.ones(1)}, place / "language.safetensors"
        )
    else:
        (place / change).unlink()
    with pytest.raises(CheckpointError, match=message):
        blip2.load(place, device="cpu")


@pytest.mark.parametrize("failing", range(1, 4))
def test_a_save_that_fails_leaves_the_old_model_whole(tmp_path, monkeypatch, failing):
    """Whichever of its three files of weights is the one that the disk has no room for."""
    _, model = loaded(config(opt()), tmp_path / "theirs")
    place = tmp_path / "ours"
    model.save(place)
    before = {path.name: path.read_bytes() for path in place.iterdir()}
    for part in (model.bridge, model.encoder, model.language):
        for parameter in part.parameters():
            parameter.data.add_(1)
    written = []

    def full(state: dict[str, torch.Tensor], path: object) -> None:
        written.append(path)
        if len(written) == failing:
            raise OSError(28, "No space left on device")
        save_file(state, path)

    monkeypatch.setattr(sys.modules["blip2.weights.save"], "save_file", full)
    with pytest.raises(CheckpointError, match="No space left"):
        model.save(place)
    assert {path.name: path.read_bytes() for path in place.iterdir()} == before
