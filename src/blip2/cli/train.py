"""`blip2 train`: one recipe, one run."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Annotated

import typer

from blip2.cli.console import note, result


def train(
    recipe: Annotated[
        str, typer.Argument(help="A YAML file, or the name of a recipe in the package.", show_default=False)
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Keys of the recipe, changed for this run.", show_default=False),
    ] = None,
) -> None:
    """Train a bridge: stage 1 to match images and texts, stage 2 to make a language model write; or fine-tune.

    A run that was stopped, killed or cut off goes on where it was when the same command is given again. Several GPUs:
    `torchrun --nproc-per-node 8 --no-python blip2 train RECIPE`.

    ```
    blip2 train own-stage1 data=photos.csv output=runs/stage1
    blip2 train own-stage2 data=photos.csv output=runs/stage2 start=runs/stage1
    blip2 caption photo.jpg --model runs/stage2/model
    blip2 train finetune-caption start=mini data=photos.csv output=runs/caption
    ```
    """
    from blip2 import pages
    from blip2.train.distributed import first_rank
    from blip2.train.loop import train as run
    from blip2.train.recipe import read

    pages.keep()
    try:
        report = run(read(find_recipe(recipe), overrides or []))
    except KeyboardInterrupt as stop:
        note(str(stop) or "stopped at once; the same command goes on from the last checkpoint")
        raise typer.Exit(130) from None
    if first_rank():
        result(str(report.model))


def find_recipe(name: str) -> Path:
    """The file that a person means: a path, or a name such as `own-stage1` of those that come with the package."""
    path = Path(name)
    if path.suffix or path.exists():
        return path
    packaged = Path(str(resources.files("blip2.train") / "recipes" / f"{name}.yaml"))
    return packaged if packaged.is_file() else path
