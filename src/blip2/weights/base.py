"""The model that a fine-tuned one was made from: where it is, and that it is still the same."""

from __future__ import annotations

import hashlib
from pathlib import Path

from blip2.config import BaseConfig
from blip2.errors import CheckpointError
from blip2.weights import hub

WEIGHTS = ("*.safetensors", "*.bin", "*.pdparams")
SAMPLES, BLOCK = 256, 4096  # places of a file that are read, and bytes at each: another model differs everywhere


def digest(directory: Path) -> str:
    """SHA-256 over names, sizes and samples of a model's files of weights: milliseconds, however large they are.

    Raises:
        CheckpointError: there are none, or one cannot be read.
    """
    found = hashlib.sha256()
    files = sorted(path for pattern in WEIGHTS for path in directory.glob(pattern))
    if not files:
        raise CheckpointError(f"{directory}: holds no weights")
    try:
        for path in files:
            size = path.stat().st_size
            found.update(f"{path.name} {size}\n".encode())
            with path.open("rb") as file:
                for number in range(SAMPLES):
                    file.seek(number * max(0, size - BLOCK) // max(1, SAMPLES - 1))
                    found.update(file.read(BLOCK))
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be read: {error}") from None
    return found.hexdigest()


def find(base: BaseConfig, source: Path) -> Path:
    """The directory of a base.

    Args:
        source: the model that names it, for errors.
    Raises:
        CheckpointError: it is not there, or another one is.
    """
    directory = _downloaded(base.name) if hub.is_name(base.name) else Path(base.name)
    if not directory.is_dir():
        raise CheckpointError(
            f"{source}: was made from {base.name}, which is not there; write where it is now as `base.name` in "
            f"{source / 'config.json'}"
        )
    if digest(directory) != base.sha256:
        raise CheckpointError(f"{source}: was made from another model than lies in {base.name} now; put that one back")
    return directory


def _downloaded(name: str) -> Path:
    """From the hub's cache; the hub is asked only for what is not there."""
    try:
        return hub.download(name, offline=True)
    except CheckpointError:
        return hub.download(name)
