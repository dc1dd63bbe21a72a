"""A published geometry with made-up weights, computed by us and by transformers: how far apart, from pixels to tokens.

    python -m benchmarks.exactness FOLDER [--preset pretrain_opt2.7b] [--tiny] [--json]

writes the weights into FOLDER where they are not there yet (OPT-2.7b: 7.5 GB, in bfloat16), then computes with ours and
with transformers in float32 on the CPU, each in a fresh process, one model in memory at a time: what the image encoder
gives, the Q-Former's queries, the visual prefix, the first logits, greedy and five-beam tokens after two prompts on two
pictures. The exit code is 1 where something differs by more than 1e-4 of the largest value, or in a token. OPT-2.7b
takes 16 GB of memory and some ten minutes on two cores; `--tiny` is the same at a size for tests, in seconds.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import geometry
from blip2.config import PRESETS, Blip2Config, OPTConfig, QFormerConfig, VisionConfig
from blip2.weights import verify

PROMPTS = ("", "w5 w9 w1 w30")
TINY = Blip2Config(
    vision=VisionConfig(image_size=28, width=32, layers=2, heads=4, mlp_width=64, key_bias=True),
    qformer=QFormerConfig(width=32, layers=3, heads=4, mlp_width=64, queries=4, encoder_width=32, text=False),
    language=OPTConfig(width=64, layers=2, heads=4, mlp_width=128, vocab_size=128, context=128),
    vision_norm_eps=1e-6,
    heads=False,
)
PEAK = "peak memory, GB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--preset", default="pretrain_opt2.7b", choices=[n for n in PRESETS if PRESETS[n].language])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    parser.add_argument("--side", choices=("ours", "theirs"), help=argparse.SUPPRESS)  # in a process of its own
    chosen = parser.parse_args()
    if chosen.side:
        compute(chosen.folder, chosen.side)
        return
    geometry.write(TINY if chosen.tiny else as_published(PRESETS[chosen.preset]), chosen.folder)
    for side in ("ours", "theirs"):
        again = [sys.executable, "-m", "benchmarks.exactness", str(chosen.folder), "--side", side]
        subprocess.run(again, check=True)
    found, expected = (torch.load(place(chosen.folder, side), weights_only=True) for side in ("ours", "theirs"))
    lines = [verify.compare(what, value, expected["values"][what]) for what, value in found["values"].items()]
    cost = {
        side: {key: each[key] for key in ("seconds", PEAK)} for side, each in (("ours", found), ("theirs", expected))
    }
    show(lines, cost, as_json=chosen.json)
    sys.exit(not all(line.equal for line in lines))


def as_published(config: Blip2Config) -> Blip2Config:
    """A preset as transformers' checkpoints hold it: a bias for the keys too, one epsilon for the image encoder."""
    assert isinstance(config.vision, VisionConfig)
    vision = dataclasses.replace(config.vision, key_bias=True)
    return config.replace(vision=vision, vision_norm_eps=vision.norm_eps, word_head=False)


def compute(folder: Path, side: str) -> None:
    """One of the two, into a file beside the weights."""
    begun = time.perf_counter()
    kept: dict[str, Any] = {}
    if side == "ours":
        seen = verify.ours(folder, verify.drawn(), PROMPTS)
        kept = {key: getattr(seen, key) for key in ("values", "pixels", "ids", "stop_ids")}
    else:
        given = torch.load(place(folder, "ours"), weights_only=True)
        seen = verify.Seen({}, given["pixels"], given["ids"], tuple(given["stop_ids"]))
        kept = {"values": verify.theirs(folder, seen, PROMPTS)}
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
    cost = {"seconds": round(time.perf_counter() - begun, 1), PEAK: round(peak, 1)}
    torch.save({**kept, **cost, "stop_ids": list(seen.stop_ids)}, place(folder, side))


def place(folder: Path, side: str) -> Path:
    """Where one of the two leaves what it computed."""
    return folder / f"exactness-{side}.pt"


def show(lines: list[verify.Line], cost: dict[str, dict[str, float]], *, as_json: bool) -> None:
    """The report: every comparison, and what each side took."""
    if as_json:
        print(json.dumps({"compared": [vars(line) for line in lines], "cost": cost}))
        return
    print(f"{'what':44} {'largest difference':>20}  equal")
    for line in lines:
        difference = "" if line.difference is None else f"{line.difference:.1e}"
        print(f"{line.what:44} {difference:>20}  {'yes' if line.equal else 'NO'}")
    for side, each in cost.items():
        print(f"{side}: {each['seconds']} s with loading, {each[PEAK]} GB at most (mapped files counted)")


if __name__ == "__main__":
    main()
