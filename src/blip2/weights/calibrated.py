"""`calibration.json`, with a model of any format: what its matching probabilities are corrected by.

It is no part of `config.json`, so that a model's features keep their identity, and with it their indexes.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from blip2.calibration import Calibration
from blip2.config import Strict, describe
from blip2.errors import CheckpointError, ConfigError
from blip2.files import replacing

NAME = "calibration.json"
FORMAT = 1
_LIMIT = 1 << 16  # bytes: more is no calibration


@dataclass(frozen=True)
class _File(Strict):
    """What the file holds.

    Attributes:
        model: `Blip2.identity` of the model that it was fitted for.
    """

    calibration: Calibration
    model: str
    format: int = FORMAT


def place(model: Path) -> Path:
    """Where the calibration of a model lies: in its directory, or beside it where it is one file."""
    return model.with_suffix(f".{NAME}") if model.is_file() else model / NAME


def beside(model: Path, identity: str) -> Calibration | None:
    """The calibration of a model, None where there is none.

    Args:
        model: its directory or file.
    Raises:
        CheckpointError: see `read`.
    """
    path = place(model)
    return read(path, identity) if path.is_file() else None


def read(path: Path, identity: str) -> Calibration:
    """A calibration that `write` wrote.

    Args:
        identity: of the model that it is for.
    Raises:
        CheckpointError: it is missing, damaged, of a newer format or of another model; the message names the file.
    """
    anew = "fit it anew with `blip2 calibrate`, or delete it"
    try:
        with path.open("rb") as file:
            content = file.read(_LIMIT)
        found = TypeAdapter(_File).validate_json(content)
    except ValidationError as error:
        raise CheckpointError(f"{path}: {describe(error)}; {anew}") from None
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}; {anew}") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    if found.format > FORMAT:
        raise CheckpointError(f"{path}: format {found.format} is newer than this blip2 reads ({FORMAT}); upgrade it")
    if found.model != identity:
        raise CheckpointError(f"{path}: was fitted for another model, or before this one was trained on; {anew}")
    return found.calibration


def write(path: Path, calibration: Calibration, identity: str) -> None:
    """Write a calibration, whole or not at all.

    Raises:
        CheckpointError: it cannot be written.
    """
    content = json.dumps(dataclasses.asdict(_File(calibration, identity)), indent=2) + "\n"
    try:
        with replacing(path) as partial:
            partial.write_text(content, encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error.strerror}); name another place") from error
