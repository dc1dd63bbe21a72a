"""What every frozen part needs: its packages, its fingerprint, and one place on disk for what is converted once.

A converted part is a directory in the cache whose manifest names every file with its size and SHA-256. It is built in
a hidden directory beside its place and renamed when it is whole, under a lock: a process that is killed half-way
leaves nothing that is taken for whole, and of two processes one builds while the other waits.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from safetensors import SafetensorError
from torch import Tensor

from blip2.errors import CheckpointError, MissingExtraError
from blip2.files import cache_directory, replacing
from blip2.text import Tokenizer

MANIFEST = "manifest.json"
_Manifest: TypeAlias = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class TextPart:
    """What a Q-Former takes from a frozen text encoder.

    Attributes:
        words: float32[V, D], the word embeddings.
        tokenizer: of the same vocabulary.
        weights: every tensor under the name that its own file has it, to start training from.
    """

    words: Tensor
    tokenizer: Tokenizer
    weights: dict[str, Tensor]


def require(module: str, feature: str) -> Any:
    """The module of an optional package.

    Raises:
        MissingExtraError: it is not installed; the message names the feature.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(feature, "mini") from error


def fingerprint(files: Iterable[Path]) -> str:
    """SHA-256 over the bytes of some files, one after the other.

    Raises:
        CheckpointError: a file cannot be read.
    """
    digest = hashlib.sha256()
    for path in files:
        try:
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from None
    return digest.hexdigest()


def converted(name: str, build: Callable[[Path], None], notice: str) -> Path:
    """The directory of a converted part, built at the first call.

    Sizes and times of its files are compared with the manifest at each call; where a time differs the bytes are
    read, and where they are wrong the part is built again.

    Args:
        name: of the directory; it changes with the source and with the way of converting it.
        build: fills the empty directory that it is given.
        notice: what stderr says before building, which takes its time.
    Raises:
        CheckpointError: the cache cannot be written (a full disk, say); the message names the directory.
    """
    import filelock

    directory = cache_directory() / name
    if _is_whole(directory):
        return directory
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(directory.with_name(f"{name}.lock")):
            if not _is_whole(directory):
                print(notice, file=sys.stderr, flush=True)
                _build(directory, build)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own error
        raise CheckpointError(
            f"{directory}: cannot be written: {error}; free some space there or set BLIP2_CACHE to another directory"
        ) from error
    return directory


def check(directory: Path) -> None:
    """Read every byte of a converted part.

    Raises:
        CheckpointError: a file is missing or differs from the manifest; the message names it.
    """
    for name, entry in _manifest(directory).items():
        path = directory / name
        if fingerprint([path]) != entry["sha256"]:
            raise CheckpointError(f"{path}: damaged; delete {directory} and it is made anew")


def _build(directory: Path, build: Callable[[Path], None]) -> None:
    """Build beside the place and rename; what a killed or damaged build left goes. The caller holds the lock."""
    work, damaged = (directory.with_name(f".{directory.name}-{state}") for state in ("unfinished", "damaged"))
    try:
        for left in (work, damaged):
            shutil.rmtree(left, ignore_errors=True)
        work.mkdir()
        build(work)
        for path in work.iterdir():
            path.chmod(work.stat().st_mode & 0o666)  # safetensors makes its files private
        _write_manifest(work, {path.name: fingerprint([path]) for path in sorted(work.iterdir())})
        if directory.exists():
            directory.rename(damaged)
        work.rename(directory)
    finally:
        for left in (work, damaged):
            shutil.rmtree(left, ignore_errors=True)


def _is_whole(directory: Path) -> bool:
    with contextlib.suppress(CheckpointError, OSError):
        manifest = _manifest(directory)
        found = {name: (directory / name).stat() for name in manifest}
        if any(found[name].st_size != entry["bytes"] for name, entry in manifest.items()):
            return False
        if any(found[name].st_mtime_ns != entry["mtime_ns"] for name, entry in manifest.items()):
            check(directory)
            with contextlib.suppress(OSError):  # a cache that is only readable is read again each time
                _write_manifest(directory, {name: entry["sha256"] for name, entry in manifest.items()})
        return True
    return False


def _manifest(directory: Path) -> _Manifest:
    path = directory / MANIFEST
    try:
        files: _Manifest = json.loads(path.read_text())["files"]
        if files and all({"sha256", "bytes", "mtime_ns"} <= entry.keys() for entry in files.values()):
            return files
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise CheckpointError(f"{path}: not a manifest; delete {directory} and it is made anew")


def _write_manifest(directory: Path, digests: dict[str, str]) -> None:
    """Last of all files and in one piece: what it names is on the disk."""
    files: _Manifest = {}
    for name, digest in digests.items():
        with (directory / name).open("rb") as file:
            os.fsync(file.fileno())
            stat = os.fstat(file.fileno())
        files[name] = {"sha256": digest, "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    with replacing(directory / MANIFEST) as partial:
        partial.write_text(json.dumps({"files": files}, indent=2))
