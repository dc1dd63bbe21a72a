"""Tokens and the layout of prompts: real tokenizers of both kinds, and what transformers makes of them.

T5's `spiece.model` is written here as sentencepiece writes it, through transformers' own description of the format.
"""

from __future__ import annotations

import importlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Rust
from tokenizers import decoders, models, pre_tokenizers, trainers

import blip2
from blip2.errors import CheckpointError
from blip2.model import prefix
from blip2.weights import vocabulary
from published import config, opt, pictures, scramble, t5

convert = importlib.import_module("transformers.convert_slow_tokenizer")  # the package hides it behind a function
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
TEXTS = """
a dog runs on the beach
Question: how many dogs are there? Answer:
Question: is it day? Short answer:
two cats, one red ball.
the photo of a man with a hat
naïve café, 12 €
これは犬です
don't
it's 3/4 full!
""".strip().splitlines()
WIDE_A, WIDE_ONE = "\uff21", "\uff11"
STRANGE = [
    "", " ", "a", "  two  spaces ", "tab\there", "line\nline", "\u00a0hard\u2003space", "ﬁne ﬂag", WIDE_A + WIDE_ONE,
    "🐕 dog 🐕\u200d🦺", "</s>", "<pad> a </s> b", "<extra_id_0>", "\u200bzero", "é e\u0301", "x" * 300, "¿Qué?", "<s>",
    "\x00\x7f", "<image>",
]  # fmt: skip
FOLDS = {"ﬁ": "fi", WIDE_A: "A", WIDE_ONE: "1", "\t": " ", "\n": " ", "\u2003": " ", "\u00a0": " "}
PIECES = ["dog", "cat", "runs", "beach", "Question", "ﬁ", WIDE_A, "\t"]


def words(count: int, kind: str) -> Rust:
    """A tokenizer that learned from a few sentences."""
    if kind == "opt":
        rust = Rust(models.BPE())
        rust.pre_tokenizer, rust.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        special = ["<s>", "<pad>", "</s>", "<unk>"]
        trainer: Any = trainers.BpeTrainer(
            vocab_size=count, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        )
    else:
        rust = Rust(models.Unigram())
        rust.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always")
        trainer = trainers.UnigramTrainer(
            vocab_size=count, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
        )
    rust.train_from_iterator(TEXTS * 40, trainer)
    return rust


def charsmap(folds: dict[str, str]) -> bytes:
    """A table of characters in sentencepiece's form: one block of 256 units a node is wasteful, and simple."""
    texts, units, places = b"", [0] * 256, {b"": 0}
    leaves: dict[bytes, int] = {}
    for source, target in folds.items():
        leaves[source.encode()] = len(texts)
        texts += target.encode() + b"\0"
    nodes = sorted({key[:end] for key in leaves for end in range(len(key) + 1)}, key=lambda node: (len(node), node))
    for block, node in enumerate(nodes):  # the node's children stand in a block of their own
        place, base = places[node], 256 * (block + 1)
        units += [0] * 256
        units[place] |= (base ^ place) << 10 | (node in leaves) << 8
        if node in leaves:
            units[base] = 1 << 31 | leaves[node]
        for child in {other for other in nodes if len(other) == len(node) + 1 and other[:-1] == node}:
            places[child] = base ^ child[-1]
            units[places[child]] = child[-1]
    return struct.pack(f"<I{len(units)}I", 4 * len(units), *units) + texts


def write_spiece(rust: Rust, place: Path, characters: bytes = b"", kind: int = 1) -> None:
    proto = convert.import_protobuf().ModelProto()
    for word, score in json.loads(rust.to_str())["model"]["vocab"]:
        types = {"<pad>": 3, "</s>": 3, "<unk>": 2}
        proto.pieces.add(piece=word, score=score, type=types.get(word, 1))
    proto.trainer_spec.model_type = kind
    proto.trainer_spec.unk_id = 2
    proto.normalizer_spec.precompiled_charsmap = characters
    (place / "spiece.model").write_bytes(proto.SerializeToString())


def theirs_of_spiece(place: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """transformers' conversion; it wants sentencepiece to be installed, and then does not use it."""
    monkeypatch.setattr(convert, "requires_backends", lambda *_: None)
    return transformers.T5Tokenizer.from_pretrained(place)


@pytest.mark.parametrize("characters", [b"", charsmap(FOLDS)], ids=["as they are", "folded"])
def test_a_spiece_model_is_read_as_transformers_converts_it(
    characters: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write_spiece(words(150, "t5"), tmp_path, characters)
    theirs = theirs_of_spiece(tmp_path, monkeypatch)
    ours = vocabulary.read(tmp_path, bos=None, pad=0, stop_ids=(1,), end=1)
    assert ours.rust.get_vocab() == theirs.get_vocab()

    @settings(deadline=None, max_examples=300, derandomize=True)
    @given(st.text(max_size=40) | st.lists(st.sampled_from(PIECES)).map(" ".join))
    def same(text: str) -> None:
        expected = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode([text])[0] == expected
        assert ours.decode(expected) == theirs.decode(expected, skip_special_tokens=True)

    for text in TEXTS + STRANGE:
        same.hypothesis.inner_test(text)
    same()
    folded = ours.encode(["ﬁ"])[0] == ours.encode(["fi"])[0]
    assert folded == bool(characters)


def test_vocab_and_merges_are_read_as_transformers_reads_them(tmp_path: Path):
    words(400, "opt").model.save(str(tmp_path))
    settings_of = {"add_bos_token": True, "bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>"}
    theirs = transformers.GPT2Tokenizer.from_pretrained(tmp_path, pad_token="<pad>", **settings_of)
    ours = vocabulary.read(tmp_path, bos=2, pad=1, stop_ids=(2,))

    @settings(deadline=None, max_examples=300, derandomize=True)
    @given(st.text(max_size=40))
    def same(text: str) -> None:
        expected = theirs(text)["input_ids"]
        assert [2, *ours.encode([text])[0]] == expected
        assert ours.decode(expected) == theirs.decode(expected, skip_special_tokens=True)

    for text in TEXTS + [text for text in STRANGE if text not in ("<s>",)]:
        same.hypothesis.inner_test(text)
    same()


def damaged(data: bytes) -> dict[str, tuple[bytes, str]]:
    return {
        "cut short": (data[:-5], "ends within a field"),
        "empty": (b"", "0 pieces"),
        "a picture": ((Path(__file__).parents[2] / "docs" / "cat.jpg").read_bytes(), "damaged, or no sentencepiece"),
        "no text": (b"\x0a\x03\x0a\x01\xff" + data, "can't decode"),
        "endless": (b"\x80" * 20, "endless number"),
        "twice": (data + data, "there twice"),
        "no score": (b"\x0a\x08\x0a\x01q\x15" + struct.pack("<f", float("nan")) + data, "is nan"),
    }


@pytest.mark.parametrize("change", damaged(b""))
def test_a_damaged_spiece_model_is_named(change: str, tmp_path: Path):
    write_spiece(words(60, "t5"), tmp_path)
    path = tmp_path / "spiece.model"
    content, message = damaged(path.read_bytes())[change]
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"spiece\.model: .*{message}"):
        vocabulary.read(tmp_path, bos=None, pad=0, stop_ids=(1,), end=1)


def test_a_table_of_characters_that_leads_astray_and_another_kind_of_model_are_refused(tmp_path: Path):
    sound, rust = charsmap(FOLDS), words(60, "t5")
    outside = struct.pack("<II", 4, 0) + b"abc\0"
    no_text = sound[: 4 + int.from_bytes(sound[:4], "little")] + b"a\0"
    for characters, kind, message in (
        (outside, 1, "outside of itself"),
        (no_text, 1, "into no text"),
        (sound[:99], 1, "damaged, or no sentencepiece"),
        (sound, 2, "of kind 2"),
    ):
        write_spiece(rust, tmp_path, characters, kind)
        with pytest.raises(CheckpointError, match=message):
            vocabulary.read(tmp_path, bos=None, pad=0, stop_ids=(1,), end=1)
    write_spiece(rust, tmp_path, sound)
    (tmp_path / "tokenizer_config.json").write_text('{"extra_ids": 3}')
    ours = vocabulary.read(tmp_path, bos=None, pad=0, stop_ids=(1,), end=1)
    assert ours.rust.get_vocab_size() == len(json.loads(rust.to_str())["model"]["vocab"]) + 3
    (tmp_path / "tokenizer_config.json").write_text('{"extra_ids": "many"}')
    with pytest.raises(CheckpointError, match="extra_ids is 'many'"):
        vocabulary.read(tmp_path, bos=None, pad=0, stop_ids=(1,), end=1)


def opt_tokenizer(rust: Rust, place: Path) -> Any:
    rust.model.save(str(place))
    given = {"add_bos_token": True, "bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>"}
    return transformers.GPT2Tokenizer.from_pretrained(place, pad_token="<pad>", padding_side="left", **given)


def t5_tokenizer(rust: Rust, place: Path) -> Any:  # noqa: ARG001
    return transformers.T5Tokenizer(vocab=[(w, s) for w, s in json.loads(rust.to_str())["model"]["vocab"]])


@pytest.mark.parametrize(("language", "make"), [(opt, opt_tokenizer), (t5, t5_tokenizer)])
def test_a_processor_and_the_verbs_lay_a_prompt_out_alike(
    language: Callable[[], Any], make: Callable[[Rust, Path], Any], tmp_path: Path
):
    """From words and a picture to the embeddings that the language model reads, and back to words."""
    kind, text_config = language.__name__, language()
    tokenizer = make(words(300, kind), tmp_path)
    processor = transformers.Blip2Processor(
        transformers.BlipImageProcessorPil(size={"height": 28, "width": 28}), tokenizer, num_query_tokens=4
    )
    slot = tokenizer.convert_tokens_to_ids("<image>")
    text_config.vocab_size = slot + 1
    text_config.eos_token_id, text_config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    theirs = transformers.Blip2ForConditionalGeneration(config(text_config, slot=slot)).eval()
    scramble(theirs)
    theirs.generation_config.eos_token_id = tokenizer.eos_token_id
    theirs.generation_config.pad_token_id = tokenizer.pad_token_id
    theirs.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    ours = blip2.load(tmp_path, device="cpu", dtype="float32")
    both = processor(images=pictures(2), text="two cats", return_tensors="pt")
    assert (both["input_ids"] == slot).sum() == 4  # one picture's places; ours takes both, see test_differences
    written, own = ours.writer()
    features = ours.encode(pictures(1))
    for text in ["", "a photo of", "Question: how many dogs are there? Answer:", "  two  ﬁne cats", "naïve café 🐕"]:
        given = processor(images=pictures(1), text=text, return_tensors="pt")
        with torch.inference_mode():
            visual = ours.bridge.project(features.queries)
            found, lengths = prefix.build(written, visual, own.prompts([text]), own.bos, ours.config.prompts.visual)
            embeds = theirs.get_input_embeddings()(given["input_ids"])
            embeds[given["input_ids"] == slot] = visual[0]
            said = theirs.generate(**given, max_new_tokens=8, num_beams=5, do_sample=False)
        assert lengths.tolist() == [found.shape[1]]
        torch.testing.assert_close(found, embeds, rtol=0, atol=0)
        tokens = said[:, 0 if kind == "t5" else given["input_ids"].shape[1] :]
        expected = processor.batch_decode(tokens, skip_special_tokens=True)[0].strip()
        assert ours.caption(pictures(1), prompt=text, max_new_tokens=8) == [expected]
