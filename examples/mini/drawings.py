"""Drawings with names, for things that photographs of Flickr8k do not show: Open Clip Art's and the emoji of Noto.

Open Clip Art (public domain) is Debian's `openclipart-png` for the pictures and `openclipart-svg` for what stands in
their files about them; Noto Color Emoji (OFL) is Debian's `fonts-noto-color-emoji`.
"""

from __future__ import annotations

import re
import unicodedata
import warnings
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lexicon import LEXICON
from PIL import Image, ImageDraw, ImageFont
from stamps import GROUNDS, crop_visible, on_ground
from wordnet import WordNet

CLIP_ART = Path("/usr/share/openclipart")
FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
PER_NAME = 5  # drawings of one name: of playing cards alone there are fifty

_FOLDERS = (  # of things; the others are icons, shapes, flags and traffic signs
    "animals", "buildings", "containers", "education", "electronics", "food", "office", "people", "plants",
    "recreation", "science", "tools", "transportation", "unsorted",
)  # fmt: skip
_WORDS = 4  # a longer title tells a story
_DC = "{http://purl.org/dc/elements/1.1/}"
_RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"
_TEXTS = ("title", "description")
_SEVERAL = frozenset(LEXICON["company"])
_BETWEEN = r" (?:in|with|of|on|at|behind|for) "
_ONE = ("ss", "us", "is", "as", "lens")  # ends of words that are not many for all their s
_VOWEL = r"(?!uni|us|eu|one)[aeiou]"  # as it is spoken
_LARGEST = 2**24  # pixels; a few drawings have hundreds of millions
_EMOJI = (range(0x2600, 0x27C0), range(0x1F300, 0x1FB00))
_STRIKE = 109  # pixels: the one size that the font has
_NO_THINGS = re.compile(  # names of emoji that say what a symbol means
    r"\b(clock|regional|keycap|squared?|sign|arrows?|button|circled?|heart|symbol|hands?|finger|face with|triangle|"
    r"ideograph|diamond|modifier|mark|digit|letter|zodiac|bubble|fist|thumbs|pisces|aries|taurus|gemini|cancer|leo|"
    r"virgo|libra|scorpius|sagittarius|capricorn|aquarius|without|black|white|heavy|curly|loop|dingbat)\b"
)
_FEELINGS = re.compile(r"\b(?:\w+ing|eyes|mouth|tears|sweat|tongue)\b.*\bface\b|\bface\b.*\b(?:\w+ing|of|savouring)\b")


@dataclass(frozen=True)
class Drawing:
    """One picture.

    Attributes:
        id: unique among all.
        name: what it shows, in small letters.
        about: all else that is said of it, which must not name what is held out either.
        picture: RGBA, or the file of it.
    """

    id: str
    name: str
    about: str
    picture: Image.Image | Path


def read_clip_art(root: Path, wordnet: WordNet) -> Iterator[Drawing]:
    """Open Clip Art's drawings of things with an English title of a few words."""
    files = sorted(path for folder in _FOLDERS for path in (root / "svg" / folder).rglob("*.svg"))
    if not files:
        raise FileNotFoundError(f"{root}: no clip art here; `apt install openclipart-svg openclipart-png`")
    for path in files:
        inside = path.relative_to(root / "svg").with_suffix("")
        picture = root / "png" / f"{inside}.png"
        if not picture.is_file() or (said := _metadata(path)) is None:
            continue
        title, about = said
        name = " ".join(re.sub(r"[\d_().,!]+", " ", title).lower().split())
        if is_name(name, wordnet):
            where = re.sub(r"[^a-z]+", " ", inside.as_posix().lower())
            yield Drawing(re.sub(r"[^\w.-]+", "-", inside.as_posix()), name, f"{where} {about}", picture)


def _metadata(path: Path) -> tuple[str, str] | None:
    """Title of an SVG file, and its description and keywords; None for one that is no XML."""
    try:
        tree = ET.parse(path)
    except ET.ParseError:
        return None
    keywords = [word.text for subject in tree.iter(f"{_DC}subject") for word in subject.iter(f"{_RDF}li") if word.text]
    title, text = (next((entry.text or "" for entry in tree.iter(_DC + tag)), "") for tag in _TEXTS)  # the work's own
    return title, " ".join([text, *keywords])


def is_name(text: str, wordnet: WordNet) -> bool:
    """Whether a title is a short name in English: every word of it can be a noun, as `red truck`'s can."""
    words = text.split()
    known = all(word.isascii() and word.isalpha() and wordnet.lemma(word) for word in words)
    return 0 < len(words) <= _WORDS and known


def read_emoji(font: Path) -> Iterator[Drawing]:
    """Emoji of things, by their names in Unicode."""
    if not font.is_file():
        raise FileNotFoundError(f"{font}: no such font; `apt install fonts-noto-color-emoji`")
    letters = ImageFont.truetype(str(font), _STRIKE)
    for code in (code for codes in _EMOJI for code in codes):
        if (name := emoji_name(code)) is None:
            continue
        square = Image.new("RGBA", (_STRIKE + 31, _STRIKE + 31))
        ImageDraw.Draw(square).text((2, 2), chr(code), font=letters, embedded_color=True)
        yield Drawing(f"emoji-{code:x}", name, "", square)


def emoji_name(code: int) -> str | None:
    """What an emoji is called in Unicode, in small letters; None for signs and feelings."""
    name = unicodedata.name(chr(code), "").lower()
    if not name or _NO_THINGS.search(name) or _FEELINGS.search(name):
        return None
    return name.removesuffix(" face").replace("-", " ")


def write_drawings(
    drawings: Iterable[Drawing], held_out: Collection[str], folder: Path, wordnet: WordNet
) -> list[dict[str, Any]]:
    """Draw on white what names nothing that is held out; returns rows for a .jsonl that stands beside `folder`."""
    rows: list[dict[str, Any]] = []
    names: Counter[str] = Counter()
    for drawing in drawings:
        noun = wordnet.head_noun(drawing.name)
        if noun is None or not wordnet.senses(noun) or names[drawing.name] == PER_NAME:
            continue
        if not {noun, *wordnet.nouns(f"{drawing.name} {drawing.about}")}.isdisjoint(held_out):
            continue
        visible = crop_visible(drawing.picture if isinstance(drawing.picture, Image.Image) else _read(drawing.picture))
        if visible is None:
            continue
        names[drawing.name] += 1
        on_ground(visible, GROUNDS["white"]).save(folder / f"{drawing.id}.jpg", quality=92)
        named = with_article(drawing.name, wordnet)
        captions = [named, f"a drawing of {named}"]
        rows.append({"id": drawing.id, "image": f"{folder.name}/{drawing.id}.jpg", "captions": captions, "noun": noun})
    return rows


def _read(path: Path) -> Image.Image:
    """A picture as RGBA; one that is too large to be worth it, empty."""
    with (
        warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning),
        suppress(Image.DecompressionBombError),
        Image.open(path) as file,
    ):
        if file.width * file.height <= _LARGEST:
            return file.convert("RGBA")
    return Image.new("RGBA", (1, 1))


def with_article(name: str, wordnet: WordNet) -> str:
    """`an old truck`, `a unicorn`; what is many has none: `red cherries`, `sunglasses`."""
    words = re.split(_BETWEEN, name)[0].split()
    last = words[-1]
    many = wordnet.lemma(last) not in (None, last) or (last.endswith("s") and not last.endswith(_ONE))
    if many or words[0] in _SEVERAL or " and " in name:
        return name
    return f"{'an' if re.match(_VOWEL, name) else 'a'} {name}"
