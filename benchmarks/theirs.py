"""transformers' side of the rows of `benchmarks.performance`: one model in one precision, in a process of its own.

What its users write: a picture through its image processor, `generate`, one call for each question; for matching, pairs
of a picture and a text. Long rows are done in part.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers

from benchmarks import geometry, measure
from benchmarks.measure import Job, Watch, emit
from blip2.weights.transformers import read_config, read_tokenizer

TIMED_QUESTIONS = 2  # of ten
TIMED_PAIRS = 8  # of 256: one text for each picture
SLOT = 0  # the id that stands for the picture: no prompt has it


class Writes:
    """A model that writes, driven as its documentation shows."""

    def __init__(self, job: Job) -> None:
        config = read_config(job.directory)
        self.template = config.prompts.question
        self.tokenizer = read_tokenizer(job.directory)
        self.apart = config.language is not None and config.language.kind == "t5"
        self.dtype = getattr(torch, job.precision)
        kind: Any = transformers.Blip2ForConditionalGeneration
        self.model = kind.from_pretrained(job.directory, dtype=self.dtype).eval()
        self.model.config.image_token_index = SLOT
        side = self.model.config.vision_config.image_size
        self.processor: Any = transformers.BlipImageProcessor(size={"height": side, "width": side})

    @torch.inference_mode()
    def __call__(self, prompt: str, beams: int, tokens: int) -> list[int]:
        """The tokens after a prompt."""
        pixels = self.processor(geometry.picture(), return_tensors="pt").pixel_values.to(self.dtype)
        begin = [] if self.tokenizer.bos is None else [self.tokenizer.bos]
        (words,) = self.tokenizer.prompts([prompt])
        ids = torch.tensor([[SLOT] * self.model.config.num_query_tokens + begin + words])
        found = self.model.generate(
            pixel_values=pixels, input_ids=ids, attention_mask=torch.ones_like(ids), num_beams=beams,
            min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False, length_penalty=1.0,
        )  # fmt: skip
        written: list[int] = found[0, 1 if self.apart else ids.shape[1] :].tolist()
        return written

    def answers(self, count: int, beams: int) -> list[list[int]]:
        """One call a question."""
        asked = measure.questions()[:count]
        return [self(self.template.format(each), beams, measure.ANSWER_TOKENS) for each in asked]


def write(job: Job) -> None:
    """The rows of a model that writes."""
    watch = Watch()
    model = Writes(job)
    if "memory" in job.rows:
        model(measure.PROMPT, 1, measure.TOKENS)
        emit("memory", **vars(watch.stop()))
    else:
        model(measure.PROMPT, 1, 2)  # to warm up
    calls = {
        "caption": (lambda: [model(measure.PROMPT, 1, measure.TOKENS)], 1, 1),
        "beams": (lambda: [model(measure.PROMPT, measure.BEAMS, measure.TOKENS)], 1, 1),
        "questions": (lambda: model.answers(TIMED_QUESTIONS, 1), TIMED_QUESTIONS, measure.QUESTIONS),
        "t5": (lambda: model.answers(1, measure.BEAMS), 1, 1),
    }
    for row in job.rows:
        if row in calls:
            call, parts, whole = calls[row]
            found: list[Any] = []
            seconds = job.timed(lambda call=call, found=found: found.append(call()))
            emit(row, seconds=seconds, tokens=found[0], parts=parts, whole=whole)


@torch.inference_mode()
def match(job: Job) -> None:
    """Pairs of a picture and a text: the model takes nothing else."""
    kind: Any = transformers.Blip2ForImageTextRetrieval
    model = kind.from_pretrained(job.directory, dtype=getattr(torch, job.precision)).eval()
    tokenizer = read_tokenizer(job.directory)
    side = model.config.vision_config.image_size
    processor: Any = transformers.BlipImageProcessor(size={"height": side, "width": side})
    pictures = measure.pictures(TIMED_PAIRS)

    def call() -> list[float]:
        pixels = processor(pictures, return_tensors="pt").pixel_values.to(model.dtype)
        ids = tokenizer.batch(measure.texts()[:TIMED_PAIRS])
        scores = model(
            pixel_values=pixels, input_ids=ids, attention_mask=ids.ne(tokenizer.pad).long(),
            use_image_text_matching_head=True,
        ).logits_per_image  # fmt: skip
        probabilities: list[float] = scores.float().softmax(-1)[:, 1].tolist()
        return probabilities

    found: list[list[float]] = []
    seconds = job.timed(lambda: found.append(call()))
    emit("match", seconds=seconds, scores=found[0], parts=TIMED_PAIRS, whole=measure.IMAGES * measure.TEXTS)


def main() -> None:
    job = measure.job()
    if "match" in job.rows:
        match(job)
    else:
        write(job)


if __name__ == "__main__":
    main()
