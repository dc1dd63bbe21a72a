"""From one format of checkpoints to another."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch

from blip2.blip2 import Blip2
from blip2.errors import CheckpointError, ConfigError
from blip2.weights import hub, lavis, paddle, transformers

Format = Literal["transformers", "lavis", "paddle"]


def convert(
    source: str | Path, target: Path, to: Format, *, parts: Mapping[str, str | Path] | None = None, vision: bool = False
) -> None:
    """Write a checkpoint anew in another format, every tensor in the type that it has.

    Args:
        source: a directory of transformers or PaddleNLP, a LAVIS file, or a name on the hub.
        target: a directory, for `lavis` a `.pth`.
        parts: of a LAVIS source, see `blip2.load`.
        vision: for `lavis`, the image encoder too, as LAVIS keeps it where it was fine-tuned.
    Raises:
        CheckpointError: the source cannot be read, or the format cannot hold the model; nothing is written then.
    """
    if vision and to != "lavis":
        raise ConfigError("--vision is for LAVIS: the other formats always hold the image encoder")
    model = _open(source, parts)
    if to == "lavis":
        if target.suffix != lavis.SUFFIX:
            raise CheckpointError(f"{target}: a LAVIS file is called *{lavis.SUFFIX}")
        lavis.save(model, target, vision=vision)
    elif to == "paddle":
        paddle.save(model, target)
    else:
        transformers.save(model, target)


def _open(source: str | Path, parts: Mapping[str, str | Path] | None) -> Blip2:
    cpu = torch.device("cpu")
    if hub.is_name(str(source)):
        source = hub.download(str(source))
    place = Path(source)
    if place.suffix == lavis.SUFFIX:
        return lavis.load(place, cpu, None, parts=parts)
    if parts:
        raise ConfigError(f"{place}: parts are those of a LAVIS file (.pth)")
    if paddle.holds(place):
        return paddle.load(place, cpu, None)
    if transformers.holds(place):
        return transformers.load(place, cpu, None)
    raise CheckpointError(
        f"{place}: neither a directory of transformers or PaddleNLP nor a LAVIS file; models in our own format name "
        "frozen parts that other formats have no place for"
    )
