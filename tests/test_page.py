"""A page holds all it needs, and what is given to it stays text."""

from __future__ import annotations

import base64
import io
import os
import re
from html.parser import HTMLParser
from pathlib import Path

from PIL import Image

from blip2 import page
from blip2.page import THUMBNAIL, Figure

EVIL = '"><script>alert(1)</script><img src=x onerror=alert(2)>&amp;\'"'


class Reader(HTMLParser):
    """Tags with their attributes, and all text."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(content)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_page_is_whole_without_scripts_and_without_the_net() -> None:
    picture = Image.new("RGB", (1000, 400), (200, 30, 30))
    content = page.document("a red car", "2 of 9 images", [Figure(picture, "0.512", "a.jpg"), Figure(None, "0.4", "b")])
    tags = Reader(content).tags
    assert "script" not in {tag for tag, _ in tags}
    assert not re.search(r"https?://|url\(|@import", content)
    shown = [attributes for tag, attributes in tags if tag == "img"]
    assert [image["alt"] for image in shown] == ["a.jpg", "b"]
    assert "src" not in shown[1]
    data = str(shown[0]["src"]).removeprefix("data:image/jpeg;base64,")
    small = Image.open(io.BytesIO(base64.b64decode(data)))
    assert (small.format, small.size) == ("JPEG", (THUMBNAIL, THUMBNAIL * 400 // 1000))


def test_names_and_texts_are_never_markup() -> None:
    figure = Figure(Image.new("RGB", (2, 2)), EVIL, EVIL, page.file_link(Path("/photos") / "a\"b<c>' d.jpg"))
    reader = Reader(page.document(EVIL, EVIL, [figure]))
    assert reader.text.count(EVIL) == 5  # title, head, note, value, caption
    assert {name for _, attributes in reader.tags for name in attributes} <= {
        "charset", "name", "content", "lang", "href", "alt", "src"
    }  # fmt: skip
    (link,) = (attributes["href"] for tag, attributes in reader.tags if tag == "a")
    assert link == "file:///photos/a%22b%3Cc%3E%27%20d.jpg"


def test_a_name_that_is_not_unicode_can_be_shown() -> None:
    name = os.fsdecode(b"caf\xe9.jpg")
    content = page.document("x", "y", [Figure(None, "1", name, page.file_link(Path("/") / name))])
    assert "caf" in Reader(content.encode().decode()).text
    assert "file:///caf%E9.jpg" in content
