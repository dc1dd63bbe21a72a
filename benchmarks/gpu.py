"""BLIP-2 on one GPU against transformers, in one call of under ten minutes, with no network and nothing on disk.

    python -m benchmarks.gpu [--out gpu.json] [--budget 540] [--rows caption,beams,...] [--tiny]

Made-up weights at the geometry of OPT-2.7b and Flan-T5-xl, made on the device, the same for both sides, bfloat16. Rows:
one caption, five beams, ten questions about one image, captions a second by batch size beside the limit that the image
encoder's arithmetic sets, one step beside the time to read its weights, a folder of JPEGs from the disk, caption and
step in int8, fp8 and int4, peak memory of the four published models. Before any of them the plain path's tokens are
compared with the engine's. What bounds a row is measured in the same run: multiplications a second by a large product,
bytes a second by a copy. A table goes to stdout and all numbers to --out after each row; a row that fails says why, and
rows that the budget has no time for are named. Where transformers is not installed its columns are empty. `--tiny` is
the same on a CPU at a size for tests.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import blip2
from benchmarks import geometry
from benchmarks.exactness import TINY, as_published
from benchmarks.sides import Ours, Theirs, seconds, wait
from blip2.bulk import caption_files
from blip2.config import PRESETS, Blip2Config, T5Config, VisionConfig
from blip2.decoding import Decoding
from blip2.generate import plain as plainly
from blip2.kernels import chosen, chosen_on_cuda
from blip2.model import prefix
from blip2.quantize import Scheme, coarse_size

NEW_TOKENS, ANSWER_TOKENS, QUESTIONS, BEAMS = 20, 10, 10, 5
SIZES, TINY_SIZES = (1, 4, 16, 64, 128, 256), (1, 2)
THEIR_MOST = 64  # images in a batch of the peer's: its beams and caches fill the memory beyond
FOLDER = 512  # JPEGs
PUBLISHED = ("pretrain_opt2.7b", "pretrain_opt6.7b", "pretrain_flant5xl", "pretrain_flant5xxl")
SEEDS = {"bfloat16": 7.21, "int8": 3.61, "int4": 1.8}  # GB that OPT-2.7b's card gives: "total size" at each precision
TINY_T5 = TINY.replace(language=T5Config(width=64, layers=2, heads=2, head_width=32, mlp_width=128, vocab_size=128))
COARSE: tuple[Scheme, ...] = ("int8", "fp8", "int4")
PROBE = 8192  # side of the matrices that are multiplied to see how fast that is


@dataclass
class Run:
    """One call: what it runs on, and what it found so far."""

    device: torch.device
    dtype: torch.dtype
    tiny: bool
    out: Path | None
    ends: float
    compiled: bool = False
    found: dict[str, Any] = field(default_factory=dict[str, Any])
    _ours: dict[str, Ours] = field(default_factory=dict[str, Ours])
    _theirs: dict[str, Theirs | None] = field(default_factory=dict[str, Any])

    def config(self, preset: str) -> Blip2Config:
        """Of a published model, or the small one's with its kind of language model."""
        if self.tiny:
            return TINY_T5 if "t5" in preset else TINY
        return as_published(PRESETS[preset])

    def ours(self, preset: str = PUBLISHED[0]) -> Ours:
        """Our side, made once."""
        if preset not in self._ours:
            self._ours[preset] = Ours(self.config(preset), self.device, self.dtype)
        return self._ours[preset]

    def theirs(self, preset: str = PUBLISHED[0]) -> Theirs | None:
        """The peer, made once; None where it is not installed."""
        if preset not in self._theirs:
            try:
                self._theirs[preset] = Theirs(self.config(preset), self.device, self.dtype)
            except ImportError:
                self._theirs[preset] = None
        return self._theirs[preset]

    def forget(self) -> None:
        """Free both sides' memory."""
        self._ours.clear()
        self._theirs.clear()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def keep(self) -> None:
        """Write what was found so far."""
        if self.out is not None:
            self.out.write_text(json.dumps(self.found, indent=1))


def squares(run: Run, ours: Ours, count: int) -> torch.Tensor:
    """Pictures as the encoder's squares: uint8[N, S, S, 3], each another."""
    one = torch.from_numpy(ours.model.transform.square(geometry.picture()).copy())
    return torch.stack([one.roll(number, 0) for number in range(count)]).to(run.device)


def compared(
    run: Run, count: int, beams: int, tokens: int, asked: tuple[str, ...] = (), preset: str = PUBLISHED[0]
) -> dict[str, Any]:
    """One job on both sides: captions of so many images, or answers to questions about one."""
    ours, theirs = run.ours(preset), run.theirs(preset)
    pictures = squares(run, ours, count)
    mine = ours.write(pictures, asked, beams, tokens)
    row: dict[str, Any] = {"ours": seconds(lambda: ours.write(pictures, asked, beams, tokens), run.device)}
    if theirs is None or count > THEIR_MOST:
        return {**row, "theirs": None}
    pixels, ids = ours.model.transform.normalised(pictures), ours.prompts(asked)

    def write() -> list[list[int]]:
        if asked:  # a picture goes with each question
            return [row for one in ids for row in theirs.write(pixels, [one], beams, tokens)]
        return theirs.write(pixels, ids * count, beams, tokens)

    same = sum(one == other for one, other in zip(mine, write(), strict=True)) / len(mine)
    row["theirs"] = seconds(write, run.device, repeat=1 if asked else 3)
    return {**row, "times": row["theirs"] / row["ours"], "tokens_equal": same}


def check(run: Run) -> dict[str, Any]:
    """The engine's tokens against the plain path's, greedy and in beams: in float32 they must be equal."""
    model = Ours(TINY, run.device, torch.float32).model
    language, tokenizer = model.writer()
    prompts = ["w5 w9", "", "w7 w8 w9 w1"]
    with torch.inference_mode():
        features = model.encode([geometry.picture().rotate(90 * turn) for turn in range(len(prompts))])
        visual, ids = model.bridge.project(features.queries), tokenizer.prompts(prompts)
        start = prefix.build(language, visual, ids, tokenizer.bos, model.config.prompts.visual)
        for width in (1, BEAMS):
            decoding = Decoding.of({"num_beams": width, "max_new_tokens": NEW_TOKENS})
            written = [row[0].ids for row in model.write(features, prompts, decoding)]
            slow = plainly.generate(language, *start, decoding.method, decoding.limits, tokenizer.stop_ids)
            if written != [row[0].ids for row in slow]:
                raise RuntimeError(f"{width} beams: the engine writes {written}, the plain path {slow}")
    return {"equal": True}


def caption(run: Run) -> dict[str, Any]:
    """One caption, greedy."""
    return compared(run, 1, 1, NEW_TOKENS)


def beams(run: Run) -> dict[str, Any]:
    """One caption, five beams."""
    return compared(run, 1, BEAMS, NEW_TOKENS)


def questions(run: Run) -> dict[str, Any]:
    """Ten questions about one image."""
    asked = tuple(f"w{11 + number} w5 w6" for number in range(QUESTIONS))
    return compared(run, 1, 1, ANSWER_TOKENS, asked)


def batches(run: Run) -> dict[str, Any]:
    """Captions a second by batch size, greedy."""
    rows: dict[str, Any] = {}
    for count in TINY_SIZES if run.tiny else SIZES:
        row = compared(run, count, 1, NEW_TOKENS)
        rows[str(count)] = {key: value and count / value for key, value in row.items() if key in ("ours", "theirs")}
        if time.perf_counter() > run.ends:
            break
    best = {side: max((row[side] for row in rows.values() if row[side]), default=None) for side in ("ours", "theirs")}
    vision = run.config(PUBLISHED[0]).vision
    assert isinstance(vision, VisionConfig)
    limit = run.found["machine"]["flops"] / vision_flops(vision)
    times = best["ours"] / best["theirs"] if best["ours"] and best["theirs"] else None
    return {"sizes": rows, **best, "times": times, "limit": limit, "of_limit": (best["ours"] or 0) / limit}


def vision_flops(config: VisionConfig) -> float:
    """Multiplications and additions of the image encoder for one image."""
    width, tokens = config.width, config.tokens
    layer = 2 * tokens * (4 * width**2 + 2 * width * config.mlp_width) + 4 * tokens**2 * width
    return config.layers * layer + 2 * (tokens - 1) * 3 * config.patch_size**2 * width


def step(run: Run) -> dict[str, Any]:
    """One step of the language model, by the difference of two lengths, beside the time to read its weights."""
    return step_of(run, run.ours())


def step_of(run: Run, ours: Ours) -> dict[str, Any]:
    """See `step`; weights count as they are held."""
    pictures = squares(run, ours, 1)
    short, long = (
        seconds(lambda tokens=tokens: ours.write(pictures, (), 1, tokens), run.device, repeat=5)
        for tokens in (NEW_TOKENS, 3 * NEW_TOKENS)
    )
    language: Any = ours.model.language
    embedded, head = language.words.weight, language.head
    words = embedded if head is None else head.weight
    size = sum(each.nbytes for each in language.state_dict().values()) - embedded.nbytes  # of which a few rows are read
    if head is not None:
        size -= words.nbytes
    size += words.nbytes if language.make_head is None else coarse_size(words.shape, "int8")
    floor = size / run.found["machine"]["bytes_a_second"]
    took = (long - short) / (2 * NEW_TOKENS)
    return {"ours": took, "limit": floor, "over_limit": took / floor, "gigabytes": size / 1e9}


def coarse(run: Run) -> dict[str, Any]:
    """One caption and one step with coarse weights, beside those with plain ones, and how many tokens are the same."""
    run.forget()
    rows: dict[str, Any] = {}
    plain: list[int] = []
    for scheme in (None, *COARSE):
        name = scheme or "plain"
        if time.perf_counter() > run.ends:
            rows[name] = "no time"
            continue
        ours = Ours(run.config(PUBLISHED[0]), run.device, run.dtype, scheme)
        pictures = squares(run, ours, 1)
        written = ours.write(pictures, (), 1, NEW_TOKENS)[0]
        plain = plain or written
        same = sum(one == other for one, other in zip(written, plain, strict=True)) / len(plain)
        taken = seconds(lambda ours=ours, of=pictures: ours.write(of, (), 1, NEW_TOKENS), run.device)
        rows[name] = {"caption": taken, "step": step_of(run, ours), "tokens_equal": same}
        del ours
        run.forget()
    return {"schemes": rows, "kernels": chosen_on_cuda() if run.device.type == "cuda" else chosen()}


def answer(run: Run) -> dict[str, Any]:
    """Flan-T5-xl: one answer, five beams."""
    run.forget()
    row = compared(run, 1, BEAMS, ANSWER_TOKENS, ("w11 w5 w6",), "pretrain_flant5xl")
    run.forget()
    return row


def folder(run: Run) -> dict[str, Any]:
    """JPEGs from the disk to captions on the disk, at the batch size that is found."""
    model, count = run.ours().model, 8 if run.tiny else FOLDER
    with tempfile.TemporaryDirectory() as place:
        for number in range(count):
            picture = geometry.picture().resize((500, 375)).rotate(number, Image.Resampling.BILINEAR)
            picture.save(Path(place) / f"{number:04}.jpg", quality=90)
        start = time.perf_counter()
        tokens = {"num_beams": 1, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
        report = caption_files(model, [place], Path(place) / "captions.jsonl", **tokens)
        took = time.perf_counter() - start
    return {"images": report.done, "seconds": took, "ours": report.done / took}


def compiled(run: Run) -> dict[str, Any]:
    """Captions a second where image encoder and Q-Former are compiled; the sizes are fewer, as each compiles."""
    from blip2.compiling import compile_sight

    ours = run.ours()
    count = TINY_SIZES[-1] if run.tiny else 64
    pictures = squares(run, ours, count)
    before = seconds(lambda: ours.model.encode(pictures), run.device)
    compile_sight(ours.model, "eager" if run.tiny else "inductor")
    start = time.perf_counter()
    ours.model.encode(pictures)
    wait(run.device)
    first = time.perf_counter() - start
    after = seconds(lambda: ours.model.encode(pictures), run.device)
    run.forget()
    return {"images": count, "encode": before, "encode_compiled": after, "first_call": first, "times": before / after}


def memory(run: Run) -> dict[str, Any]:
    """Peak memory of the published models: loaded and one caption with five beams, in GB."""
    run.forget()
    rows: dict[str, Any] = {}
    for preset in PUBLISHED[:1] if run.tiny else PUBLISHED:
        rows[preset] = {}
        for scheme in (None, *COARSE):
            name = scheme or "bfloat16"
            if time.perf_counter() > run.ends:
                rows[preset][name] = "no time"
                continue
            if run.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(run.device)
            model = Ours(run.config(preset), run.device, run.dtype, scheme).model
            model.caption(geometry.picture(), num_beams=BEAMS, max_new_tokens=NEW_TOKENS)
            peak = torch.cuda.max_memory_allocated(run.device) if run.device.type == "cuda" else None
            parts: list[Any] = [model.encoder, model.bridge, model.language]
            weights = sum(each.nbytes for part in parts for each in part.state_dict().values())  # copies of packed ones
            rows[preset][name] = {"weights": weights / 1e9, "peak": peak and peak / 1e9}
            del model, parts
            run.forget()
    return {"models": rows, "card_of_opt2.7b": SEEDS}


ROWS: dict[str, Callable[[Run], dict[str, Any]]] = {
    "check": check, "caption": caption, "beams": beams, "questions": questions, "step": step, "batches": batches,
    "folder": folder, "compiled": compiled, "answer": answer, "coarse": coarse, "memory": memory,
}  # fmt: skip


def machine(run: Run) -> dict[str, Any]:
    """What it is, and how fast it multiplies and copies."""
    side = 256 if run.tiny else PROBE
    left = torch.randn(side, side, device=run.device, dtype=run.dtype)
    multiplied = seconds(lambda: left @ left, run.device, repeat=10)
    source, target = (torch.empty(side * side * 16, device=run.device, dtype=torch.bfloat16) for _ in range(2))
    copied = seconds(lambda: target.copy_(source), run.device, repeat=10)
    cuda = run.device.type == "cuda"
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(run.device) if cuda else platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "blip2": blip2.__version__,
        "transformers": sys.modules["transformers"].__version__ if "transformers" in sys.modules else None,
        "dtype": str(run.dtype).removeprefix("torch."),
        "flops": 2 * side**3 / multiplied,
        "bytes_a_second": 2 * source.nbytes / copied,  # read and written
    }
    return found


def show(name: str, row: dict[str, Any]) -> None:
    """One line, or a few, for people."""
    if "error" in row:
        print(f"{name:10} {row['error']}", flush=True)
        return
    plain_values = {key: value for key, value in row.items() if not isinstance(value, dict)}
    cells = [
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in plain_values.items()
    ]
    print(f"{name:10} {'  '.join(cells)}", flush=True)
    for key, table in row.items():
        if isinstance(table, dict):
            for inner, value in table.items():
                print(f"{'':10}   {key} {inner}: {value}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--budget", type=float, default=540, help="seconds; no row is begun after them")
    parser.add_argument("--rows", default=",".join(ROWS), help="some of the rows, by their names")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="on the CPU, at a size for tests")
    given = parser.parse_args()
    device = torch.device("cpu" if given.tiny else given.device)
    dtype = torch.float32 if given.tiny else torch.bfloat16
    run = Run(device, dtype, given.tiny, given.out, time.perf_counter() + given.budget)
    try:
        import transformers  # noqa: F401  (its version is reported)
    except ImportError:
        print("transformers is not installed: its columns are empty", flush=True)
    run.found["machine"] = machine(run)
    show("machine", run.found["machine"])
    failed = False
    for name in given.rows.split(","):
        begun = time.perf_counter()
        if begun > run.ends:
            run.found[name] = {"error": "no time left in the budget"}
        else:
            try:
                run.found[name] = ROWS[name](run)
            except Exception as error:  # the other rows are still worth their time
                run.found[name] = {"error": f"{type(error).__name__}: {error}"}
                failed = True
            run.found[name]["took"] = time.perf_counter() - begun
        show(name, run.found[name])
        run.keep()
    sys.exit(failed)


if __name__ == "__main__":
    main()
