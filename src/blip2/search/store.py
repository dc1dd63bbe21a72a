"""The index on disk: segments that are written once, and one manifest that names those that count.

A change writes one new segment, then puts a new manifest in the place of the old: whoever is killed, or reads
meanwhile, finds the index before or after it. One process writes at a time; the lock falls with the process.

Letters: N images, Q queries an image, E width of the image-text space, P patches, D their width, T values of a
thumbnail.
"""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Collection as Container
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import numpy as np
import safetensors
import safetensors.torch
import torch
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

import blip2
from blip2.bulk import Failure
from blip2.errors import DataError
from blip2.files import replacing

FORMAT_VERSION = 2  # of the folder; 1 was a single file
MANIFEST = "blip2-index.json"
SEGMENT_BYTES = 256 << 20  # segments are merged up to this
OWN_SUFFIXES = (".safetensors", ".faiss", ".partial")
HALF_WRITTEN = ".tmp"  # what safetensors calls a file before it is whole begins so

_log = logging.getLogger(__name__)

File: TypeAlias = tuple[str, int, int]  # path, size in bytes, time of the last change in nanoseconds


@dataclass(frozen=True, eq=False, repr=False)
class Segment:
    """Images that were written together.

    Attributes:
        files: in the order in which they were encoded.
        serials: int64[N], growing; no two images of an index ever have the same.
        vectors: float16[N, Q, E], unit length but for the rounding.
        thumbnails: uint8[N, T], what the images look like.
        patches: float16[N, P, D] where they are kept for re-ranking.
        dead: bool[N], images that have left, or were encoded anew.
        name: of the file; empty until it is written.
    """

    files: tuple[File, ...]
    serials: NDArray[np.int64]
    vectors: Tensor
    thumbnails: Tensor
    patches: Tensor | None
    dead: NDArray[np.bool_]
    name: str = ""

    def __len__(self) -> int:
        return len(self.files)

    @property
    def nbytes(self) -> int:
        return self.vectors.nbytes + (0 if self.patches is None else self.patches.nbytes)

    def without(self, paths: Container[str]) -> Segment:
        """The same with these images dead."""
        return replace(self, dead=self.dead | np.array([file[0] in paths for file in self.files], bool))


Rest: TypeAlias = Sequence[tuple[Segment, NDArray[np.int64]]]  # segments and some of their rows, at least one


def merged(segments: Sequence[Segment]) -> Segment:
    """The live images of some segments as one that is not written yet."""
    alive = [np.flatnonzero(~segment.dead) for segment in segments]
    parts = [(segment, rows, torch.from_numpy(rows)) for segment, rows in zip(segments, alive, strict=True)]
    patches = [segment.patches[rows] for segment, _, rows in parts if segment.patches is not None]
    return Segment(
        tuple(segment.files[row] for segment, rows, _ in parts for row in rows.tolist()),
        np.concatenate([segment.serials[rows] for segment, rows, _ in parts]),
        torch.cat([segment.vectors[rows] for segment, _, rows in parts]),
        torch.cat([segment.thumbnails[rows] for segment, _, rows in parts]),
        torch.cat(patches) if patches else None,
        np.zeros(sum(map(len, alive)), bool),
    )


def tidied(segments: Sequence[Segment]) -> tuple[Segment, ...]:
    """Segments in the same order, without those that are mostly dead, each less than half of the one before it.

    So N images lie in about log N segments, and each is rewritten about log N times in all.
    """
    found: list[Segment] = []
    for segment in segments:
        if segment.dead.all():
            continue
        found.append(merged([segment]) if 2 * segment.dead.sum() > len(segment) else segment)
        while len(found) > 1 and found[-2].nbytes <= min(2 * found[-1].nbytes, SEGMENT_BYTES - found[-1].nbytes):
            found[-2:] = [merged(found[-2:])]
    return tuple(found)


@dataclass(frozen=True)
class Shortlist:
    """A file that knows roughly where each image is whose serial is below `upto`.

    Attributes:
        trained: vectors that there were when it was learned where images are.
    """

    name: str
    size: int
    upto: int
    trained: int


@dataclass(frozen=True)
class Collection:
    """What an index holds at one moment.

    Attributes:
        identity: of the model that made the vectors.
        model: what `blip2.load` takes to give it; may be empty.
        keeps_patches: each image's patches are kept too.
        roots: absolute files, folders and patterns that it is made of.
        failed: images that could not be read when it was last updated.
        next_serial: of the next image.
        shortlist: of images near to a text, see `lists`.
        sketch: of images near to an image, see `sketch`.
    """

    identity: str
    model: str = ""
    keeps_patches: bool = False
    roots: tuple[str, ...] = ()
    segments: tuple[Segment, ...] = ()
    failed: tuple[Failure, ...] = ()
    next_serial: int = 0
    shortlist: Shortlist | None = None
    sketch: Shortlist | None = None

    def files(self) -> dict[str, File]:
        """The live images by their paths."""
        return {
            file[0]: file
            for segment in self.segments
            for file, dead in zip(segment.files, segment.dead, strict=True)
            if not dead
        }

    def without(self, paths: Container[str]) -> Collection:
        return replace(self, segments=tuple(segment.without(paths) for segment in self.segments))

    def plus(
        self, files: Sequence[File], vectors: Tensor, thumbnails: Tensor, patches: Tensor | None = None
    ) -> Collection:
        """With these images, which take the place of those with the same paths."""
        end = self.next_serial + len(files)
        serials = np.arange(self.next_serial, end, dtype=np.int64)
        segment = Segment(tuple(files), serials, vectors, thumbnails, patches, np.zeros(len(files), bool))
        rest = self.without({file[0] for file in files})
        return replace(rest, segments=(*rest.segments, segment), next_serial=end)


# -- on disk ----------------------------------------------------------------------------------------------------------

_Name = Annotated[str, Field(pattern=r"^[0-9a-f]{16}\.(safetensors|faiss)$")]  # never a path out of the folder


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _SegmentEntry(_Strict):
    name: _Name
    dead: list[int]


class _ShortlistEntry(_Strict):
    name: _Name
    size: int
    upto: int
    trained: int


class _Manifest(_Strict):
    format: int
    made_by: str
    identity: str
    model: str
    keeps_patches: bool
    roots: list[Any]  # names of files need not be Unicode, which pydantic asks of a `str`
    segments: list[_SegmentEntry]
    failed: list[Any]
    next_serial: int
    shortlist: _ShortlistEntry | None
    sketch: _ShortlistEntry | None = None  # indexes had none before


@dataclass(frozen=True)
class Store:
    """A folder that holds an index."""

    directory: Path

    @property
    def exists(self) -> bool:
        return (self.directory / MANIFEST).is_file()

    @contextmanager
    def alone(self) -> Generator[None]:
        """Keeps other writers away; makes the folder where it is missing.

        Raises:
            DataError: the folder holds other things, or cannot be written.
        """
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            if not self.exists and any(not entry.name.startswith(".") for entry in self.directory.iterdir()):
                raise DataError(f"{self.directory}: holds other things, and no index; name a new folder")
            lock = FileLock(self.directory / ".lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                _log.warning("%s: another run is writing to it; waiting until it is done", self.directory)
                lock.acquire()
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            yield
        finally:
            lock.release()

    def read(self, *, mend: bool = False) -> Collection:
        """What the index holds now; vectors stay on the disk until they are used.

        Args:
            mend: leave out segments that are missing or damaged, instead of refusing the index.
        Raises:
            DataError: there is no index, it is damaged, or of another version.
        """
        while True:
            content = self._manifest()
            try:
                return self._collection(content, mend)
            except DataError:
                if self._manifest() == content:  # or a writer has just merged what it named
                    raise

    def write(self, collection: Collection) -> Collection:
        """Make this the content of the index, with its new segments written; only for who is `alone`.

        Raises:
            DataError: the disk is full or cannot be written; what was there before stays.
        """
        try:
            segments = tuple(
                segment if segment.name else self._write_segment(segment) for segment in tidied(collection.segments)
            )
            collection = replace(collection, segments=segments)
            with replacing(self.directory / MANIFEST) as partial:
                partial.write_text(json.dumps(_manifest(collection)), encoding="ascii")
        except (OSError, safetensors.SafetensorError) as error:
            raise self._unwritable(error) from error
        self.sweep(collection)
        return collection

    def sweep(self, collection: Collection) -> None:
        """Remove what killed writers left, and what was merged."""
        named = {segment.name for segment in collection.segments}
        named |= {known.name for known in (collection.shortlist, collection.sketch) if known}
        for path in self.directory.iterdir():
            own = path.suffix in OWN_SUFFIXES or path.name.startswith(HALF_WRITTEN)
            if own and path.name not in named:
                with suppress(OSError):  # still mapped by a reader, where the system minds: the next writer's
                    path.unlink()

    def _unwritable(self, error: Exception) -> DataError:
        reason = getattr(error, "strerror", None) or error
        return DataError(
            f"{self.directory}: cannot be written ({reason}); what was finished is kept: make room, and run again"
        )

    def _manifest(self) -> bytes:
        try:
            return (self.directory / MANIFEST).read_bytes()
        except FileNotFoundError:
            raise DataError(f"{self.directory}: is no index; make one with `blip2 index FOLDER --out I`") from None
        except OSError as error:
            raise DataError(f"{self.directory}: cannot be read ({error.strerror})") from error

    def _collection(self, content: bytes, mend: bool) -> Collection:
        again = "remove the folder and index again"
        try:
            raw = json.loads(content)
            form = raw["format"]
            if form != FORMAT_VERSION:
                raise DataError(f"{self.directory}: has format {form}, this version reads {FORMAT_VERSION}; {again}")
            manifest = _Manifest.model_validate(raw, strict=True)
            failed = tuple(Failure(Path(path), str(reason)) for path, reason in manifest.failed)
        except (ValueError, KeyError, TypeError, RecursionError) as error:  # pydantic's is a ValueError
            raise DataError(f"{self.directory}: {MANIFEST} is damaged ({_first_line(error)}); {again}") from error
        segments: list[Segment] = []
        for entry in manifest.segments:
            try:
                segments.append(_read_segment(self.directory / entry.name, entry.dead, manifest.keeps_patches))
            except DataError as error:
                if not mend:
                    raise
                _log.warning("%s; its images are encoded anew", error)
        if len({segment.vectors.shape[1:] for segment in segments}) > 1:
            raise DataError(f"{self.directory}: has segments of different shapes; {again}")
        return Collection(
            manifest.identity,
            manifest.model,
            manifest.keeps_patches,
            tuple(map(str, manifest.roots)),
            tuple(segments),
            failed,
            manifest.next_serial,
            *(Shortlist(**entry.model_dump()) if entry else None for entry in (manifest.shortlist, manifest.sketch)),
        )

    def _write_segment(self, segment: Segment) -> Segment:
        tensors: dict[str, Tensor] = {
            "vectors": segment.vectors,
            "thumbnails": segment.thumbnails,
            "serials": torch.from_numpy(segment.serials),
        }
        if segment.patches is not None:
            tensors["patches"] = segment.patches
        path = self.directory / f"{secrets.token_hex(8)}.safetensors"
        with replacing(path) as partial:
            content = {name: tensor.contiguous() for name, tensor in tensors.items()}
            safetensors.torch.save_file(content, partial, {"files": json.dumps(segment.files)})
        written = _read_segment(path, [], segment.patches is not None)
        return replace(written, dead=segment.dead)


def _manifest(collection: Collection) -> dict[str, Any]:
    """As `_Manifest` reads it."""
    return {
        "format": FORMAT_VERSION,
        "made_by": f"blip2 {blip2.__version__}",
        "identity": collection.identity,
        "model": collection.model,
        "keeps_patches": collection.keeps_patches,
        "roots": list(collection.roots),
        "segments": [
            {"name": segment.name, "dead": np.flatnonzero(segment.dead).tolist()} for segment in collection.segments
        ],
        "failed": [[str(failure.image), failure.error] for failure in collection.failed],
        "next_serial": collection.next_serial,
        "shortlist": asdict(collection.shortlist) if collection.shortlist else None,
        "sketch": asdict(collection.sketch) if collection.sketch else None,
    }


def _read_segment(path: Path, dead_rows: Sequence[int], patches_wanted: bool) -> Segment:
    try:
        with safetensors.safe_open(path, "pt") as file:
            rows: list[Any] = json.loads((file.metadata() or {})["files"])
            files = tuple((str(name), int(size), int(time)) for name, size, time in rows)
            vectors: Tensor = file.get_tensor("vectors")
            thumbnails: Tensor = file.get_tensor("thumbnails")
            serials: NDArray[np.int64] = file.get_tensor("serials").numpy()
            patches: Tensor | None = file.get_tensor("patches") if patches_wanted else None
        count = len(files)
        dead = np.zeros(count, bool)
        dead[dead_rows] = True
        if (
            (vectors.dtype, thumbnails.dtype) != (torch.float16, torch.uint8)
            or (vectors.ndim, thumbnails.ndim) != (3, 2)
            or {len(vectors), len(thumbnails), len(serials), len(vectors if patches is None else patches)} != {count}
            or (np.diff(serials) <= 0).any()
        ):
            raise ValueError(f"{count} files, vectors {tuple(vectors.shape)}")
    # torch, which maps the file, raises RuntimeError where it is gone
    except (safetensors.SafetensorError, OSError, RuntimeError, LookupError, ValueError, TypeError) as error:
        problem = f"{path}: is missing or damaged ({_first_line(error)}); `blip2 index` mends it"
        raise DataError(problem) from error
    return Segment(files, serials, vectors, thumbnails, patches, dead, path.name)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
