"""Earlier weights come back: python examples/mini/mix.py runs/mini-reward/model runs/mini-speak/model runs/mini-mixed

A share of the heads and of the Q-Former's text side comes back from the second folder, an earlier model, as
`start_share` does from a run's own start. No caption passes through them, so captions stay the same to the bit;
answers change, since questions are read there. What `--rest` and `--projection` bring back captions pass through too.
"""

from __future__ import annotations

import argparse
import shutil
from fnmatch import fnmatch
from pathlib import Path

from safetensors.torch import load_file, save_file

TEXTS = ("heads.*", "qformer.positions.*", "qformer.layers.*.text_feed_forward.*")
WEIGHTS = "bridge.safetensors"


def main() -> None:
    """Write the mixture beside the files of the trained model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of the trained model")
    parser.add_argument("earlier", type=Path, help="folder of the model that a share comes back from")
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument("--share", type=float, default=0.5, help="of the earlier heads and text side (0.5)")
    parser.add_argument("--rest", type=float, default=0.0, help="of all else but the language projection (0)")
    parser.add_argument("--projection", type=float, default=0.0, help="of the language projection (0)")
    arguments = parser.parse_args()
    mixed, earlier = load_file(arguments.model / WEIGHTS), load_file(arguments.earlier / WEIGHTS)
    for name in mixed:
        share = arguments.share if any(fnmatch(name, pattern) for pattern in TEXTS) else arguments.rest
        if name.startswith("language_projection."):
            share = arguments.projection
        if share:  # the model of a stage 1 has no language projection
            mixed[name] = mixed[name].lerp(earlier[name].to(mixed[name]), share)
    shutil.copytree(arguments.model, arguments.output)
    save_file(mixed, arguments.output / WEIGHTS, {"format": "pt"})
    print(arguments.output)


if __name__ == "__main__":
    main()
