"""Our side of the rows of `benchmarks.performance`: a process that loads one model in one precision and works."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import blip2
from benchmarks import geometry, measure
from benchmarks.measure import Job, Watch, emit
from blip2 import bulk
from blip2.bench.clock import phases
from blip2.blip2 import Blip2
from blip2.model import prefix

OPERATORS = 15  # that a profile names
Call = Callable[[], Any]


def work(model: Blip2, job: Job) -> dict[str, Call]:
    """What each row calls; it gives what is compared."""
    picture = geometry.picture()
    exactly = {"min_new_tokens": measure.TOKENS, "max_new_tokens": measure.TOKENS}
    short = {"min_new_tokens": measure.ANSWER_TOKENS, "max_new_tokens": measure.ANSWER_TOKENS}

    def caption(beams: int) -> list[list[int]]:
        return [list(model.caption(picture, measure.PROMPT, num_beams=beams, details=True, **exactly).ids)]

    def answers(questions: list[str], beams: int) -> list[list[int]]:
        found = model.ask(picture, questions, num_beams=beams, details=True, **short)
        return [list(each.ids) for each in found]

    def files() -> list[str]:
        return caption_files(model, [Path(name) for name in job.photos])

    return {
        "caption": lambda: caption(1),
        "beams": lambda: caption(measure.BEAMS),
        "questions": lambda: answers(measure.questions(), 1),
        "t5": lambda: answers(measure.questions()[:1], measure.BEAMS),
        "match": lambda: model.match(measure.pictures(), measure.texts()).itm.tolist(),
        "mini": files,
    }


def caption_files(model: Blip2, photos: list[Path]) -> list[str]:
    """What `blip2 caption FOLDER --out FILE` does once its model is loaded."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "captions.jsonl")
        bulk.caption_files(model, photos, out)
        rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    texts = {Path(folder, row["image"]).resolve(): row["caption"] for row in rows}
    return [texts[path.resolve()] for path in photos]


@torch.inference_mode()
def first_logits(model: Blip2) -> torch.Tensor:
    """After each question about the picture: float32[10, V], what a precision is judged by."""
    language, tokenizer = model.writer()
    visual = model.bridge.project(model.encode(geometry.picture()).queries)
    prompts = tokenizer.prompts([model.config.prompts.question.format(each) for each in measure.questions()])
    start = prefix.build(
        language, visual.expand(len(prompts), -1, -1), prompts, tokenizer.bos, model.config.prompts.visual
    )
    return language.prefill(*start)[0].float()


def main() -> None:
    job, watch = measure.job(), Watch()
    name = None if job.model == measure.MINI else job.directory
    model = blip2.load(name, device="cpu", **measure.OURS[job.precision])
    calls = work(model, job)
    if job.rows[0].startswith("profile "):
        show_profile(model, calls[job.rows[0].removeprefix("profile ")])
        return
    if "memory" in job.rows:
        calls["caption"]()
        emit("memory", **vars(watch.stop()))
    for row in job.rows:
        if row == "mini":
            caption_files(model, [Path(each) for each in job.photos[:2]])  # to warm up
            texts: list[list[str]] = []
            seconds = measure.timed_once(lambda texts=texts: texts.append(calls["mini"]()))
            emit(row, seconds=seconds, texts=texts[0], parts=len(job.photos), whole=len(job.photos))
        elif row in calls:
            found = calls[row]()  # to warm up, and to compare
            kind = "scores" if row == "match" else "tokens"
            emit(row, seconds=job.timed(calls[row]), **{kind: found}, parts=1, whole=1)
    if model.language is not None and job.model != measure.MINI:
        place = Path(job.folder, f"logits {job.key}.pt")
        torch.save(first_logits(model), place)
        emit("logits", file=place.name)


def show_profile(model: Blip2, call: Call) -> None:
    """Print where the time of a call goes: phases, then operators."""
    call()
    with phases(model) as clock:
        call()
    whole = sum(clock.seconds.values())
    for phase, seconds in clock.seconds.items():
        print(f"{phase:24} {seconds:8.3f} s {100 * seconds / whole:5.1f} %  {clock.calls.get(phase, '')} calls")
    with profile(activities=[ProfilerActivity.CPU]) as found:
        call()
    print(found.key_averages().table(sort_by="self_cpu_time_total", row_limit=OPERATORS, max_name_column_width=44))


if __name__ == "__main__":
    main()
