"""Image-text data as people keep it, read into one list of samples. Pictures stay where they are until they are needed.

A sample is one picture with all its captions, so that a batch drawn by sample never meets a picture twice.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

from blip2.data import official, shards
from blip2.data.shards import ImageRef
from blip2.errors import DataError

__all__ = ["TEMPLATES", "Format", "ImageRef", "Prototype", "Sample", "json_lines", "read"]

Format = Literal["auto", "webdataset", "flickr8k", "coco", "karpathy", "table", "folder", "classes"]

PICTURES = (".jpg", ".jpeg", ".png", ".webp")
TEMPLATES = ("a photo of {}", "a picture of {}", "{}", "this is {}")  # `{}` is the name with its article
_IMAGE_COLUMNS = ("image", "file", "path", "filename", "file_name")
_CAPTION_COLUMNS = ("caption", "text", "captions")


@dataclass(frozen=True)
class Prototype:
    """In place of a picture: what the encoder's classifier holds a class to look like (`encoder.prototypes()`)."""

    index: int


@dataclass(frozen=True)
class Sample:
    """One picture and what is said of it.

    Attributes:
        questions: pairs of question and answer.
        domain: the part of its set that is measured apart too (NoCaps has such), empty where there are none.
    """

    id: str
    image: ImageRef | Prototype
    captions: tuple[str, ...]
    questions: tuple[tuple[str, str], ...] = ()
    domain: str = ""


def read(
    path: str | Path,
    format: Format = "auto",
    *,
    split: str | None = None,
    questions: str | Path | None = None,
    images: str | Path | None = None,
    unlabelled: bool = False,
    templates: Sequence[str] = TEMPLATES,
) -> list[Sample]:
    """Samples of a data set, in the order in which it holds them.

    Args:
        path: a tar, a folder, a table, or for shards a pattern such as `train-{000000..000004}.tar` or `train-*.tar`.
        format: `auto` goes by what is there.
            webdataset: tars; members `KEY.jpg` (.jpeg, .png, .webp) with `KEY.txt`, or `KEY.json` holding `captions`
                or `caption`, and `questions` if any. They are indexed, not streamed by the webdataset package:
                random access is what makes resuming exact.
            flickr8k: the folder of the official distribution; needs `split` (train, val or test).
            coco: a folder with `annotations/captions_SPLIT.json` and the pictures; needs `split` (such as train2017).
                Or such a .json itself, of NoCaps as well.
            karpathy: the .json of his split of COCO, Flickr30k or Flickr8k; needs `split` (train, val or test).
            table: .csv, .tsv or .jsonl, one picture and text a line; rows of one picture become one sample.
            folder: pictures, each with a .txt of captions beside it, one a line. With `questions` a picture may go
                without, and one that nothing is asked about is then left out.
            classes: .jsonl of `{"class": index, "names": [...]}`: names for the encoder's class prototypes.
        questions: a .jsonl of `{"id": ..., "questions": [[question, answer], ...]}` that joins samples by id.
        images: the folder of the pictures that a .json names; the one it lies in without.
        unlabelled: take pictures without captions and questions too, as test sets have whose captions are kept back.
        templates: captions made of each class name; `{}` is the name with its article.
    Raises:
        DataError: nothing there, a damaged shard, an empty caption, a missing picture, an id twice; the message names
            file and line or member.
    """
    found = _format(path, format, split, images)
    folder = Path(path).parent if images is None else Path(images)
    readers: dict[str, Callable[[], Iterable[tuple[str, Sample]]]] = {
        "webdataset": lambda: _webdataset(str(path)),
        "flickr8k": lambda: _flickr8k(Path(path), split),
        "coco": lambda: _official(official.coco(*_coco(Path(path), split, folder)), unlabelled),
        "karpathy": lambda: _official(official.karpathy(Path(path), folder, split), unlabelled),
        "table": lambda: _table(Path(path)),
        "folder": lambda: _folder(Path(path), asked=questions is not None),
        "classes": lambda: _classes(Path(path), templates),
    }
    samples: dict[str, Sample] = {}
    for place, sample in readers[found]():
        if sample.id in samples:
            raise DataError(f"{place}: id {sample.id!r} comes twice; every picture needs an id of its own")
        samples[sample.id] = sample
    if not samples:
        raise DataError(f"{path}: no samples found (read as {found!r}); see the formats in docs/evaluation.md")
    if questions is None:
        return list(samples.values())
    joined = _join(samples, Path(questions))
    return [sample for sample in joined if sample.captions or sample.questions] if found == "folder" else joined


def _format(path: str | Path, format: Format, split: str | None, images: str | Path | None) -> Format:
    """What the data are, if the other arguments go with it."""
    if format not in get_args(Format):
        raise DataError(f"unknown format {format!r}; choose one of {', '.join(get_args(Format))}")
    found = _detect(str(path)) if format == "auto" else format
    named = Path(path).suffix.lower() == ".json"
    if split is not None and (found not in ("flickr8k", "coco", "karpathy") or (found == "coco" and named)):
        raise DataError(f"{path}: data of format {found!r} has no splits; leave `split` out and name the files instead")
    if images is not None and not named:
        raise DataError(f"{path}: a folder of pictures is for .json files; data of format {found!r} knows its own")
    return found


def _detect(path: str) -> Format:
    place = Path(path)
    suffix = place.suffix.lower()
    if suffix == ".tar":
        return "webdataset"
    if suffix in (".csv", ".tsv", ".jsonl"):
        return "table"
    if suffix == ".json":
        return official.kind(place)
    if not place.is_dir():
        raise DataError(f"{path}: neither a folder nor a .tar, .csv, .tsv, .jsonl or .json file")
    if any(place.glob("*.tar")):
        return "webdataset"
    if _first(place, "Flickr8k.token.txt") is not None:
        return "flickr8k"
    return "coco" if any(place.glob("annotations/captions_*.json")) else "folder"


def _sample(
    place: str, key: str, image: ImageRef | Prototype, captions: Any, questions: Any = ()
) -> tuple[str, Sample]:
    """A checked sample with the place it came from, for messages."""
    texts = [captions] if isinstance(captions, str) else captions
    if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
        raise DataError(f"{place}: captions must be a text or a list of texts, not {captions!r}")
    if any(not text.strip() for text in texts):
        raise DataError(f"{place}: an empty caption for {key!r}; write one, or take the picture out")
    pairs = _pairs(place, questions)
    if not texts and not pairs:
        raise DataError(f"{place}: {key!r} has neither captions nor questions")
    return place, Sample(key, image, tuple(text.strip() for text in texts), pairs)


def _pairs(place: str, questions: Any) -> tuple[tuple[str, str], ...]:
    if not isinstance(questions, list | tuple):
        raise DataError(f"{place}: questions must be a list of pairs [question, answer], not {questions!r}")
    pairs: list[tuple[str, str]] = []
    for pair in cast("Sequence[Any]", questions):
        match pair:
            case [str(question), str(answer)] if question.strip() and answer.strip():
                pairs.append((question.strip(), answer.strip()))
            case _:
                raise DataError(f"{place}: a question is a pair [question, answer] of two texts, not {pair!r}")
    return tuple(pairs)


def _file(place: str, path: Path) -> ImageRef:
    if not path.is_file():
        raise DataError(f"{place}: the picture {path} is not there; mend the name or leave the line out")
    return ImageRef(path)


def _json(place: str, text: str | bytes) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(f"{place}: not readable as JSON: {error}") from None


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Lines that are not blank, each with its place."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text: {error}") from None
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            yield f"{path}:{number}", line


def json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a .jsonl, each with its place for messages.

    Raises:
        DataError: a line is not a JSON object.
    """
    for place, line in _lines(path):
        row = _json(place, line)
        if not isinstance(row, dict):
            raise DataError(f"{place}: a JSON object is expected on each line")
        yield place, row


def _join(samples: Mapping[str, Sample], path: Path) -> list[Sample]:
    joined = dict(samples)
    for place, row in json_lines(path):
        key = row.get("id")
        if key not in joined:
            raise DataError(f"{place}: questions for {key!r}, which is not among the samples")
        more = _pairs(place, row.get("questions", ()))
        joined[key] = dataclasses.replace(joined[key], questions=joined[key].questions + more)
    return list(joined.values())


# Shards


def _webdataset(pattern: str) -> Iterator[tuple[str, Sample]]:
    for group in shards.groups(pattern):
        place, parts = f"{group.shard}: {group.key}", group.parts
        pictures = [part for suffix, part in parts.items() if suffix in PICTURES]
        if len(pictures) != 1:
            found = ", ".join(sorted(parts))
            raise DataError(f"{place}: one picture ({', '.join(PICTURES)}) a sample is expected, found {found}")
        if ".json" in parts:
            row = _json(f"{place}.json", parts[".json"].read())
            if not isinstance(row, dict):
                raise DataError(f"{place}.json: a JSON object is expected")
            yield _sample(f"{place}.json", group.key, pictures[0], _captions(row), row.get("questions", ()))
        elif ".txt" in parts:
            text = parts[".txt"].read().decode("utf-8", errors="replace")
            yield _sample(f"{place}.txt", group.key, pictures[0], text)
        else:
            raise DataError(f"{place}: no {group.key}.txt and no {group.key}.json beside the picture")


def _captions(row: Mapping[str, Any]) -> Any:
    return next((row[name] for name in _CAPTION_COLUMNS if row.get(name) is not None), ())


# Flickr8k and COCO


def _first(root: Path, name: str) -> Path | None:
    """A file of the distribution, at the top or one folder below."""
    return next((path for path in (root / name, *sorted(root.glob(f"*/{name}"))) if path.is_file()), None)


def _flickr8k(root: Path, split: str | None) -> Iterator[tuple[str, Sample]]:
    names = {"train": "train", "val": "dev", "dev": "dev", "test": "test"}
    if split not in names:
        raise DataError(f"{root}: Flickr8k needs a split: train, val or test, not {split!r}")
    tokens, listing = (_first(root, n) for n in ("Flickr8k.token.txt", f"Flickr_8k.{names[split]}Images.txt"))
    if tokens is None or listing is None:
        raise DataError(
            f"{root}: Flickr8k.token.txt and Flickr_8k.{names[split]}Images.txt are needed, here or one below"
        )
    captions: dict[str, list[str]] = {}
    for place, line in _lines(tokens):
        match = re.fullmatch(r"(.+?\.jpe?g)(?:\.\d+)?#\d+\t(.*)", line)  # one name of the original ends in `.jpg.1`
        if match is None:
            raise DataError(f"{place}: `NAME.jpg#0<TAB>caption` is expected")
        captions.setdefault(match[1], []).append(match[2])
    folders = [root, *sorted(path for path in root.iterdir() if path.is_dir())]
    for place, line in _lines(listing):
        name = line.strip()
        if name not in captions:
            raise DataError(f"{place}: {name} has no caption in {tokens}")
        image = next((folder / name for folder in folders if (folder / name).is_file()), folders[-1] / name)
        yield _sample(place, Path(name).stem, _file(place, image), captions[name])


def _coco(path: Path, split: str | None, images: Path) -> tuple[Path, Path]:
    """The captions file of a COCO distribution, and its folder of pictures."""
    if path.suffix.lower() == ".json":
        return path, images
    there = sorted(file.stem.removeprefix("captions_") for file in path.glob("annotations/captions_*.json"))
    if split not in there:
        raise DataError(f"{path}: COCO needs a split, one of {', '.join(there) or 'none found'}, not {split!r}")
    return path / "annotations" / f"captions_{split}.json", path


def _official(entries: Iterable[official.Entry], unlabelled: bool) -> Iterator[tuple[str, Sample]]:
    for entry in entries:
        if unlabelled and not entry.captions:
            yield entry.place, Sample(entry.key, ImageRef(entry.picture), (), domain=entry.domain)
        else:
            place, sample = _sample(entry.place, entry.key, ImageRef(entry.picture), entry.captions)
            yield place, dataclasses.replace(sample, domain=entry.domain)


# Tables, folders, class names


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if path.suffix.lower() == ".jsonl":
        yield from json_lines(path)
        return
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter=delimiter, strict=True)
            for row in reader:
                if None in row or None in row.values():
                    raise DataError(f"{path}:{reader.line_num}: {len(reader.fieldnames or ())} columns are expected")
                yield f"{path}:{reader.line_num}", row
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as a table: {error}") from None


def _table(path: Path) -> Iterator[tuple[str, Sample]]:
    merged: dict[str, tuple[str, Sample]] = {}
    for place, row in _rows(path):
        name = next((row[column] for column in _IMAGE_COLUMNS if row.get(column)), None)
        if not isinstance(name, str):
            raise DataError(f"{place}: no picture named; a column {', '.join(_IMAGE_COLUMNS)} is needed")
        key = str(row.get("id") or name)
        _, sample = _sample(place, key, _file(place, path.parent / name), _captions(row), row.get("questions") or ())
        if key in merged:
            first, earlier = merged[key]
            if earlier.image != sample.image:
                raise DataError(f"{place}: id {key!r} comes twice, with another picture at {first}")
            both = (earlier.captions + sample.captions, earlier.questions + sample.questions)
            sample = Sample(key, sample.image, *both)
            place = first
        merged[key] = (place, sample)
    yield from merged.values()


def _folder(root: Path, *, asked: bool) -> Iterator[tuple[str, Sample]]:
    for picture in sorted(path for path in root.rglob("*") if path.suffix.lower() in PICTURES):
        text = picture.with_suffix(".txt")
        key = picture.relative_to(root).with_suffix("").as_posix()
        if not text.is_file():
            if asked:
                yield str(picture), Sample(key, ImageRef(picture), ())
                continue
            raise DataError(f"{picture}: no {text.name} beside it; write its caption there, or move the picture away")
        captions = [line for _, line in _lines(text)]
        yield _sample(str(text), key, ImageRef(picture), captions or "")


def _classes(path: Path, templates: Sequence[str]) -> Iterator[tuple[str, Sample]]:
    for template in templates:
        try:
            template.format("a name")
        except (LookupError, ValueError, AttributeError) as error:
            raise DataError(f"{path}: the template {template!r} does not fit ({error}); `{{}}` is the name") from None
    for place, row in json_lines(path):
        match row:
            case {"class": int(index), "names": [*names]} if names and all(isinstance(n, str) and n for n in names):
                captions = [template.format(_with_article(name)) for name in names for template in templates]
                yield _sample(place, f"class-{index}", Prototype(index), captions)
            case _:
                raise DataError(f'{place}: {{"class": index, "names": [name, ...]}} is expected, not {row!r}')


def _with_article(name: str) -> str:
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"
