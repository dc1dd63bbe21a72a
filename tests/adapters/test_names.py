"""The tables of names, and language models in a directory: tiny random ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from blip2 import adapters
from blip2.adapters.parts import fingerprint
from blip2.config import PRESETS, PartConfig
from blip2.errors import CheckpointError, ConfigError
from blip2.protocols import LanguageModel

IDS: dict[str, Any] = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
WORDS = ["<pad>", "</s>", "<s>", "<unk>", "a", "dog", "runs"]


def _causal() -> Any:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=32, vocab_size=len(WORDS), **IDS)
    )


def _seq2seq() -> Any:
    config = transformers.T5Config(
        d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, vocab_size=len(WORDS), decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


def _write(directory: Path, model: Any) -> PartConfig:
    model.save_pretrained(directory)
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: index for index, word in enumerate(WORDS)}, "<unk>")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(directory / "tokenizer.json"))
    return PartConfig(f"transformers:{directory}", width=16)


@pytest.mark.parametrize("make", [_causal, _seq2seq])
def test_any_directory_of_transformers_is_a_language_model(make: Any, tmp_path: Path) -> None:
    model = make().eval()
    language, tokenizer = adapters.language_model(_write(tmp_path, model))
    assert isinstance(language, LanguageModel)
    assert tokenizer.encode(["a dog runs"]) == [[4, 5, 6]]
    assert (tokenizer.pad, tokenizer.stop_ids) == (0, (1,))
    assert tokenizer.bos == model.generation_config.bos_token_id
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(language.model.state_dict()[name], tensor, rtol=0, atol=0)


def test_a_part_that_fits_the_hash_loads_and_another_does_not(tmp_path: Path) -> None:
    part = _write(tmp_path, _causal())
    expected = fingerprint([tmp_path / "model.safetensors"])
    assert adapters.sha256(part) == expected
    adapters.language_model(PartConfig(part.name, width=16, sha256=expected))
    for check in (adapters.language_model, adapters.verify):
        with pytest.raises(CheckpointError, match=f"{tmp_path.name}: its files have the SHA-256 {expected}, .* f00"):
            check(PartConfig(part.name, width=16, sha256="f00"))


def test_every_part_of_mini_is_known_by_its_width_and_verifies() -> None:
    mini = PRESETS["mini"]
    for part, load in (
        (mini.vision, adapters.image_encoder),
        (mini.text, adapters.text_part),
        (mini.language, adapters.language_model),
    ):
        assert isinstance(part, PartConfig)
        found = PartConfig(part.name, part.width, adapters.sha256(part))
        adapters.verify(found)
        with pytest.raises(ConfigError, match=rf"{part.name}: .* width 7, but it has {part.width}"):
            load(PartConfig(part.name, width=7))
        with pytest.raises(CheckpointError, match=f"{part.name}: its files have the SHA-256"):
            load(PartConfig(part.name, part.width, sha256="0" * 64))


def test_an_unknown_name_is_an_error_that_lists_the_known() -> None:
    part = PartConfig("resnet-50", width=2048)
    with pytest.raises(ConfigError, match=r"no image encoder is called 'resnet-50'; known: .*, transformers:DIRECTORY"):
        adapters.image_encoder(part)
    with pytest.raises(ConfigError, match="known: gemma-3-270m, transformers:DIRECTORY"):
        adapters.language_model(part)
    with pytest.raises(ConfigError, match="no text part is called 'resnet-50'; known: minilm-l6"):
        adapters.text_part(part)
    with pytest.raises(ConfigError, match="known: efficientnet-lite2, efficientnet-lite2-levels, gemma-3-270m"):
        adapters.sha256(part)


def test_pickled_weights_are_never_opened(tmp_path: Path) -> None:
    part = _write(tmp_path, _causal())
    torch.save({}, tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors here"):
        adapters.language_model(part)


def test_code_in_the_directory_is_never_run(tmp_path: Path) -> None:
    part = _write(tmp_path, _causal())
    proof = tmp_path / "it ran"
    (tmp_path / "theirs.py").write_text(f"open({str(proof)!r}, 'w')\n")
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "theirs", "auto_map": {"AutoConfig": "theirs.C", "AutoModelForCausalLM": "theirs.M"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="transformers cannot load it"):
        adapters.language_model(part)
    assert not proof.exists()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_damaged_file_is_an_error_that_names_the_directory(name: str, tmp_path: Path) -> None:
    part = _write(tmp_path, _causal())
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        adapters.language_model(part)


def test_a_model_that_never_stops_is_an_error(tmp_path: Path) -> None:
    model = _causal()
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    with pytest.raises(CheckpointError, match="eos_token_id"):
        adapters.language_model(_write(tmp_path, model))


@pytest.mark.parametrize("stored", [None, torch.zeros(2, 2)])
def test_a_tensor_that_is_missing_or_of_another_shape_is_an_error(stored: Tensor | None, tmp_path: Path) -> None:
    part = _write(tmp_path, _causal())
    tensors = load_file(tmp_path / "model.safetensors")
    name = "transformer.h.1.attn.c_attn.weight"
    del tensors[name]
    if stored is not None:
        tensors[name] = stored
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{tmp_path}: .*{name}"):
        adapters.language_model(part)


def test_loading_leaves_the_bars_of_transformers_as_they_were(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    part = _write(tmp_path, _causal())
    capsys.readouterr()
    assert transformers.utils.logging.is_progress_bar_enabled()
    adapters.language_model(part)
    assert transformers.utils.logging.is_progress_bar_enabled()
    assert capsys.readouterr() == ("", "")
