"""docs/recipes.md: every key of a recipe, from the fields and docstrings themselves.

python -m blip2.train.reference > docs/recipes.md
"""

from __future__ import annotations

import inspect
import re
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from blip2.train.recipe import MIN_LR, PRESETS, WARMUP, WARMUP_SHARE, Recipe
from blip2.train.sections import Features, LoRA, Losses, Reward, Source, Validate, Vision

TITLE = """# Every key of a recipe

A recipe is a YAML file; `blip2 train RECIPE [KEY=VALUE ...]` changes keys for one run, dots between sections
(`features.views=4`, `data.0.weight=0.5`). `own-stage1`, `own-stage2`, `finetune-caption`, `finetune-vqa` and
`finetune-retrieval` are recipes in the package. A key that is wrong is an error that names the nearest. Several GPUs:
`torchrun --nproc-per-node 8 --no-python blip2 train RECIPE`.

This page is written from the code by `make docs-recipes`.
"""
SECTIONS: dict[str, type[BaseModel]] = {
    "A run": Recipe,
    "`data`, one source": Source,
    "`validate`": Validate,
    "`features`": Features,
    "`losses`, of stage 1": Losses,
    "`reward`, in stage 2": Reward,
    "`vision`": Vision,
    "`lora`": LoRA,
}


def page() -> str:
    """The whole page."""
    parts = [TITLE]
    for title, section in SECTIONS.items():
        about = inspect.cleandoc(section.__doc__ or "").split("\n")[0]
        rows = [f"| {keys} | {default} | {text} |" for keys, default, text in entries(section)]
        parts.append("\n".join([f"## {title}\n\n{about}\n", "| key | default | what |", "|---|---|---|", *rows]) + "\n")
    return "\n".join([*parts, presets()])


def entries(section: type[BaseModel]) -> list[tuple[str, str, str]]:
    """Keys that are told together, their defaults, and what they are.

    Raises:
        ValueError: a field that the docstring does not tell, or tells twice.
    """
    fields = {info.alias or name: info for name, info in section.model_fields.items()}
    found: list[tuple[str, str, str]] = []
    for names, text in told(section.__doc__ or ""):
        keys = "<br>".join(f"`{name}`" for name in names)
        found.append((keys, "<br>".join(default(name, fields.pop(name)) for name in names), text.replace("|", "\\|")))
    if fields:
        raise ValueError(f"{section.__name__} does not tell its fields {', '.join(fields)}")
    return found


def told(docstring: str) -> list[tuple[list[str], str]]:
    """Names and text of each entry below `Attributes:`."""
    lines = inspect.cleandoc(docstring).partition("Attributes:\n")[2]
    parts = re.split(r"^    (?=\S)", lines, flags=re.MULTILINE)
    pairs = [" ".join(part.split()).partition(": ") for part in parts if part.strip()]
    return [(names.split(", "), text) for names, _, text in pairs]


def default(name: str, info: FieldInfo) -> str:
    """What a key is where the recipe leaves it out."""
    if name in PRESETS["paper"] or name in ("min_lr", "warmup"):
        return "by preset"
    if info.is_required():
        return "required"
    value: Any = info.get_default(call_default_factory=True)  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, BaseModel):
        return "see below"
    choices = get_args(info.annotation) if get_origin(info.annotation) is Literal else ()
    others = ", ".join(shown(choice) for choice in choices if choice != value)
    return f"{shown(value)}; or {others}" if others else shown(value)


def shown(value: Any) -> str:
    """A value as a recipe would have it."""
    if value is None or value in ((), {}):
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    return ", ".join(map(shown, value)) if isinstance(value, tuple) else str(value)  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]


def presets() -> str:
    """What the presets say where a recipe leaves it out."""
    names = list(PRESETS)
    rows = [f"| `{key}` | {' | '.join(shown(PRESETS[name][key]) for name in names)} |" for key in PRESETS[names[0]]]
    stages = (1, 2)
    rows += [f"| `warmup`, stage {n} | {' | '.join(shown(WARMUP[name, n]) for name in names)} |" for n in stages]
    rows += [f"| `min_lr`, stage {n} | {' | '.join(f'{MIN_LR[name, n]:g} of lr' for name in names)} |" for n in stages]
    note = f"A short run warms up over one step of {WARMUP_SHARE} at most."
    head = [f"| key | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    return "\n".join(["## Presets\n\nWhere the paper and its public code differ. " + note + "\n", *head, *rows]) + "\n"


if __name__ == "__main__":
    print(page(), end="")
