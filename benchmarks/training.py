"""Training steps a second, against the same step as public code takes it (`benchmarks.plain_step`).

    python -m benchmarks.training [--rows stage1 mini stage2] [--precision fp32 bf16] [--steps N] [--json FILE]

Made-up features and captions of real lengths, the same batches on both sides, the sides in turn; each side's median.
The image encoder is frozen and its features are given. Rows:
  stage1  a Q-Former of BERT-base's width and 4 layers, 32 queries, 257 patches of ViT-g, 16 pictures a batch
  mini    mini's own Q-Former (6 layers of 384, 16 queries, 31 patches), 32 pictures a batch
  stage2  the first of them, and an OPT of 4 layers of 768: 8 pictures with three texts each
All three losses of stage 1 learn from every row. Ours takes the softmax over the 7,000 words in use, the plain step
over the whole vocabulary. Then one step of ours is profiled: where the time goes.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks import plain_step
from blip2.config import PRESETS, Blip2Config, OPTConfig, QFormerConfig
from blip2.model.bridge import Bridge
from blip2.model.opt import OPT
from blip2.protocols import LanguageModel
from blip2.train import optimizer
from blip2.train.checkpoint import State
from blip2.train.distributed import World
from blip2.train.objectives import Batch, Stage1, Stage2
from blip2.train.recipe import Recipe
from blip2.train.update import Precision, Update

# Flickr8k's validation captions in MiniLM's tokens, both ends included: how many of a thousand have 5, 6, ... of them
LENGTHS = (2, 9, 22, 50, 72, 88, 99, 112, 93, 98, 78, 69, 52, 45, 28, 24, 15, 11, 10, 5, 4, 4, 3, 1, 1, 1, 0, 2)
SHORTEST = 5
LONGEST = 32  # that the plain step pads to: a recipe's `text_length`
WORDS_IN_USE = 7000
FIRST_WORD = 1000  # of BERT's vocabulary: what stands before is marks and single letters
BOS, STOP = 2, 50118  # of OPT
TEXTS = 3  # about a picture, in stage 2
CLIP = 1.0
WARM = 1  # steps that are not timed
_QFORMER = QFormerConfig(layers=4, dropout=0.0)
_OPT = OPTConfig(width=768, layers=4, heads=12, mlp_width=3072)
ROWS: dict[str, tuple[Blip2Config, int, int]] = {  # configuration, pictures, patches
    "stage1": (Blip2Config(qformer=_QFORMER), 16, 257),
    "mini": (
        PRESETS["mini"].replace(language=None, qformer=dataclasses.replace(PRESETS["mini"].qformer, dropout=0.0)),
        32,
        31,
    ),
    "stage2": (Blip2Config(qformer=_QFORMER, language=_OPT), 8, 257),
}
GROUPS = {
    "matrix products": ("mm", "addmm", "bmm", "baddbmm", "linear"),
    "softmax, norms, GELU": ("softmax", "layer_norm", "gelu"),
    "optimizer and clipping": ("adam", "lerp", "addcdiv", "vector_norm", "_foreach"),
    "copies and casts": ("copy_", "cat", "index", "gather", "clone", "scatter"),
}


def batches(row: str, count: int, seed: int = 0) -> list[Batch]:
    """Made-up batches: features, and words drawn by Zipf's law in captions of real lengths."""
    config, rows, patches = ROWS[row]
    draw = np.random.default_rng(seed)
    used = words_in_use(config).numpy()
    odds = 1 / np.arange(1, len(used) + 1)
    owners = np.repeat(np.arange(rows), TEXTS) if row == "stage2" else np.arange(rows)
    found: list[Batch] = []
    for _ in range(count):
        lengths = draw.choice(np.arange(len(LENGTHS)) + SHORTEST, len(owners), p=np.array(LENGTHS) / sum(LENGTHS))
        captions = [draw.choice(used, length, p=odds / odds.sum()) for length in lengths]
        images = torch.from_numpy(draw.standard_normal((rows, patches, config.qformer.encoder_width), np.float32))
        numbers, ids = torch.arange(rows), torch.empty(rows, 0, dtype=torch.int64)
        if row == "stage2":
            for caption in captions:
                caption[-1] = STOP
            more: dict[str, Any] = {
                "owners": torch.from_numpy(owners),
                "prompts": ((),) * len(owners),
                "targets": _padded(captions, -100),
            }
            found.append(Batch(images, numbers, ids, **more))
        else:
            for caption in captions:
                caption[0], caption[-1] = config.qformer.cls_id, config.qformer.sep_id
            found.append(Batch(images, numbers, _padded(captions, config.qformer.pad_id)))
    return found


def words_in_use(config: Blip2Config) -> Tensor:
    """int64[K], sorted, the marks among them: evenly from the vocabulary."""
    size = config.qformer.vocab_size
    even = FIRST_WORD + np.arange(WORDS_IN_USE) * (size - FIRST_WORD) // WORDS_IN_USE
    marks = [STOP] if config.language else [config.qformer.cls_id, config.qformer.sep_id]
    return torch.from_numpy(np.unique(np.concatenate([even, marks])))


def _padded(rows: Sequence[Any], value: int) -> Tensor:
    made = np.full((len(rows), max(map(len, rows))), value)
    for line, row in zip(made, rows, strict=True):
        line[: len(row)] = row
    return torch.from_numpy(made)


@dataclass(frozen=True)
class Pair:
    """One row of the table: our step and the plain one, from the same weights; both change weights of their own."""

    ours: Callable[[Batch], dict[str, float]]
    plain: Callable[[Batch], dict[str, float]]


def pair(row: str, precision: str) -> Pair:
    """Both steps of a row."""
    config = ROWS[row][0]
    torch.manual_seed(0)
    ours, theirs = Bridge(config), Bridge(config)
    theirs.load_state_dict(ours.state_dict())
    language = OPT(_OPT) if row == "stage2" else None
    return Pair(_ours(ours, language, precision), _plain(theirs, language, precision))


def _ours(bridge: Bridge, language: LanguageModel | None, precision: str) -> Callable[[Batch], dict[str, float]]:
    stage = 1 if language is None else 2
    recipe = Recipe.model_validate(
        {"stage": stage, "model": "mini", "data": "made up", "output": "none", "start": None, "steps": 100,
         "batch_size": 16, "lr": 1e-4, "warmup": 0, "clip": CLIP, "precision": precision, "device": "cpu"}
    )  # fmt: skip
    vocabulary = words_in_use(bridge.config)
    objective: nn.Module = Stage1(bridge, vocabulary=vocabulary)
    if language is not None:
        objective = Stage2(bridge, language, bos=BOS, vocabulary=vocabulary)
    device = torch.device("cpu")
    chosen = Precision.choose(precision, device)
    state = State(bridge, optimizer.adamw(optimizer.choose(bridge, recipe), recipe), chosen.scaler(), None)
    update = Update(recipe, objective, 100, state, World(), device, chosen)
    return lambda batch: update(iter([batch]), stop=False).losses


def _plain(bridge: Bridge, language: LanguageModel | None, precision: str) -> Callable[[Batch], dict[str, float]]:
    adamw = plain_step.optimizer(bridge, 1e-4)
    bridge.train()

    def step(batch: Batch) -> dict[str, float]:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            if language is None:
                losses = plain_step.stage1(bridge, batch, LONGEST, seed=0)
            else:
                losses = plain_step.stage2(bridge, language, batch, LONGEST, BOS)
        torch.stack(list(losses.values())).sum().backward()
        nn.utils.clip_grad_norm_(bridge.parameters(), CLIP)
        adamw.step()
        adamw.zero_grad()
        return {name: float(loss.detach()) for name, loss in losses.items()}

    return step


def measure(row: str, precision: str, steps: int) -> dict[str, Any]:
    """One row of the table."""
    both = pair(row, precision)
    seconds: dict[str, list[float]] = {"ours": [], "plain": []}
    data = batches(row, WARM + steps)
    for number, batch in enumerate(data):
        for side, step in (("plain", both.plain), ("ours", both.ours)):
            start = time.perf_counter()
            step(batch)
            if number >= WARM:
                seconds[side].append(time.perf_counter() - start)
    ours, plain = (statistics.median(seconds[side]) for side in ("ours", "plain"))
    found = {"row": row, "precision": precision, "pictures": ROWS[row][1], "ours": ours, "plain": plain}
    return found | {"ratio": plain / ours, "seconds": seconds, "shares": shares(lambda: both.ours(data[0]))}


def shares(run: Callable[[], object]) -> dict[str, float]:
    """Where the time of one run goes: seconds of each group of operations."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        run()
    spent = dict.fromkeys([*GROUPS, "the rest"], 0.0)
    for event in seen.key_averages():
        name = event.key.removeprefix("aten::").lower()
        fits = (group for group, parts in GROUPS.items() if any(_names(name, part) for part in parts))
        spent[next(fits, "the rest")] += event.self_cpu_time_total / 1e6
    return spent


def _names(operation: str, part: str) -> bool:
    """Whether an operation is of a kind: a short name is the whole of it."""
    return operation == part if part in GROUPS["matrix products"] else part in operation


def machine() -> dict[str, str]:
    """What the numbers were taken on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())
    return {"processor": name, "threads": str(torch.get_num_threads()), "torch": str(torch.__version__)}


HEADER = """
| step | precision | pictures | plain, steps/s | ours, steps/s | ratio | where ours spends its time |
|---|---|---|---|---|---|---|"""


def line(row: dict[str, Any]) -> str:
    """A row of the table in Markdown: steps a second of both sides, and where ours spends its time."""
    total = sum(row["shares"].values())
    spent = ", ".join(f"{group} {100 * part / total:.0f}%" for group, part in row["shares"].items())
    sides = f"{1 / row['plain']:.3f} | {1 / row['ours']:.3f} | {row['ratio']:.2f}"
    return f"| {row['row']} | {row['precision']} | {row['pictures']} | {sides} | {spent} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print(", ".join(f"{name} {value}" for name, value in machine().items()) + "\n" + HEADER, flush=True)
    rows: list[dict[str, Any]] = []
    for row, precision in itertools.product(given.rows, given.precision):
        rows.append(measure(row, precision, given.steps))
        print(line(rows[-1]), flush=True)
    if given.json:
        given.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
