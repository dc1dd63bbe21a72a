"""Files that appear whole or not at all, and the one place for what can be made again."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path


def cache_directory() -> Path:
    """Where blip2 keeps what it can make again: `BLIP2_CACHE`, or blip2 in `XDG_CACHE_HOME`, or ~/.cache/blip2."""
    if own := os.environ.get("BLIP2_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "blip2"


@contextmanager
def replacing(path: Path) -> Generator[Path]:
    """A new content for a file: whoever reads sees the old or the new, after a power cut as well.

    ```
    with replacing(path) as partial:
        partial.write_bytes(content)
    ```

    Args:
        path: what is there stays until the block has ended well; where the block or the disk fails, for good.
    Yields:
        An empty file beside it, to be written in whatever way.
    Raises:
        OSError: the disk is full, the folder is not there or cannot be written, ...; it names `path`.
    """
    partial = path.with_name(f".{secrets.token_hex(8)}.partial")
    try:
        partial.touch(exist_ok=False)
        mode = partial.stat().st_mode
        yield partial
        with partial.open("r+b") as file:
            os.fsync(file.fileno())
        partial.chmod(mode)  # safetensors makes its files private
        partial.replace(path)
    except OSError as error:
        if error.filename in (partial, os.fspath(partial)):
            error.filename = os.fspath(path)
        raise
    finally:
        with contextlib.suppress(OSError):  # the first error is the one to tell
            partial.unlink(missing_ok=True)
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Make a rename in the directory durable, where the system can."""
    if os.name != "posix":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
