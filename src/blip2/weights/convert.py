"""From one format of checkpoints to another."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch

from blip2.blip2 import Blip2
from blip2.calibration import Calibration
from blip2.config import PartConfig
from blip2.errors import CheckpointError, ConfigError
from blip2.weights import calibrated, hub, lavis, paddle, transformers
from blip2.weights.assemble import assemble, model_directory
from blip2.weights.load import load_config

Format = Literal["transformers", "lavis", "paddle"]


def convert(
    source: str | Path, target: Path, to: Format, *, parts: Mapping[str, str | Path] | None = None, vision: bool = False
) -> None:
    """Write a checkpoint anew in another format, every tensor in the type that it has; its calibration goes along.

    Args:
        source: a directory of transformers or PaddleNLP, or of our own whose parts are of their kinds; a LAVIS file, or
            a name on the hub.
        target: a directory, for `lavis` a `.pth`.
        parts: of a LAVIS source, see `blip2.load`.
        vision: for `lavis`, the image encoder too, as LAVIS keeps it where it was fine-tuned.
    Raises:
        CheckpointError: the source cannot be read, or the format cannot hold the model; nothing is written then.
    """
    if vision and to != "lavis":
        raise ConfigError("--vision is for LAVIS: the other formats always hold the image encoder")
    if to == "lavis" and target.suffix != lavis.SUFFIX:
        raise CheckpointError(f"{target}: a LAVIS file is called *{lavis.SUFFIX}")
    place = hub.download(str(source)) if hub.is_name(str(source)) else model_directory(source)
    calibration = _write(_open(place, parts), place, target, to, vision)
    if calibration is None:
        return
    made = lavis.identity_of(target) if to == "lavis" else _open(target, None).identity
    calibrated.write(calibrated.place(target), calibration, made)


def _write(model: Blip2, place: Path, target: Path, to: Format, vision: bool) -> Calibration | None:
    """Write a model. Gives the calibration that lies beside it: with the same weights it holds in any format."""
    calibration = calibrated.beside(place, model.identity)
    if to == "lavis":
        lavis.save(model, target, vision=vision)
    elif to == "paddle":
        paddle.save(model, target)
    else:
        transformers.save(model, target)
    return calibration


def _open(place: Path, parts: Mapping[str, str | Path] | None) -> Blip2:
    cpu = torch.device("cpu")
    if place.suffix == lavis.SUFFIX:
        return lavis.load(place, cpu, None, parts=parts)
    if parts:
        raise ConfigError(f"{place}: parts are those of a LAVIS file (.pth)")
    if paddle.holds(place):
        return paddle.load(place, cpu, None)
    if transformers.holds(place):
        return transformers.load(place, cpu, None)
    if not (place / "config.json").is_file():
        raise CheckpointError(f"{place}: neither the directory of a model nor a LAVIS file")
    return _own(place)


def _own(place: Path) -> Blip2:
    """A model in our own format, in float32: one fine-tuned from a published model, or such a one saved whole."""
    config = load_config(place)
    named = [key for key in ("vision", "language", "text") if isinstance(getattr(config, key), PartConfig)]
    if named:
        raise CheckpointError(
            f"{place}: its `{named[0]}` is a named frozen part, which other formats have no place for"
        )
    if config.vocabulary is not None:
        raise CheckpointError(f"{place}: writes {config.vocabulary} words only, which other formats cannot say")
    if config.question_aware:
        raise CheckpointError(f"{place}: its Q-Former reads questions too, which other formats cannot say")
    return assemble(place, torch.device("cpu"), torch.float32)
