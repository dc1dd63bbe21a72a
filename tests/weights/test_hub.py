"""Models by their name on the hub, from a local directory laid out as its cache is."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import constants

from blip2.errors import CheckpointError
from blip2.loading import load
from blip2.weights import hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the hub's library leaves behind: blobs, a reference, and a snapshot of links."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    model = tmp_path / "models--someone--blip2-tiny"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text(COMMIT)
    (model / "refs" / "v2").write_text(COMMIT)
    snapshot = model / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (model / "blobs").mkdir()
    for name, content in {"config.json": '{"model_type": "blip-2"}', "model.safetensors": "none"}.items():
        blob = model / "blobs" / name
        blob.write_text(content)
        (snapshot / name).symlink_to(blob)
    return snapshot


def test_a_name_is_owner_and_name_that_is_no_path_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert hub.is_name("Salesforce/blip2-opt-2.7b")
    assert hub.is_name("Salesforce/blip2-opt-2.7b@51572668da0eb669e01a189dc22abe6088589a24")
    for path in ("mini", "runs/model/x", "./model", "/models/blip2", "../a/b", "a/../b", "a b/c"):
        assert not hub.is_name(path)
    (tmp_path / "runs" / "model").mkdir(parents=True)
    assert not hub.is_name("runs/model")


@pytest.mark.parametrize("name", ["someone/blip2-tiny", "someone/blip2-tiny@v2", f"someone/blip2-tiny@{COMMIT}"])
def test_what_the_cache_has_is_found_offline(cache: Path, name: str):
    assert hub.download(name, offline=True).resolve() == cache.resolve()


@pytest.mark.usefixtures("cache")
def test_load_takes_a_name():
    with pytest.raises(CheckpointError, match=rf"{COMMIT}.*damaged or no safetensors"):
        load("someone/blip2-tiny", offline=True, device="cpu")


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("name", ["someone/other", "someone/blip2-tiny@v3"])
def test_what_the_cache_lacks_is_an_error_that_says_so(name: str):
    with pytest.raises(CheckpointError, match="not in the cache, and the hub cannot be asked"):
        hub.download(name, offline=True)


def test_without_weights_it_is_no_model(cache: Path):
    (cache / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"neither safetensors, \.bin nor"):
        hub.download("someone/blip2-tiny", offline=True)
