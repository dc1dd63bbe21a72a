"""SHA-256 of pictures, remembered from run to run: what has not been touched since is not read again."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from blip2.data.shards import ImageRef
from blip2.errors import DataError

_SETTLED = 2 * 10**9  # nanoseconds: a file changed later than this may change again within a tick of its clock


def picture_digests(refs: Sequence[ImageRef], memory: Path) -> list[str]:
    """SHA-256 of the bytes of each picture, in hexadecimal.

    Args:
        memory: file in which they are remembered by place, size and time of the last change; it is made where it is
            missing, and one that cannot be understood is as good as none.
    Raises:
        DataError: a picture's file is gone.
        OSError: the memory cannot be written.
    """
    known = _recall(memory)
    stamps = {path: _stamp(path) for path in {ref.path for ref in refs}}
    settled = time.time_ns() - _SETTLED
    learned: dict[str, tuple[list[int], str]] = {}
    digests: list[str] = []
    for ref in refs:
        stamp = stamps[ref.path]
        place = f"{os.path.abspath(ref.path)}@{ref.offset}+{ref.size}"  # noqa: PTH100 (links stay as they are)
        match known.get(place):
            case [earlier, str(digest)] if earlier == stamp:
                pass
            case _:
                digest = hashlib.sha256(ref.read()).hexdigest()
                if stamp[1] < settled:
                    learned[place] = stamp, digest
        digests.append(digest)
    if learned:
        memory.parent.mkdir(parents=True, exist_ok=True)
        partial = memory.with_name(f"{memory.name}.{os.getpid()}.partial")
        partial.write_text(json.dumps(_recall(memory) | learned), encoding="utf-8")  # another run may have added some
        partial.replace(memory)
    return digests


def _recall(memory: Path) -> dict[str, Any]:
    try:
        content = json.loads(memory.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _stamp(path: Path) -> list[int]:
    """Size and time of the last change."""
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); it was there when it was indexed") from None
    return [status.st_size, status.st_mtime_ns]
