"""Tux Paint's stamps (GPL-2, Debian `tuxpaint-stamps-default`) as training pictures, with whole concepts held out.

A concept is the head noun of a stamp's title together with its synonyms, so that one name never stands on both sides.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from wordnet import WordNet

STAMPS = Path("/usr/share/tuxpaint/stamps")
HELD_OUT = 0.28  # of the concepts
NAMED = 0.3  # of the photographs whose name other pictures or class names teach
TAUGHT = 5  # captions that must mention a noun before it counts as taught by them
SIDE = 288
MARGIN = 0.06  # of the side, around a stamp

GROUNDS = {
    "white": (255, 255, 255),
    "black": (16, 16, 16),
    "gray": (128, 128, 128),
    "red": (200, 40, 40),
    "orange": (240, 140, 40),
    "yellow": (245, 220, 70),
    "green": (70, 150, 70),
    "blue": (60, 110, 200),
    "purple": (130, 70, 160),
    "pink": (245, 170, 190),
    "brown": (130, 90, 55),
}
_NO_NAMES = ("symbols/", "town/roadsigns/", "seasonal/hanukkah/")  # letters, money, and what a sign or game means
_DRAWINGS = ("cartoon", "town", "symbols", "seasonal", "people", "military", "space")  # folders with few photographs


@dataclass(frozen=True)
class Stamp:
    """One picture.

    Attributes:
        id: its path below the stamps, without suffix.
        title: the English line beside it; the noun with its article where that line is a remark.
        noun: head noun of the title, or of the file's name where the line is a remark.
        concept: the noun that stands for it and its synonyms.
    """

    id: str
    path: Path
    title: str
    noun: str
    concept: str

    @property
    def photograph(self) -> bool:
        """Whether it is one; the others are drawings."""
        return not any(folder in Path(self.id).parts for folder in _DRAWINGS)


@dataclass(frozen=True)
class Split:
    """Which stamps are for what.

    Attributes:
        unseen: of held-out concepts.
        named: photographs held out, though other pictures or class names teach their names.
        dropped: neither trained on nor measured: a title of a trained concept that mentions a held-out one.
        names: every held-out noun and synonym.
    """

    train: tuple[Stamp, ...]
    unseen: tuple[Stamp, ...]
    named: tuple[Stamp, ...]
    dropped: tuple[Stamp, ...]
    names: frozenset[str]


def share(*key: object) -> float:
    """A number in 0..1 that depends on the key alone."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=7).digest(), "big") / 2**56


def read_stamps(root: Path, wordnet: WordNet) -> list[Stamp]:
    """The PNGs with an English line that names a thing, or a file name that does."""
    found: list[tuple[str, Path, str, str]] = []
    for path in sorted(root.rglob("*.png")):
        name = path.relative_to(root).with_suffix("").as_posix()
        text = path.with_suffix(".txt")
        if name.startswith(_NO_NAMES) or not text.is_file():
            continue
        title = text.read_text(encoding="utf-8", errors="replace").splitlines()[0].strip()
        remark = is_remark(title)
        noun = wordnet.head_noun(re.sub(r"[\d_]+", " ", path.stem) if remark else title)
        if noun is None or (remark and not wordnet.senses(noun)):
            continue
        found.append((name, path, f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}" if remark else title, noun))
    if not found:
        raise FileNotFoundError(f"{root}: no stamps here; `apt install tuxpaint-stamps-default`, or name their folder")
    concepts = merge_synonyms({noun for *_, noun in found}, wordnet)
    return [Stamp(name, path, title, noun, concepts[noun]) for name, path, title, noun in found]


def is_remark(title: str) -> bool:
    """Whether the line beside a stamp says something other than what it shows: `Eat your broccoli!`."""
    first = re.split(r"[.!?,;:\u2014(]", title)[0]
    return not re.match(r"(an?|the|some|two|our|another)\b", first.lower()) and not 0 < len(first.split()) < 3


def merge_synonyms(nouns: Iterable[str], wordnet: WordNet) -> dict[str, str]:
    """Each noun to the one that stands for it: nouns whose first senses are the same synset are one concept."""
    first: dict[object, str] = {}
    merged: dict[str, str] = {}
    for noun in sorted(nouns):
        senses = wordnet.senses(noun)
        merged[noun] = first.setdefault(senses[0] if senses else noun, noun)
    return merged


def split_stamps(
    stamps: Sequence[Stamp],
    class_names: Mapping[int, Sequence[str]],
    mentions: Mapping[str, int],
    wordnet: WordNet,
    seed: int,
) -> Split:
    """The split that a fixed hash of seed and concept draws.

    Held out are concepts that no other training text names, else they would not be unseen.

    Args:
        class_names: names of each class of the encoder's classifier, which may teach a name too.
        mentions: how often each noun stands in the captions that are trained on beside the stamps.
    """
    nouns: dict[str, set[str]] = defaultdict(set)
    for stamp in stamps:
        nouns[stamp.concept].add(stamp.noun)
    free = [c for c, own in nouns.items() if not any(mentions.get(name) for name in held_out_names(own, wordnet))]
    held = set(sorted(free, key=lambda concept: share(seed, concept))[: round(HELD_OUT * len(nouns))])
    unseen = [stamp for stamp in stamps if stamp.concept in held]
    names = held_out_names({stamp.noun for stamp in unseen} | held, wordnet)
    seen = [stamp for stamp in stamps if stamp.concept not in held]
    dropped = [stamp for stamp in seen if names & {*wordnet.nouns(stamp.title), stamp.noun}]
    usable = [stamp for stamp in seen if stamp not in dropped]
    taught = {noun for texts in class_names.values() for text in texts if (noun := wordnet.head_noun(text))}
    taught |= {noun for noun, count in mentions.items() if count >= TAUGHT}
    left: dict[str, int] = defaultdict(int)
    for stamp in usable:
        left[stamp.concept] += 1
    named: list[Stamp] = []
    for stamp in usable:
        teachable = left[stamp.concept] > 1 or bool(taught & wordnet.synonyms(stamp.noun))
        if stamp.photograph and teachable and share(seed, "named", stamp.id) < NAMED:
            named.append(stamp)
            left[stamp.concept] -= 1
    train = [stamp for stamp in usable if stamp not in named]
    return Split(tuple(train), tuple(unseen), tuple(named), tuple(dropped), names)


def held_out_names(nouns: Iterable[str], wordnet: WordNet) -> frozenset[str]:
    """The nouns and what the first sense of each is also called, single words only."""
    names = set(nouns)
    for noun in list(names):
        for offset in wordnet.senses(noun)[:1]:
            names.update(word for word in wordnet.words(offset) if " " not in word)
    return frozenset(names)


def trained_classes(
    class_names: Mapping[int, Sequence[str]], synsets: Mapping[int, int], split: Split, wordnet: WordNet
) -> dict[int, tuple[str, ...]]:
    """The classes that may be trained on: none that is, is called, or is a kind of what is held out.

    Args:
        synsets: WordNet offset of each class.
    """
    senses = {offset for stamp in split.unseen for offset in wordnet.senses(stamp.noun)}
    first = {offset for stamp in split.unseen for offset in wordnet.senses(stamp.noun)[:1]}
    return {
        index: tuple(names)
        for index, names in class_names.items()
        if synsets[index] not in senses
        and not any(wordnet.is_kind_of(synsets[index], above) for above in first)
        and not any(split.names & set(wordnet.nouns(name)) for name in names)
    }


def check_split(split: Split, classes: Mapping[int, Sequence[str]], captions: Iterable[str], wordnet: WordNet) -> None:
    """Nothing held out gets into training.

    Raises:
        AssertionError: a picture, name or class that is on both sides.
    """
    train = {stamp.id for stamp in split.train}
    for other in (split.unseen, split.named, split.dropped):
        both = train & {stamp.id for stamp in other}
        assert not both, f"trained and held out: {sorted(both)}"
    concepts = {stamp.concept for stamp in split.train} & {stamp.concept for stamp in split.unseen}
    assert not concepts, f"concepts on both sides: {sorted(concepts)}"
    for text in [*captions, *(name for names in classes.values() for name in names)]:
        leaked = split.names & set(wordnet.nouns(text))
        assert not leaked, f"held-out name {sorted(leaked)} in the training text {text!r}"


def cut_out(path: Path) -> Image.Image:
    """A stamp as RGBA, cropped to what is visible."""
    with Image.open(path) as file:
        stamp = file.convert("RGBA")
    return crop_visible(stamp) or stamp


def crop_visible(picture: Image.Image) -> Image.Image | None:
    """An RGBA picture cropped to what is not transparent; None where all is."""
    box = picture.getchannel("A").point([0] * 16 + [255] * 240).getbbox()
    return picture.crop(box) if box else None


def on_ground(stamp: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """A stamp as large as fits in the middle of a plain square."""
    canvas = Image.new("RGB", (SIDE, SIDE), colour)
    room = SIDE * (1 - 2 * MARGIN)
    scale = min(room / stamp.width, room / stamp.height)
    size = (max(1, round(stamp.width * scale)), max(1, round(stamp.height * scale)))
    resized = stamp.resize(size, Image.Resampling.BICUBIC)
    canvas.paste(resized, ((SIDE - size[0]) // 2, (SIDE - size[1]) // 2), resized)
    return canvas


def caption_of(stamp: Stamp) -> str:
    """The title's first sentence, asides in brackets left out."""
    text = re.sub(r"\s*\([^)]*\)", "", stamp.title)
    return re.split(r"(?<=[.!?…])\s", text)[0].strip() or stamp.title


def write_stamp(stamp: Stamp, folder: Path, ground: str = "white") -> dict[str, Any]:
    """Draw a stamp on a ground; returns its row for a .jsonl that stands beside `folder`."""
    name = f"{stamp.id.replace('/', '-')}-{ground}"
    on_ground(cut_out(stamp.path), GROUNDS[ground]).save(folder / f"{name}.jpg", quality=92)
    captions = [caption_of(stamp)]
    if ground != "white":
        captions.append(f"{captions[0].rstrip('.!')} on a {ground} background")
    return {
        "id": name,
        "image": f"{folder.name}/{name}.jpg",
        "captions": captions,
        "noun": stamp.noun,
        "concept": stamp.concept,
        "photograph": stamp.photograph,
    }
