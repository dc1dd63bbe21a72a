"""Pictures from the web: only when allowed, within bounds, and never by a redirect out of it."""

from __future__ import annotations

import http.server
import io
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from blip2 import image, web
from blip2.errors import ImageError


def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8))


def encoded(source: Image.Image) -> bytes:
    buffer = io.BytesIO()
    source.save(buffer, "PNG")
    return buffer.getvalue()


class _Site(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        redirects = {"/moved": "/picture.png", "/escape": "file:///etc/passwd", "/ftp": "ftp://localhost/a.png"}
        if self.path in redirects:
            self.send_response(302)
            self.send_header("Location", redirects[self.path])
            self.end_headers()
        elif self.path == "/picture.png":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(encoded(picture()))
        else:
            self.send_error(404)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Site) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_urls_open_only_when_allowed(site: str) -> None:
    with pytest.raises(ImageError, match=r"picture\.png: is a URL.*allow_urls=True"):
        image.open(f"{site}/picture.png")
    for page in ("/picture.png", "/moved"):
        assert image.open(site + page, allow_urls=True).tobytes() == picture().tobytes()


@pytest.mark.parametrize(("page", "problem"), [("/escape", "not allowed"), ("/ftp", "neither http"), ("/no", "404")])
def test_a_url_that_leads_nowhere_good_is_named(site: str, page: str, problem: str) -> None:
    with pytest.raises(ImageError, match=rf"{page}: .*{problem}"):
        image.open(site + page, allow_urls=True)


def test_downloads_are_bounded_in_size_and_time(site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image, "MAX_BYTES", 100)
    with pytest.raises(ImageError, match="larger than 100 bytes"):
        image.open(f"{site}/picture.png", allow_urls=True)
    monkeypatch.setattr(image, "MAX_BYTES", 1 << 20)
    clock = iter([0.0, web.TIMEOUT + 1])
    monkeypatch.setattr(web.time, "monotonic", lambda: next(clock))
    with pytest.raises(ImageError, match="did not arrive within 30 s"):
        image.open(f"{site}/picture.png", allow_urls=True)
