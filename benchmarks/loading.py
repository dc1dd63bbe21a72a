"""Loading OPT-2.7b's geometry (made-up weights, bfloat16): memory, and the time to a first caption.

    python -m benchmarks.loading FOLDER [--threads N] [--repeat N] [--layers N] [--beams N]

writes 7.5 GB of shards into FOLDER where they are not there yet, then measures each way in a fresh process: anonymous
memory at its highest over what the model's weights take, and seconds from the call that loads to the end of a caption
of ten tokens, five beams as `caption` takes them by default, with imports done before. Warm: the files are in the page
cache; cold: they were dropped from it. transformers, and 8 GB of memory, are needed; with fewer layers in both towers,
in a folder of its own, less of it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import geometry
from blip2.config import PRESETS
from blip2.decoding import BEAMS

NEW_TOKENS = 10
POLL = 0.01  # seconds
WAYS: dict[str, dict[str, Any]] = {
    "blip2, as stored": {"dtype": "bfloat16"},
    "blip2, cast to float16": {"dtype": "float16"},
    "blip2, int8": {"dtype": "bfloat16", "quantize": "int8"},
    "blip2, int4": {"dtype": "bfloat16", "quantize": "int4"},
    "transformers": {},
}
TIMED = ("blip2, as stored", "transformers")


class AnonymousMemory:
    """Watches what this process holds that no file backs, from now on."""

    def __init__(self) -> None:
        self.start = self.highest = _anonymous()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        """The most since the start, in bytes more than then."""
        self._stop.set()
        self._thread.join()
        return max(self.highest, _anonymous()) - self.start

    def _watch(self) -> None:
        while not self._stop.wait(POLL):
            self.highest = max(self.highest, _anonymous())


def _anonymous() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])


def ours(folder: Path, options: dict[str, Any], *, beams: int) -> dict[str, Any]:
    """One load by blip2, and a caption if there are beams."""
    import blip2.weights.assemble
    from blip2.blip2 import load

    assert blip2.weights.assemble is not None
    memory, start = AnonymousMemory(), time.perf_counter()
    model = load(folder, device="cpu", **options)
    loaded = time.perf_counter() - start
    peak = memory.stop()
    parts: list[Any] = [model.encoder, model.bridge, model.language]
    size = sum(tensor.nbytes for part in parts for tensor in part.state_dict().values())
    if beams:
        model.caption(geometry.picture(), num_beams=beams, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS)
    return {"load": loaded, "caption": time.perf_counter() - start, "peak": peak, "size": size}


def theirs(folder: Path, *, beams: int) -> dict[str, Any]:
    """The same by transformers."""
    from transformers import Blip2ForConditionalGeneration, BlipImageProcessor

    memory, start = AnonymousMemory(), time.perf_counter()
    model: Any = Blip2ForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16).eval()
    loaded = time.perf_counter() - start
    peak = memory.stop()
    size = sum(tensor.nbytes for tensor in model.parameters())
    if beams:
        processor = BlipImageProcessor(size={"height": 224, "width": 224})
        pixels = processor(geometry.picture(), return_tensors="pt").pixel_values.to(torch.bfloat16)
        model.config.image_token_index = 0
        ids = torch.tensor([[0] * model.config.num_query_tokens + [2]])
        with torch.inference_mode():
            model.generate(
                pixel_values=pixels, input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False,
                num_beams=beams, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS,
            )  # fmt: skip
    return {"load": loaded, "caption": time.perf_counter() - start, "peak": peak, "size": size}


def drop(folder: Path) -> None:
    """Take the files out of the page cache."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def warm(folder: Path) -> None:
    """Bring the files into the page cache."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            while file.read(2**24):
                pass


def _child(way: str, folder: Path, threads: int, beams: int) -> dict[str, Any]:
    options = ["--way", way, "--threads", str(threads), "--beams", str(beams)]
    command = [sys.executable, "-m", "benchmarks.loading", str(folder), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--layers", type=int, help="of each tower, for a smaller and quicker run")
    parser.add_argument("--way", choices=WAYS, help="measure this one here and now, in JSON")
    parser.add_argument("--beams", type=int, default=BEAMS, help="of the caption; with --way, 0 writes none")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.way:
        one = theirs if given.way == "transformers" else ours
        more: dict[str, Any] = {} if one is theirs else {"options": WAYS[given.way]}
        print(json.dumps(one(given.folder, beams=given.beams, **more)))
        return
    geometry.write(geometry.shortened(PRESETS["pretrain_opt2.7b"], given.layers), given.folder)
    warm(given.folder)
    for way in WAYS:
        found = _child(way, given.folder, given.threads, 0)
        print(
            f"{way}: weights {found['size'] / 1e9:.2f} GB, anonymous memory at most {found['peak'] / 1e9:.2f} GB while "
            f"loading: {found['peak'] / found['size']:.2f}; {found['load']:.1f} s",
            flush=True,
        )
    for name, prepare in (("warm", warm), ("cold", drop)):
        rounds: list[dict[str, dict[str, Any]]] = []
        for _ in range(given.repeat):
            rounds.append({})
            for way in TIMED:
                prepare(given.folder)
                rounds[-1][way] = _child(way, given.folder, given.threads, given.beams)
        for way in TIMED:
            loads, captions = ([each[way][key] for each in rounds] for key in ("load", "caption"))
            print(
                f"{name}, {way}: load {statistics.median(loads):.1f} s, first caption after "
                f"{statistics.median(captions):.1f} s (median of {given.repeat})",
                flush=True,
            )
        ratios = [each[TIMED[0]]["caption"] / each[TIMED[1]]["caption"] for each in rounds]
        print(f"{name}, blip2 over transformers: {statistics.median(ratios):.2f} of its time", flush=True)


if __name__ == "__main__":
    main()
