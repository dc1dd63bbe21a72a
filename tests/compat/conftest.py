"""The published models at tiny size, under their names in a hub cache, and a picture on a loopback server."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from tiny_hub import COMMIT, WRITERS, build, picture

from blip2.compat import transformers as compat


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What transformers saved: `opt`, `t5` and `itm`."""
    found = {kind: tmp_path_factory.mktemp(kind) for kind in ("opt", "t5", "itm")}
    for kind, place in found.items():
        build(kind, place)
    return found


@pytest.fixture(scope="session")
def cache(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory laid out as the hub's cache, the published names in it."""
    root = tmp_path_factory.mktemp("hub")
    for name, kind in WRITERS.items():
        model = root / f"models--{name.replace('/', '--')}"
        (model / "refs").mkdir(parents=True)
        (model / "refs" / "main").write_text(COMMIT)
        (model / "snapshots").mkdir()
        (model / "snapshots" / COMMIT).symlink_to(folders[kind])
    return root


@pytest.fixture
def hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache in use, and nobody asked beyond it."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return cache


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with the pictures that the snippets open."""
    names = ["photo", "scene", "img1", "img2", "img3", *(f"image_{number}" for number in range(4))]
    for number, name in enumerate(names):
        picture(number, (60, 47)).save(tmp_path / f"{name}.jpg")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def address() -> Iterator[str]:
    """Of a JPEG on this machine."""
    kept = io.BytesIO()
    picture(77, (64, 48)).save(kept, "JPEG")

    class Server(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "image/jpeg")
            self.send_header("Content-Length", str(kept.getbuffer().nbytes))
            self.end_headers()
            self.wfile.write(kept.getvalue())

        def log_message(self, format: str, *args: Any) -> None:
            del format, args

    server = HTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/demo.jpg"
    server.shutdown()
    thread.join()


@pytest.fixture(scope="module", params=["opt", "t5"])
def pair(request: pytest.FixtureRequest, folders: dict[str, Path]) -> tuple[Any, Any, Any]:
    """Theirs, ours, and our processor."""
    transformers = pytest.importorskip("transformers")
    place = folders[request.param]
    theirs = transformers.Blip2ForConditionalGeneration.from_pretrained(place).eval()
    return (
        theirs,
        compat.Blip2ForConditionalGeneration.from_pretrained(place),
        compat.AutoProcessor.from_pretrained(place),
    )
