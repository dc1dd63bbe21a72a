"""Where captions go: one JSON Lines file, or a text file beside each image; resumed, mended, never half written."""

from __future__ import annotations

import json
import os
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

from filelock import FileLock, Timeout

from blip2.errors import ConfigError, DataError
from blip2.files import replacing

Existing: TypeAlias = Literal["skip", "overwrite", "append"]

_RESULTS = frozenset(("caption", "captions", "error"))


@dataclass(frozen=True)
class Captioned:
    """An image and what was written about it."""

    image: Path
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Failure:
    """An image that could not be read, and why."""

    image: Path
    error: str


@dataclass(frozen=True)
class Report:
    """What a run did.

    Attributes:
        done: images captioned in this run.
        skipped: images that had their captions already.
        failed: images that could not be read; the next run tries them again.
    """

    done: int
    skipped: int
    failed: tuple[Failure, ...]


class Sink(Protocol):
    def plan(self, images: Sequence[Path]) -> tuple[list[Path], list[Failure]]:
        """The images to caption, and those that cannot be; the others have their captions already."""
        ...

    def write(self, results: Sequence[Captioned | Failure]) -> None:
        """Puts a batch on the disk for good."""
        ...


@contextmanager
def sink(form: str, out: str | os.PathLike[str] | None, existing: Existing) -> Generator[Sink]:
    """Where the captions of a run go; arguments as of `caption_files`."""
    if existing not in ("skip", "overwrite", "append"):
        raise ConfigError(f"existing is {existing!r}; use skip, overwrite or append")
    if form == "txt":
        if out is not None:
            raise ConfigError("txt writes beside each image: it takes no file to write to")
        yield _TextFiles(existing)
    elif form == "jsonl":
        if out is None:
            raise ConfigError("jsonl needs a file to write to: give out='captions.jsonl'")
        path = Path(out)
        if not path.parent.is_dir():
            raise DataError(f"{path}: the folder {path.parent} does not exist; make it first")
        with _alone(path):
            lines = _JsonLines(path, existing)
            yield lines
            lines.settle()
    else:
        raise ConfigError(f"form is {form!r}; use jsonl or txt")


@contextmanager
def _alone(path: Path) -> Generator[None]:
    """Keeps a second run away from the file."""
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise DataError(f"{path}: another run is writing to it; wait for it, or write to another file") from None
    except OSError as error:
        raise _unwritable(path, error) from error
    try:
        yield
    finally:
        lock.release()


def _unwritable(path: Path, error: OSError) -> DataError:
    return DataError(f"{path}: cannot be written ({error.strerror}); what was finished is kept: run again to go on")


class _TextFiles:
    """`photo.txt` beside `photo.jpg`."""

    def __init__(self, existing: Existing) -> None:
        self._existing = existing

    def plan(self, images: Sequence[Path]) -> tuple[list[Path], list[Failure]]:
        owners: dict[Path, Path] = {}
        failed: list[Failure] = []
        for path in images:
            target = path.with_suffix(".txt")
            if target == path:
                failed.append(Failure(path, f"{path}: is a caption's file by its name; rename it if it is an image"))
            elif owners.setdefault(target, path) != path:
                failed.append(Failure(path, f"{path}: would share {target} with {owners[target]}; rename one"))
        skip = self._existing == "skip"
        return [path for target, path in owners.items() if not (skip and _has_text(target))], failed

    def write(self, results: Sequence[Captioned | Failure]) -> None:
        for result in results:
            if isinstance(result, Failure) or not result.texts:
                continue
            target = result.image.with_suffix(".txt")
            lines = [" ".join(text.split()) for text in result.texts]
            data = "".join(f"{line}\n" for line in lines).encode()
            try:
                if self._existing == "append" and _has_text(target):
                    data = target.read_bytes().rstrip() + b"\n" + data
                with replacing(target) as partial:
                    partial.write_bytes(data)
            except OSError as error:
                raise _unwritable(target, error) from error


def _has_text(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


class _JsonLines:
    """One line an image, appended batch by batch.

    Of an image whose reading failed the last error is kept, until it has a caption.
    """

    def __init__(self, path: Path, existing: Existing) -> None:
        self._path = path
        self._existing = existing
        self._folders: dict[Path, Path] = {}
        self._captioned: set[str] = set()
        self._errors: dict[str, str] = {}

    def plan(self, images: Sequence[Path]) -> tuple[list[Path], list[Failure]]:
        overwritten = frozenset(map(self._key, images)) if self._existing == "overwrite" else frozenset[str]()
        self.settle(overwritten)
        skip = self._existing == "skip"
        return [path for path in images if not (skip and self._key(path) in self._captioned)], []

    def write(self, results: Sequence[Captioned | Failure]) -> None:
        rows: list[dict[str, Any]] = []
        for result in results:
            key = self._key(result.image)
            if isinstance(result, Captioned):
                several = len(result.texts) != 1
                rows.append({"image": key, **({"captions": result.texts} if several else {"caption": result.texts[0]})})
            elif self._errors.get(key) != result.error:  # known from an earlier run: the line is there
                rows.append({"image": key, "error": result.error})
        data = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows).encode()
        try:
            with self._path.open("ab", buffering=0) as file:
                while data:  # one call is enough but for a disk that fills up
                    data = data[file.write(data) :]
                os.fsync(file.fileno())
        except OSError as error:
            raise _unwritable(self._path, error) from error

    def settle(self, dropped: frozenset[str] = frozenset()) -> None:
        """Read what is there, and mend it: no torn end, no error that was overcome, none of the dropped images."""
        try:
            content = self._path.read_bytes() if self._path.exists() else b""
        except OSError as error:
            raise DataError(f"{self._path}: cannot be read ({error.strerror})") from error
        *lines, tail = content.split(b"\n")
        if _whole(tail):
            lines.append(tail)
        rows = [(line, self._parse(line, number)) for number, line in enumerate(lines, 1) if line.strip()]
        rows = [(line, row) for line, row in rows if row["image"] not in dropped]
        self._captioned = {row["image"] for _, row in rows if "error" not in row}
        last = {row["image"]: number for number, (_, row) in enumerate(rows)}
        kept: list[bytes] = []
        self._errors = {}
        for number, (line, row) in enumerate(rows):
            key = row["image"]
            if "error" in row:
                if key in self._captioned or last[key] != number:
                    continue
                self._errors[key] = row["error"]
            kept.append(line + b"\n")
        mended = b"".join(kept)
        if mended != content:
            try:
                with replacing(self._path) as partial:
                    partial.write_bytes(mended)
            except OSError as error:
                raise _unwritable(self._path, error) from error

    def _parse(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and isinstance(row.get("image"), str) and row.keys() & _RESULTS:
            return row
        raise DataError(
            f'{self._path}: line {number} is no caption {{"image": ..., "caption": ...}}; mend or remove it, or '
            "write to another file"
        )

    def _key(self, path: Path) -> str:
        """The image's path from the file's folder, through no link: valid wherever both are moved together."""
        for folder in (path.parent, self._path.parent):
            if folder not in self._folders:
                self._folders[folder] = folder.resolve()
        real = self._folders[path.parent] / path.name
        return Path(os.path.relpath(real, self._folders[self._path.parent])).as_posix()


def _whole(tail: bytes) -> bool:
    """Whether a last line without its end is all there, as editors leave it; one cut short is not JSON."""
    try:
        json.loads(tail)
    except ValueError:
        return False
    return True
