"""Files that are damaged, hostile, of other models or half there: a clear error, no code run, nothing left to trust."""

from __future__ import annotations

import errno
import http.server
import json
import os
import pickle
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

import blip2
from blip2.blip2 import Blip2
from blip2.errors import Blip2Error, CheckpointError
from blip2.weights import hub, lavis, paddle, pdparams, sentencepiece
from blip2.weights import transformers as hers
from published import config, loaded, opt, t5

SHARD = 20_000  # bytes


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Blip2]:
    """A sound directory of several shards."""
    place = tmp_path_factory.mktemp("whole")
    _, model = loaded(config(opt()), place / "saved")
    hers.save(model, place / "shards", shard_bytes=SHARD)
    return place / "shards", model


@pytest.fixture
def place(whole: tuple[Path, Blip2], tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole[0], tmp_path / "model"))


def refused(place: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        blip2.load(place, device="cpu", dtype="float32")
    assert "\n" not in str(caught.value)


def change(place: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads((place / "config.json").read_text())
    edit(values)
    (place / "config.json").write_text(json.dumps(values))


# -- code --------------------------------------------------------------------------------------------------------------


class Command:
    """Touches a file where it is unpickled by a reader that runs what it reads."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("zipped", [False, True], ids=["pickle", "zip"])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00001.bin", "model.pth", "pdparams"])
def test_code_in_a_pickle_is_not_run(place: Path, name: str, zipped: bool, tmp_path: Path):
    mark = tmp_path / "ran"
    content = {"query_tokens": torch.zeros(1), "model": Command(mark)}
    for path in place.glob("model*"):
        path.unlink()
    path = place / {"pdparams": paddle.FILE}.get(name, name)
    if zipped:
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps({"model": Command(mark)}, protocol=2))
    if "-of-" in name:
        (place / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"query_tokens": name}}))
    refused(path if path.suffix == lavis.SUFFIX else place, path.name)
    assert not mark.exists()
    if not zipped:
        pickle.loads(path.read_bytes())  # and run it would have
        assert mark.exists()


# -- damaged and half there --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 4, 60, -1])
def test_a_shard_that_was_cut_is_named(place: Path, size: int):
    path = sorted(place.glob("model-*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:size])
    refused(place, rf"{path.name}: damaged or no safetensors file")


def test_a_pickled_shard_that_was_cut_is_named(place: Path):
    shards = sorted(place.glob("model-*.safetensors"))
    where: dict[str, str] = {}
    for number, shard in enumerate(shards):
        tensors = load_file(shard)
        torch.save(tensors, place / f"part-{number}.bin")
        where |= dict.fromkeys(tensors, f"part-{number}.bin")
        shard.unlink()
    (place / "model.safetensors.index.json").unlink()
    (place / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    blip2.load(place, device="cpu", dtype="float32")
    cut = place / "part-1.bin"
    cut.write_bytes(cut.read_bytes()[:-200])
    refused(place, r"part-1\.bin: cannot be read as weights alone")


def test_a_shard_that_did_not_come_yet_is_named(place: Path):
    path = sorted(place.glob("model-*.safetensors"))[-1]
    path.unlink()
    refused(place, rf"{path.name}: missing; the checkpoint is not whole")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ('{"weight_map": {"a": "../../secret"}}', "is not a file beside the index"),
        ('{"weight_map": [1]}', "cannot be read as an index"),
        ("[]", "cannot be read as an index"),
    ],
)
def test_an_index_that_is_none_or_leads_away_is_refused(place: Path, content: str, message: str):
    (place / "model.safetensors.index.json").write_text(content)
    refused(place, message)


@pytest.mark.parametrize("content", ["", "{", '{"model_type": "blip-2"', "null", "[]", "\x00\x01"])
def test_a_configuration_that_was_cut_is_no_model(place: Path, content: str):
    (place / "config.json").write_text(content)
    with pytest.raises(blip2.Blip2Error, match=r"config\.json"):
        blip2.load(place, device="cpu")


def test_two_shards_with_one_tensor_are_refused(place: Path):
    first, second = sorted(place.glob("model-*.safetensors"))[:2]
    twice = next(iter(load_file(first).items()))
    save_file(load_file(second) | dict([twice]), second)
    refused(place, rf"{twice[0]} is in another file of the checkpoint too")


# -- other models ------------------------------------------------------------------------------------------------------


def kind(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda values: values.update(model_type=name)


def text(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda values: values["text_config"].update(changes)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        *[(kind(name), f"'{name}', not 'blip-2'") for name in ("instructblip", "blip", "opt", "t5", "clip", "gemma3")],
        (text(model_type="llama"), "kind 'llama'"),
        (text(do_layer_norm_before=False), "do_layer_norm_before is False, only True"),
        (text(activation_function="gelu"), "activation_function is 'gelu', only 'relu'"),
        (text(word_embed_proj_dim=8), "as in OPT-350m"),
        (text(model_type="t5"), "only the gated GELU"),
        (lambda values: values["vision_config"].pop("hidden_size"), "encoder_hidden_size is 12, .* is 1408"),
    ],
)
def test_the_configuration_of_another_model_is_refused(place: Path, edit: Callable[[Any], Any], message: str):
    change(place, edit)
    refused(place, message)


@pytest.mark.parametrize(
    ("section", "key", "wrong"),
    [
        ("vision_config", "layer_norm_eps", "layer_norm_epsilon"),
        ("vision_config", "num_attention_heads", "num_attention_head"),
        ("qformer_config", "cross_attention_frequency", "crossattention_frequency"),
        ("text_config", "num_attention_heads", "num_atention_heads"),
    ],
)
def test_a_misspelt_key_is_not_lost_in_silence(place: Path, section: str, key: str, wrong: str):
    change(place, lambda values: values[section].update({wrong: values[section].pop(key)}))
    refused(place, f"{section}: unknown key '{wrong}'; '{key}' is meant")


def test_keys_that_files_have_beside_are_not_taken_for_misspelt(tmp_path: Path):
    for language in (opt, t5):
        _, model = loaded(config(language()), tmp_path / language.__name__)  # with every key that transformers writes
        values = json.loads((tmp_path / language.__name__ / "config.json").read_text())
        assert "initializer_range" in values["vision_config"]
        assert model.language is not None


@pytest.mark.parametrize(
    "name", ["vision_model.post_layernorm.weight", "query_tokens", "language_model.model.decoder.layers.1.fc1.bias"]
)
def test_a_tensor_of_another_shape_is_named_with_both(place: Path, name: str):
    shard = next(path for path in place.glob("model-*.safetensors") if name in load_file(path))
    tensors = load_file(shard)
    shape = list(tensors[name].shape)
    tensors[name] = torch.zeros(*shape[:-1], shape[-1] + 1)
    save_file(tensors, shard)
    refused(place, rf"{name} is \[.*{shape[-1] + 1}\], the configuration wants \[.*{shape[-1]}\]")


# -- the hub -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[int], None]]:
    """A hub that answers everything with one status."""
    status = [500]

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status[0])
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield lambda code: status.__setitem__(0, code)
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("status", [401, 403, 404, 500])
def test_a_hub_that_refuses_or_fails_is_an_error_and_leaves_no_model(
    answering: Callable[[int], None], status: int, tmp_path: Path
):
    answering(status)
    with pytest.raises(CheckpointError, match="someone/model"):
        hub.download("someone/model")
    assert not list(tmp_path.glob("cache/**/config.json"))


def test_a_hub_that_cannot_be_reached_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # the port that throws everything away
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="not in the cache, and the hub cannot be asked; connect once"):
        hub.download("someone/model")


def test_a_disk_that_is_full_while_downloading_is_named(monkeypatch: pytest.MonkeyPatch):
    def full(*_: Any, **__: Any) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    with pytest.raises(CheckpointError, match=r"someone/model: cannot be downloaded: .*No space left on device"):
        hub.download("someone/model")


def test_a_half_downloaded_model_is_not_loaded(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As the hub's library leaves it when it is killed: some files linked, one still called incomplete."""
    model = tmp_path / "cache" / "models--someone--model"
    snapshot = model / "snapshots" / ("ab" * 20)
    snapshot.mkdir(parents=True)
    (model / "blobs").mkdir()
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("ab" * 20)
    for number, path in enumerate(sorted(place.iterdir())):
        blob = model / "blobs" / f"{number:040}"
        last = path.name.startswith("model-00002")
        shutil.copy(path, blob.with_suffix(".incomplete") if last else blob)
        if not last:
            (snapshot / path.name).symlink_to(blob)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(CheckpointError, match=r"model-00002.*missing; the checkpoint is not whole"):
        blip2.load("someone/model", offline=True, device="cpu")
    (snapshot / "model-00002-of-00009.safetensors").symlink_to(model / "blobs" / "gone")
    with pytest.raises(CheckpointError, match="missing; the checkpoint is not whole"):
        blip2.load("someone/model", offline=True, device="cpu")


# -- a full disk -------------------------------------------------------------------------------------------------------


def test_a_disk_that_fills_up_leaves_nothing_that_a_later_run_would_trust(
    whole: tuple[Path, Blip2], place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    written: list[Any] = []

    def full(*arguments: Any) -> None:
        written.append(arguments)
        if len(written) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(*arguments)

    monkeypatch.setattr(hers, "save_file", full)
    _, model = whole
    with pytest.raises(CheckpointError, match="No space left"):
        hers.save(model, place, shard_bytes=SHARD)  # over a model: its first shard is replaced already
    assert len(written) == 2
    with pytest.raises(CheckpointError, match="no model here"):
        blip2.load(place, device="cpu")

    def none(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pdparams, "write", none)
    with pytest.raises(CheckpointError, match="No space left"):
        paddle.save(model, tmp_path / "paddle")
    monkeypatch.setattr(torch, "save", none)
    with pytest.raises(CheckpointError, match="No space left"):
        lavis.save(model, tmp_path / "lavis" / "model.pth")
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".pth", ".pdparams") or "partial" in path.name]


def test_a_configuration_nested_without_end_is_an_error(tmp_path: Path):
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(Blip2Error, match=r"config\.json"):
        blip2.load(tmp_path)


def test_a_vocabulary_with_a_piece_that_has_no_text_is_an_error(tmp_path: Path):
    (tmp_path / "spiece.model").write_bytes(b"\x0a\x00")
    with pytest.raises(CheckpointError, match="damaged, or no sentencepiece model"):
        sentencepiece.read(tmp_path / "spiece.model")
