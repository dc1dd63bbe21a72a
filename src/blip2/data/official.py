"""Files in which the field publishes its captions: COCO's own layout (NoCaps has it too) and Karpathy's splits.

Each gives entries of what it says; whether that is a good sample is judged by `sources`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from blip2.errors import DataError

FOLDERS = ("", "images", "train2014", "val2014", "test2014", "test2015", "train2017", "val2017", "test2017")


@dataclass(frozen=True)
class Entry:
    """What a file says of one picture.

    Attributes:
        place: where it stands, for messages.
        key: the picture's id, as results are written with.
        domain: of NoCaps: in-domain, near-domain or out-domain; empty elsewhere.
    """

    place: str
    key: str
    picture: Path
    captions: tuple[str, ...]
    domain: str = ""


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        DataError: it cannot be read, or is no JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"{path}: cannot be read as JSON: {reason}") from None


def kind(path: Path) -> Literal["coco", "karpathy"]:
    """Which of the layouts a JSON file has.

    Raises:
        DataError: neither.
    """
    match read_json(path):
        case {"images": [{"sentences": _}, *_]}:
            return "karpathy"
        case {"images": [*_]}:
            return "coco"
        case _:
            raise DataError(
                f"{path}: neither COCO's layout (`images` and `annotations`) nor Karpathy's (`images` with `sentences`)"
            )


def picture(place: str, folders: Iterable[Path], names: Sequence[str]) -> Path:
    """The first of some names in the first of some folders that has it.

    Raises:
        DataError: none has, or a name points out of its folder.
    """
    for name in names:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise DataError(f"{place}: {name!r} is no name of a picture within the folder")
    places = [folder / name for folder in folders for name in names]
    for path in places:
        if path.is_file():
            return path
    raise DataError(f"{place}: the picture {places[0]} is not there; say where the pictures are, or leave it out")


def coco(source: Path, images: Path) -> Iterator[Entry]:
    """Pictures and captions of COCO's layout, in the order of its `images`.

    Args:
        images: the folder of the pictures, or one above it.
    """
    captions: dict[Any, list[str]] = {}
    data = read_json(source)
    try:
        for row in data.get("annotations", ()):
            captions.setdefault(row["image_id"], []).append(row["caption"])
        rows = [(row["id"], row["file_name"], row.get("domain", "")) for row in data["images"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{source}: not a COCO captions file ({type(error).__name__}: {error})") from None
    folders = [images / name for name in (*FOLDERS, f"images/{_subset(source)}", _subset(source))]
    for key, name, domain in rows:
        place = f"{source}: image {key}"
        yield Entry(place, str(key), picture(place, folders, [str(name)]), tuple(captions.get(key, ())), str(domain))


def karpathy(source: Path, images: Path, split: str | None) -> Iterator[Entry]:
    """One of Karpathy's splits of COCO, Flickr30k or Flickr8k; `train` of COCO has its `restval` with it.

    The id is COCO's where there is one, else the picture's name without its ending.
    """
    data = read_json(source)
    try:
        rows = [
            (
                row["split"],
                row.get("cocoid"),
                str(row.get("filepath", "")),
                str(row["filename"]),
                tuple(str(sentence["raw"]) for sentence in row["sentences"]),
            )
            for row in data["images"]
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{source}: not one of Karpathy's files ({type(error).__name__}: {error})") from None
    there = sorted({row[0] for row in rows})
    if split not in there:
        raise DataError(f"{source}: needs a split, one of {', '.join(there)}, not {split!r}")
    parts = ("train", "restval") if split == "train" else (split,)  # the rest of COCO's val2014 is trained on
    folders = [images / name for name in FOLDERS]
    for part, coco_id, folder, name, captions in rows:
        if part not in parts:
            continue
        key = Path(name).stem if coco_id is None else str(coco_id)
        place = f"{source}: image {key}"
        names = [f"{folder}/{name}", name] if folder else [name]
        yield Entry(place, key, picture(place, folders, names), captions)


def _subset(source: Path) -> str:
    """`val2017` of `captions_val2017.json`."""
    return source.stem.rpartition("_")[2]
