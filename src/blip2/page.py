"""Web pages that need nothing else: one file, pictures inside, no script."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

THUMBNAIL = 320  # pixels of the longer side: sharp at 160 on a dense screen
QUALITY = 80  # of the JPEG

_STYLE = """
:root { color-scheme: light dark; font: 16px/1.4 system-ui, sans-serif; }
body { margin: 0 auto; padding: 1rem; max-width: 80rem; }
h1 { font-size: 1.25rem; overflow-wrap: anywhere; }
p { color: GrayText; }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(10rem, 44vw), 1fr)); gap: 1rem; }
figure { margin: 0; min-width: 0; }
figure img { width: 100%; aspect-ratio: 1; object-fit: cover; border-radius: .5rem; background: #8883; display: block; }
figcaption { font-size: .8125rem; overflow-wrap: anywhere; margin-top: .25rem; }
figcaption b { display: block; font-variant-numeric: tabular-nums; }
a { color: inherit; text-decoration: none; }
a:hover { text-decoration: underline; }
"""


@dataclass(frozen=True)
class Figure:
    """A picture with what stands below it.

    Attributes:
        picture: None where it cannot be shown.
        value: in front, in bold.
        link: where a click leads to; nowhere if empty.
    """

    picture: Image.Image | None
    value: str
    caption: str
    link: str = ""


def document(title: str, note: str, figures: Iterable[Figure]) -> str:
    """A page of pictures, whole: HTML in which every given text is only text."""
    body = "".join(_figure(figure) for figure in figures)
    return page(title, f"<p>{text(note)}</p>\n<main>\n{body}</main>")


def page(title: str, body: str, style: str = "") -> str:
    """A whole page of our own HTML.

    Args:
        body: what stands below the title; every text in it has gone through `text`.
        style: CSS after that of all pages.
    """
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{text(title)}</title>'
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<style>{_STYLE}{style}</style></head>\n'
        f"<body><h1>{text(title)}</h1>{body}</body></html>\n"
    )


def thumbnail(picture: Image.Image) -> str:
    """An RGB picture as a small JPEG in a `data:` address."""
    small = picture.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def file_link(path: Path) -> str:
    """The address of a file on this machine."""
    return path.absolute().as_uri()


def _figure(figure: Figure) -> str:
    source = f' src="{thumbnail(figure.picture)}"' if figure.picture is not None else ""
    picture = f'<img alt="{text(figure.caption)}"{source}>'
    caption = f"<figcaption><b>{text(figure.value)}</b> {text(figure.caption)}</figcaption>"
    shown = f'<a href="{text(figure.link)}">{picture}</a>' if figure.link else picture
    return f"<figure>{shown}{caption}</figure>\n"


def text(raw: str) -> str:
    """Safe in HTML and in its attributes; file names need not be Unicode."""
    return html.escape(raw.encode("utf-8", "replace").decode())
