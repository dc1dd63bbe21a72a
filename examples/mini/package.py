"""Put a trained mini into the package, in half precision: python examples/mini/package.py runs/mini"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import blip2
from blip2 import adapters, weights
from blip2.config import read_config

PLACE = Path(blip2.__file__).parent / "mini"
LIMIT = 45_000_000  # bytes: the repository holds no more


def main() -> None:
    """Copy the model's bridge in float16; what its frozen parts hold is not in it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="folder of the trained model")
    model = parser.parse_args().model
    config = read_config(model / "config.json")
    words = adapters.text_part(config.text).words if config.text else None
    loaded = weights.load(model, words)
    weights.save(PLACE, config, loaded.bridge, dtype=torch.float16, vocabulary=loaded.vocabulary)
    size = sum(file.stat().st_size for file in PLACE.iterdir())
    if size > LIMIT:
        raise SystemExit(f"error: {PLACE} is {size / 1e6:.1f} MB, more than {LIMIT / 1e6:.0f} MB")
    print(f"{PLACE}: {size / 1e6:.1f} MB; its matching probabilities want `blip2 calibrate` anew (docs/matching.md)")


if __name__ == "__main__":
    main()
