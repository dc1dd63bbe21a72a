"""What a run came to: `report.md` for people, `report.json` for programs, `losses.svg` for both."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import yaml

import blip2
from blip2 import drawing
from blip2.train.folder import Folder
from blip2.train.recipe import Recipe

WINDOW = 50  # most steps that the first and the last losses are averaged over; a quarter of a short run
_POINTS = 300  # of a drawn curve


@dataclass(frozen=True)
class Report:
    """A finished run.

    Attributes:
        steps: updates made, over all sittings.
        seconds: that they took.
        window: steps that `first` and `last` average over.
        first, last: mean losses at the beginning and at the end, by name.
        validations: step and metrics of each.
        selected: the step whose weights the model has.
        parameters: how many were trained.
        model: its directory.
    """

    steps: int
    seconds: float
    window: int
    first: dict[str, float]
    last: dict[str, float]
    validations: tuple[tuple[int, dict[str, float]], ...]
    selected: int
    parameters: int
    machine: dict[str, str]
    versions: dict[str, str]
    recipe: dict[str, Any]
    model: Path


def make(
    folder: Folder, recipe: Recipe, *, seconds: float, selected: int, parameters: int, device: torch.device
) -> Report:
    """The report of the run in a folder, from its log."""
    steps = [line for line in folder.lines() if "validation" not in line]
    validations = [(line["step"], line["validation"]) for line in folder.lines() if "validation" in line]
    window = max(1, min(WINDOW, len(steps) // 4))
    return Report(
        steps=len(steps),
        seconds=seconds,
        window=window,
        first=_means(steps[:window]),
        last=_means(steps[-window:]),
        validations=tuple(validations),
        selected=selected,
        parameters=parameters,
        machine=_machine(device),
        versions={"blip2": blip2.__version__, "torch": str(torch.__version__), "python": platform.python_version()},
        recipe=recipe.values(),
        model=folder.model,
    )


def write(report: Report, folder: Folder) -> None:
    """The three files, in the run's folder."""
    curves = _curves(list(folder.lines()))
    (folder.path / "losses.svg").write_text(drawing.curves(curves), encoding="utf-8")
    values = asdict(report) | {"model": str(report.model)}
    (folder.path / "report.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    (folder.path / "report.md").write_text(_markdown(report), encoding="utf-8")


def _losses(line: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in line.items() if name not in ("step", "lr", "norm")}


def _means(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    names = _losses(lines[0]) if lines else ()
    return {name: sum(line[name] for line in lines) / len(lines) for name in names}


def _machine(device: torch.device) -> dict[str, str]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {"device": f"{device.type} ({name})", "threads": str(torch.get_num_threads()), "system": platform.system()}


def _markdown(report: Report) -> str:
    pace = report.seconds / max(report.steps, 1)
    lines = [
        f"# Stage {report.recipe['stage']}: {report.steps} steps in {timedelta(seconds=round(report.seconds))}",
        "",
        f"{report.parameters:,} trained parameters, {pace:.2f} s a step, "
        f"{report.recipe['batch_size'] / pace if pace else 0:.1f} pairs a second; "
        + "; ".join(f"{name} {value}" for name, value in (report.machine | report.versions).items())
        + ".",
        f"The model in `{report.model.name}/` has the weights of step {report.selected}.",
        "",
        f"| loss | first {report.window} steps | last {report.window} steps |",
        "|---|---|---|",
        *(f"| {name} | {report.first[name]:.4f} | {value:.4f} |" for name, value in report.last.items()),
        "",
        "![losses](losses.svg)",
        "",
    ]
    if report.validations:
        names = list(report.validations[0][1])
        lines += ["| step | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
        lines += [
            f"| {step} | " + " | ".join(f"{metrics[name]:.4f}" for name in names) + " |"
            for step, metrics in report.validations
        ]
        lines.append("")
    return "\n".join([*lines, "```yaml", yaml.safe_dump(report.recipe, sort_keys=False).rstrip(), "```", ""])


def _curves(lines: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Each loss as at most `_POINTS` points, each the mean of its stretch of steps."""
    steps = [line for line in lines if "validation" not in line]
    stretch = -(-len(steps) // _POINTS) or 1
    curves: dict[str, list[tuple[int, float]]] = {}
    for start in range(0, len(steps), stretch):
        part = steps[start : start + stretch]
        for name, value in _means(part).items():
            curves.setdefault(name, []).append((part[-1]["step"], value))
    return curves
