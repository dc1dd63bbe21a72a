"""WebDataset shards, indexed: each member of a tar as a stretch of bytes, so that any sample can be read at any time.

The webdataset package streams; random access is what makes shuffling whole and resuming exact.
"""

from __future__ import annotations

import glob
import re
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from blip2.errors import DataError


@dataclass(frozen=True)
class ImageRef:
    """Where the bytes of a picture are: a file, or a stretch of one (a member of a tar).

    Attributes:
        size: number of bytes from `offset` on; None for the whole file.
    """

    path: Path
    offset: int = 0
    size: int | None = None

    def __str__(self) -> str:
        return str(self.path) if self.size is None else f"{self.path}@{self.offset}"

    def read(self) -> bytes:
        """The bytes.

        Raises:
            DataError: the file is gone or has become shorter.
        """
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                data = file.read() if self.size is None else file.read(self.size)
        except OSError as error:
            raise DataError(
                f"{self.path}: cannot be read ({error.strerror}); it was there when it was indexed"
            ) from None
        if self.size is not None and len(data) < self.size:
            raise DataError(f"{self}: {self.size} bytes expected, {len(data)} found; copy the file again")
        return data


@dataclass(frozen=True)
class Group:
    """Members of one shard that share a key.

    Attributes:
        parts: by suffix, such as `.jpg`.
    """

    shard: Path
    key: str
    parts: Mapping[str, ImageRef]


def groups(pattern: str) -> Iterator[Group]:
    """The samples of some shards, in order.

    Args:
        pattern: a tar, a folder of tars, `a-{000..004}.tar`, `{a,b}.tar` or `a-*.tar`.
    Raises:
        DataError: no such shard, one that cannot be read or is cut short (it names the last whole sample), or a
            member twice.
    """
    for shard in _shards(pattern):
        key, parts, whole = "", dict[str, ImageRef](), "none"
        size = end = 0
        try:
            size = shard.stat().st_size
            for member in _members(shard):
                stem, suffix = _key(member.name)
                if stem != key and parts:
                    yield Group(shard, key, parts)
                    whole, parts = key, {}
                if suffix in parts:
                    raise DataError(f"{shard}: member {member.name!r} comes twice; every picture needs its own id")
                end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                key = stem
                parts[suffix] = ImageRef(shard, member.offset_data, member.size)
        except OSError as error:
            raise DataError(f"{shard}: cannot be read: {error.strerror or error}") from None
        except tarfile.TarError as error:
            if end == 0:
                raise DataError(f"{shard}: not a readable tar: {error}") from None
            end = size
        if end >= size:  # a whole tar goes on with blocks of zeros
            raise DataError(
                f"{shard}: the shard is cut short at byte {size}; its last whole sample is {whole!r}. "
                "Copy it again, or leave it out of the list of shards"
            )
        if parts:
            yield Group(shard, key, parts)


def _members(shard: Path) -> Iterator[tarfile.TarInfo]:
    """Files of a tar, in order; only their headers are read."""
    with tarfile.open(shard, "r:") as tar:
        for member in tar:
            if member.isfile():
                yield member


def _key(name: str) -> tuple[str, str]:
    """WebDataset's rule: folder and name up to its first dot are the key, the rest is the kind."""
    path = PurePosixPath(name)
    stem, _, suffix = path.name.partition(".")
    return str(path.with_name(stem)), "." + suffix.lower()


def _shards(pattern: str) -> list[Path]:
    if Path(pattern).is_dir():
        return sorted(Path(pattern).glob("*.tar"))
    shards = [Path(name) for part in _braces(pattern) for name in (sorted(glob.glob(part)) or [part])]  # noqa: PTH207 (may be absolute)
    for shard in shards:
        if not shard.is_file():
            raise DataError(f"{shard}: no such shard (from {pattern!r})")
    return shards


def _braces(pattern: str) -> list[str]:
    """`a{0..2}.tar` and `{a,b}.tar` written out; other patterns as they are."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    bounds = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if bounds is None:
        middles = match[1].split(",")
    else:
        middles = [str(n).zfill(len(bounds[1])) for n in range(int(bounds[1]), int(bounds[2]) + 1)]
    head, tail = pattern[: match.start()], pattern[match.end() :]
    return [head + middle + rest for middle in middles for rest in _braces(tail)]
