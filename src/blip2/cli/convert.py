"""`blip2 convert`: a checkpoint in another format."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from blip2.errors import ConfigError


class To(StrEnum):
    """Formats that can be written."""

    TRANSFORMERS = "transformers"
    LAVIS = "lavis"
    PADDLE = "paddle"


def convert(
    source: Annotated[
        str,
        typer.Argument(metavar="SRC", help="A directory (transformers, PaddleNLP), a LAVIS .pth, or a hub name."),
    ],
    target: Annotated[Path, typer.Argument(metavar="DST", help="A directory, or a .pth for LAVIS.")],
    *,
    to: Annotated[To, typer.Option(help="The format to write.", show_default=False)],
    part: Annotated[
        list[str] | None,
        typer.Option(help="KEY=PATH of a frozen part of a LAVIS file: vision, language, text.", show_default=False),
    ] = None,
    vision: Annotated[bool, typer.Option("--vision", help="For LAVIS: write the image encoder too.")] = False,
) -> None:
    """Write a checkpoint in another format.

    Every tensor keeps its type and its bits, and a calibration goes along. A LAVIS file holds what was trained only:
    converting from one needs its frozen parts, beside the file under their published names or given with --part;
    converting to one leaves them out.

    ```
    blip2 convert Salesforce/blip2-opt-2.7b blip2_pretrained_opt2.7b.pth --to lavis
    blip2 convert blip2_pretrained_opt2.7b.pth opt/ --to transformers --part language=opt-2.7b/
    ```
    """
    from blip2.weights.convert import convert as run

    parts = dict(_pair(each) for each in part or [])
    run(source, target, to.value, parts=parts, vision=vision)


def _pair(text: str) -> tuple[str, str]:
    key, equals, path = text.partition("=")
    if not equals or key not in ("vision", "language", "text") or not path:
        raise ConfigError(f"--part {text}: write KEY=PATH, with vision, language or text for KEY")
    return key, path
