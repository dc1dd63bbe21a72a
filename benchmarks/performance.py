"""How fast, against transformers in one run: a process a side in turn, one file of weights, the same tokens.

    python -m benchmarks.performance FOLDER --photos DIR [--rows caption,beams,...] [--precisions float32,int8]

writes made-up weights at the published geometries into FOLDER where they are not there yet (OPT-2.7b 7.5 GB,
Flan-T5-xl 8 GB, the retrieval model 2 GB), then measures row by row and keeps what it found in FOLDER/results.json: a
row that is there is not measured again without `--again`, so a run may be stopped, or done in parts. A side that fails
is an error in the table. 19 GB of memory, and some forty minutes on two cores for all rows; `--quick` runs everything
once, `--layers` makes the towers flat (in a folder of its own). The exit code is 1 where float32 results differ from
transformers'.

Each call runs once to warm up, then up to three times while thirty seconds last; medians. Long rows of transformers are
timed in part and scaled, and the table says so. Loading is in no row but `start` and `memory`.

`--profile ROW [--precision int8]` shows where our time goes instead. `python -m benchmarks.tables` writes the results
into docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
from dataclasses import asdict, replace
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import geometry, measure, tables
from benchmarks.exactness import TINY
from benchmarks.measure import CPU, MINI, Job
from blip2 import image
from blip2.bench import machine, work
from blip2.config import Blip2Config
from blip2.files import replacing
from blip2.weights.assemble import named_config
from blip2.weights.inventory import Part, parts_of
from blip2.weights.transformers import read_config

ROWS = ("caption", "beams", "questions", "memory", "match", "t5", "mini", "start", "training")
MODEL = {**{row: model for row, (_, model, _) in tables.WORKS.items()}, "memory": "opt2.7b"}
SIDES = [("theirs", "float32"), ("ours", "float32"), ("theirs", "bfloat16"), ("ours", "bfloat16"), ("ours", "int8"),
         ("ours", "int4")]  # fmt: skip
LEFT_OUT = {("match", "int4"), ("t5", "int4"), ("mini", "int8"), ("mini", "int4")}
STARTS = 5  # of the process
START = "from blip2.cli import main; main()"
LOAD = "import time, torch, blip2; t = time.perf_counter(); blip2.load(device='cpu'); print(time.perf_counter() - t)"
PHOTO = Path(__file__).parents[1] / "docs" / "palace.jpg"
QUICK = {"repeats": 1, "budget": 0.0}
QUICK_PHOTOS = 8


def jobs(rows: list[str], precisions: list[str], folder: Path, photos: list[Path], threads: int) -> list[Job]:
    """What is to be run, the sides of a model in turn."""
    wanted = [(MODEL[row], row) for row in rows if row in MODEL]
    made: list[Job] = []
    for model, group in groupby(sorted(wanted), key=lambda each: each[0]):
        asked = [row for _, row in group]
        for side, precision in SIDES:
            if precision not in precisions:
                continue
            some = tuple(row for row in asked if (row, precision) not in LEFT_OUT)
            files = tuple(str(path.resolve()) for path in photos) if model == MINI else ()
            if some:
                made.append(Job(model, side, precision, some, str(folder), threads, photos=files))
    return made


def run(job: Job, results: dict[str, Any], place: Path, *, again: bool) -> None:
    """Do what is missing of a job; every result is on the disk when the next begins."""
    kept: dict[str, Any] = results["runs"].setdefault(job.key, {})
    missing = tuple(row for row in job.rows if again or row not in kept or "error" in kept[row])
    if not missing:
        return
    print(f"{job.key}: {', '.join(missing)}", file=sys.stderr, flush=True)
    module = "ours" if job.side == "ours" else "plain_mini" if job.model == MINI else "theirs"
    lost = set(missing)
    for found in measure.results(f"benchmarks.{module}", replace(job, rows=missing)):
        if "error" in found:
            kept |= dict.fromkeys(lost, found)
        else:
            row = found.pop("row")
            kept[row] = found | limit(job, row, results)
            lost.discard(row)
        save(results, place)


def limit(job: Job, row: str, results: dict[str, Any]) -> dict[str, float]:
    """The physical limit of a row of ours, at the rates that were measured on this machine."""
    if job.side == "theirs" or row == "logits":
        return {}
    config = named_config(MINI) if job.model == MINI else read_config(job.directory)
    rates = machine.Rates(**results["rates"])
    if row == "memory":
        name = "16 bit" if job.precision == "bfloat16" else job.precision
        return {"limit": sum(Part.bytes(part, name) or 0 for part in parts_of(config))}
    passes = _passes(config, row, len(job.photos))
    return {} if passes is None else {"limit": passes.seconds(rates, job.precision)}


def _passes(config: Blip2Config, row: str, photos: int) -> work.Passes | None:
    if row == "match":
        words = sum(len(text.split()) + 2 for text in measure.texts()) / measure.TEXTS
        return work.matching(config, images=measure.IMAGES, texts=measure.TEXTS, length=words)
    caption = {"images": 1, "texts": 1, "prompt": 13, "tokens": measure.TOKENS}
    answer = {"images": 1, "prompt": 15, "tokens": measure.ANSWER_TOKENS}
    return {
        "caption": lambda: work.writing(config, beams=1, **caption),
        "beams": lambda: work.writing(config, beams=measure.BEAMS, **caption),
        "questions": lambda: work.writing(config, texts=measure.QUESTIONS, beams=1, **answer),
        "t5": lambda: work.writing(config, texts=1, beams=measure.BEAMS, **answer),
        "mini": lambda: work.writing(
            config, images=photos, texts=photos, prompt=1, tokens=measure.WORDS, beams=measure.BEAMS
        ),
    }[row]()


def divergence(results: dict[str, Any], folder: Path, place: Path) -> None:
    """KL of each precision's first logits from float32's, kept beside the row."""
    for key, kept in results["runs"].items():
        model, side, precision = key.split()
        exact = results["runs"].get(f"{model} ours float32", {}).get("logits")
        if side == "ours" and precision != "float32" and "logits" in kept and exact:
            expected, found = (
                F.log_softmax(torch.load(folder / each["file"], weights_only=True), -1)
                for each in (exact, kept["logits"])
            )
            kept["logits"]["kl"] = float((expected.exp() * (expected - found)).sum(-1).mean())
    save(results, place)


def start(results: dict[str, Any], threads: int, runs: int) -> None:
    """`blip2 caption photo.jpg` as a process, and loading alone."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed package is compiled

    def python(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", *words], capture_output=True, text=True, env=environment, check=False
        )
        if done.returncode:
            raise RuntimeError(measure.last_line(done.stderr))
        return done.stdout

    try:
        python(START, "caption", str(PHOTO))  # the disk is warm from here on
        process = measure.timed(lambda: python(START, "caption", str(PHOTO)), CPU, runs).seconds
        results["start"] = {"process": list(process), "load": [float(python(LOAD)) for _ in range(runs)]}
    except RuntimeError as error:
        results["start"] = {"error": str(error)}


def training(results: dict[str, Any], threads: int) -> None:
    """The benchmark of training, which is a command of its own: its table goes with ours."""
    command = [sys.executable, "-m", "benchmarks.training", "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    rows = [line for line in done.stdout.splitlines() if line.startswith("|")]
    failed = f"failed: {measure.last_line(done.stderr)}"
    results["training"] = {"table": "".join(f"{line}\n" for line in (rows if done.returncode == 0 else [failed]))}


def pictures(source: Path | None, folder: Path, count: int) -> list[Path]:
    """So many picture files: of a folder, or of its first shard (a .tar), laid out beside the models."""
    if source is None:
        return []
    shards = [source] if source.suffix == ".tar" else sorted(source.glob("*.tar"))
    if shards:
        place = folder / "photos"
        place.mkdir(parents=True, exist_ok=True)
        with tarfile.open(shards[0]) as shard:
            named = [member for member in shard if member.isfile() and member.name.endswith((".jpg", ".jpeg"))]
            for number, member in enumerate(named[:count]):
                file = shard.extractfile(member)
                assert file is not None
                (place / f"{number:04}.jpg").write_bytes(file.read())
        source = place
    return image.find_images([source])[:count]


def save(results: dict[str, Any], place: Path) -> None:
    """The results, whole or not at all."""
    runs = ",\n".join(f"  {json.dumps(key)}: {json.dumps(kept)}" for key, kept in results["runs"].items())
    others = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in results.items() if key != "runs"]
    lines = [*others, f' "runs": {{\n{runs}\n }}']  # a line a process: what changed is seen
    with replacing(place) as partial:
        partial.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def opened(place: Path, threads: int) -> dict[str, Any]:
    """What an earlier run kept, with this run's machine and rates where it has none."""
    results: dict[str, Any] = json.loads(place.read_text(encoding="utf-8")) if place.is_file() else {"runs": {}}
    if "rates" not in results:
        torch.set_num_threads(threads)
        own = asdict(machine.describe(CPU))
        own["versions"]["transformers"] = version("transformers")
        command = f"python -m benchmarks.performance FOLDER --photos DIR --threads {threads}"
        results |= {"command": command, "machine": own, "rates": asdict(machine.measure(CPU))}
    return results


def show_profile(row: str, precision: str, folder: Path, photos: list[Path], threads: int) -> None:
    """Where our time in a row goes, on this terminal."""
    files = tuple(str(path.resolve()) for path in photos[:QUICK_PHOTOS])
    job = Job(MODEL[row], "ours", precision, (f"profile {row}",), str(folder), threads, photos=files)
    subprocess.run([sys.executable, "-m", "benchmarks.ours", json.dumps(asdict(job))], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", default=",".join(ROWS), help="some of them, with commas between")
    parser.add_argument("--precisions", default=",".join(measure.OURS), help="some of them, with commas between")
    parser.add_argument("--photos", type=Path, help="for `mini`: a folder of pictures, or of shards (.tar)")
    parser.add_argument("--again", action="store_true", help="measure rows anew that are there")
    parser.add_argument("--quick", action="store_true", help="everything once, few pictures")
    parser.add_argument("--layers", type=int, help="of both towers")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)  # for tests
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of every side")
    parser.add_argument("--profile", choices=list(tables.WORKS), help="where our time goes in a row")
    parser.add_argument("--precision", choices=measure.OURS, default="float32", help="of the profile")
    chosen = parser.parse_args()
    rows = [chosen.profile] if chosen.profile else chosen.rows.split(",")
    if unknown := sorted(set(rows) - set(ROWS)):
        parser.error(f"no row {unknown[0]!r}; there are {', '.join(ROWS)}")
    if "mini" in rows and chosen.photos is None:
        parser.error("the row mini captions pictures: give --photos DIR, or name the other rows with --rows")
    place: Path = chosen.folder / "results.json"
    chosen.folder.mkdir(parents=True, exist_ok=True)
    photos = pictures(chosen.photos, chosen.folder, QUICK_PHOTOS if chosen.quick else measure.PHOTOS)
    for model in {MODEL[row] for row in rows if row in MODEL} - {MINI}:
        made = measure.config(model, layers=chosen.layers, tiny=tiny(model) if chosen.tiny else None)
        geometry.write(made, chosen.folder / model)
    if chosen.profile:
        show_profile(chosen.profile, chosen.precision, chosen.folder, photos, chosen.threads)
        return
    results = opened(place, chosen.threads)
    save(results, place)
    for job in jobs(rows, chosen.precisions.split(","), chosen.folder, photos, chosen.threads):
        run(replace(job, **QUICK) if chosen.quick else job, results, place, again=chosen.again)
    divergence(results, chosen.folder, place)
    if "start" in rows and (chosen.again or "process" not in results.get("start", {})):
        start(results, chosen.threads, 1 if chosen.quick else STARTS)
    if "training" in rows and (chosen.again or "training" not in results):
        training(results, chosen.threads)
    save(results, place)
    print("\n".join(f"{name}\n\n{make(results)}" for name, make in tables.TABLES.items()))
    sys.exit(any(line.wrong for line in tables.lines(results)))


def tiny(model: str) -> Blip2Config:
    """A model's kind at a size for tests."""
    if model == "itm-vit-g":
        qformer = replace(TINY.qformer, text=True, vocab_size=512)
        return TINY.replace(language=None, heads=True, word_head=False, qformer=qformer, embedding_width=16)
    if model == "flan-t5-xl":
        return TINY.replace(language=replace(work.T5Config(), **TINY_T5))
    assert isinstance(TINY.language, work.OPTConfig)
    return TINY.replace(language=replace(TINY.language, vocab_size=512))


TINY_T5: dict[str, Any] = {"width": 32, "layers": 2, "heads": 4, "head_width": 8, "mlp_width": 64, "vocab_size": 512}


if __name__ == "__main__":
    main()
