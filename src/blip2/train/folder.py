"""The folder of a run: one run at a time writes in it, under one recipe.

```
recipe.yaml      the whole recipe, defaults filled in
metrics.jsonl    losses of every step and every validation; the same bytes however often the run was interrupted
checkpoints/     the last two, and the best validation's weights
tensorboard/     the same curves, where tensorboard is installed
model/           the trained model, at the end
report.md, report.json, losses.svg
```
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import yaml

from blip2.errors import ConfigError
from blip2.train import checkpoint
from blip2.train.distributed import World
from blip2.train.recipe import Recipe, differences, parse

_REPORT = ("report.md", "report.json", "losses.svg")
_MADE = ("recipe.yaml", "metrics.jsonl", "checkpoints", "tensorboard", "model", *_REPORT)


@dataclass(frozen=True)
class Folder:
    """Where the parts of a run's output are."""

    path: Path

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def best(self) -> Path:
        return self.checkpoints / checkpoint.BEST

    @property
    def model(self) -> Path:
        return self.path / "model"

    def lines(self) -> Iterator[dict[str, Any]]:
        """What was logged so far; a last line that a kill cut short is left out."""
        if not self.metrics.is_file():
            return
        with self.metrics.open(encoding="utf-8") as file:
            for line in file:
                if line.endswith("\n"):
                    yield json.loads(line)

    def cut_log(self, step: int) -> None:
        """Leave in the log what was logged up to a step."""
        kept = [json.dumps(line) + "\n" for line in self.lines() if line["step"] <= step]
        partial = self.metrics.with_name(self.metrics.name + ".partial")
        partial.write_text("".join(kept), encoding="utf-8")
        partial.replace(self.metrics)


@contextmanager
def open_folder(recipe: Recipe, world: World) -> Generator[Folder, None, None]:
    """The output folder, locked until the end, its earlier run being one that this recipe can go on with.

    Raises:
        ConfigError: no folder can be there, another run writes there now, or its earlier run was under another recipe.
    """
    folder = Folder(recipe.output)
    if world.rank > 0:
        world.wait()  # until rank 0 has the lock and the folder is in order
        yield folder
        return
    with ExitStack() as until_the_end:
        try:
            folder.path.mkdir(parents=True, exist_ok=True)
            until_the_end.enter_context(filelock.FileLock(folder.path / ".lock", timeout=0))
            _prepare(folder, recipe)
        except filelock.Timeout:
            raise ConfigError(
                f"{folder.path}: another run writes here now; wait for its end, or choose another `output`"
            ) from None
        except OSError as error:
            raise ConfigError(f"output: {folder.path} cannot be a folder for the run: {error.strerror}") from None
        world.wait()
        yield folder


def _prepare(folder: Folder, recipe: Recipe) -> None:
    values = recipe.values()
    if not recipe.resume:
        for name in _MADE:
            place = folder.path / name
            shutil.rmtree(place) if place.is_dir() else place.unlink(missing_ok=True)
    elif checkpoint.latest(folder.checkpoints):
        if not folder.recipe.is_file():
            raise ConfigError(
                f"{folder.path} holds checkpoints without the recipe of their run; choose another `output`, "
                "or start over with resume=false"
            )
        before = yaml.safe_load(folder.recipe.read_text(encoding="utf-8"))
        changed = differences(parse(before, str(folder.recipe)).values(), values)  # keys that are new since then too
        if changed:
            raise ConfigError(
                f"{folder.path} holds a run under another recipe ({'; '.join(changed)}). "
                "Choose another `output`, take these keys back, or start over with resume=false"
            )
    checkpoint.remove_partial(folder.checkpoints)
    partial = folder.recipe.with_name("recipe.yaml.partial")
    partial.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    partial.replace(folder.recipe)
