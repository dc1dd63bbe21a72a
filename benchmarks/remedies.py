"""What helps against poor captions, made-up objects and wrong answers, measured: the tables of docs/troubleshooting.md.

    python -m benchmarks.remedies PICTURES [--questions FILE] [--only captions ...] [--limit N] [--model M] [--json F]

PICTURES is a data set with captions (never the one that a model is judged by), FILE the questions about it. Captions
are scored by CIDEr, and by how many of them name an object that no reference names; `blip2[evaluate]` is needed.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from blip2 import evaluate
from blip2.blip2 import Blip2
from blip2.data import sources
from blip2.data.sources import Sample
from blip2.evaluate import answering, run
from blip2.loading import load
from blip2.results import Generation, ImageFeatures

CAPTIONS: dict[str, dict[str, Any]] = {
    "five beams (the default)": {},
    "greedy": {"num_beams": 1},
    "five beams, `length_penalty=0`": {"length_penalty": 0.0},
    "five beams, `length_penalty=2`": {"length_penalty": 2.0},
    "five beams, `no_repeat_ngram=3`": {"no_repeat_ngram": 3},
    'five beams, `prompt="a photo of"`': {"prompt": "a photo of"},
    "drawn, `top_p=0.9`": {"top_p": 0.9, "seed": 0},
}
SEVERAL: dict[str, dict[str, Any]] = {
    "five of five beams": {"num_beams": 5, "num_captions": 5},
    "five drawn, `top_p=0.9`": {"top_p": 0.9, "seed": 0, "num_captions": 5},
}
OBJECTS = """
person man woman boy girl child kid baby people men women children lady guy toddler player crowd
dog puppy / cat kitten / horse / bird / cow / sheep / ball football basketball / frisbee / toy / stick / rope / camera
bike bicycle bicyclist cyclist / motorcycle motorbike / car truck vehicle bus / boat canoe kayak raft ship
surfboard surfer surf surfing / skateboard skateboarder skateboarding / snowboard snowboarder snowboarding
ski skier skiing / snow / beach sand shore / water ocean sea lake river pool wave / grass field lawn
street road sidewalk / mountain hill cliff rock / tree wood forest / building house / stage / bench / swing / slide
helmet hat cap / goggles glasses sunglasses / shirt / jacket coat / swimsuit bathing / guitar / umbrella / flag
food pizza cake
"""
COLOURS = ["red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "gray"]
NUMBERS = ["one", "two", "three", "four", "five", "six"]
NOTHING = "."  # in the place of an empty caption, which cannot be matched
ASKED_AGAIN = ("in this photo, {}", "look at the picture: {}")
KINDS: dict[str, list[str]] = {"yes/no": ["yes", "no"], "color": COLOURS, "how many": NUMBERS}


def captions(model: Blip2, features: ImageFeatures, samples: Sequence[Sample]) -> Iterator[dict[str, Any]]:
    """Ways to write one caption."""
    for name, options in CAPTIONS.items():
        yield judged(name, model.caption(features, **options), samples)


def objects(model: Blip2, features: ImageFeatures, samples: Sequence[Sample]) -> Iterator[dict[str, Any]]:
    """Writing several captions and keeping one; and keeping captions that the model itself finds fitting."""
    for name, options in SEVERAL.items():
        found: list[list[Generation]] = model.caption(features, **options, details=True)
        written = [[text.text for text in row] for row in found]
        sure = np.array([row[0].confidence for row in found])
        itc, itm = fits(model, features, written)
        yield judged(f"{name}: the first", [row[0] for row in written], samples)
        ways = {"cosine": itc, "matching logit": itm, "cosine + 0.05 matching logit": itc + 0.05 * itm}
        for way, score in ways.items():
            best = [row[place] for row, place in zip(written, score.argmax(1).tolist(), strict=True)]
            yield judged(f"{name}: the highest {way}", best, samples)
        first = [row[0] for row in written]
        for way, score in (("confidence", sure), ("cosine", itc[:, 0]), ("matching logit", itm[:, 0])):
            order = np.argsort(-score).tolist()
            halves = {"upper": order[: len(order) // 2], "lower": order[len(order) // 2 :]}
            for half, kept in halves.items():
                yield judged(f"{name}: the first, where its {way} is in the {half} half", *_pick(first, samples, kept))


def fits(model: Blip2, features: ImageFeatures, written: list[list[str]]) -> tuple[Any, Any]:
    """Cosine and matching logit of each picture's captions: float[N, K] each."""
    flat = [text or NOTHING for row in written for text in row]
    images = np.repeat(np.arange(len(written)), [len(row) for row in written])
    words = model.embed_texts(flat)
    itc = torch.einsum("nqe,ne->nq", features.vectors[images], words).amax(1).numpy()
    itm = run.match_pairs(model, features, flat, images, np.arange(len(flat)))
    return itc.reshape(len(written), -1), itm.reshape(len(written), -1)


def judged(name: str, written: Sequence[str], samples: Sequence[Sample]) -> dict[str, Any]:
    """CIDEr with its interval, and the share of captions that name an object which no reference names."""
    found = evaluate.captions(list(written), [sample.captions for sample in samples])["CIDEr"]
    made_up = [
        bool(named(text) - named(" ".join(sample.captions))) for text, sample in zip(written, samples, strict=True)
    ]
    cider = [found.value, found.low, found.high]
    return {"way": name, "CIDEr": cider, "made up": float(np.mean(made_up)), "pictures": len(samples)}


def named(text: str) -> set[int]:
    """The objects that a text names, words for one object as one."""
    words = set(re.findall(r"[a-z]+", text.lower()))
    words |= {word.removesuffix("s") for word in words} | {word.removesuffix("es") for word in words}
    groups = [set(group.split()) for group in OBJECTS.strip().replace("\n", " / ").split("/")]
    return {number for number, group in enumerate(groups) if group & words}


def answers(model: Blip2, samples: Sequence[Sample], limit: int) -> Iterator[dict[str, Any]]:
    """Ways to ask, by kind of question."""
    for kind, choices in KINDS.items():
        asked = [(sample, *pair) for sample in samples for pair in sample.questions if _kind(*pair) == kind]
        asked = evenly(asked, limit)
        features = model.encode([sample.image.read() for sample, _, _ in asked])  # pyright: ignore
        questions, truth = [question for _, question, _ in asked], [answer for _, _, answer in asked]
        ways: dict[str, Callable[[], list[str]]] = {
            "written": lambda f=features, q=questions: model.ask(f, q),
            "written, greedy": lambda f=features, q=questions: model.ask(f, q, num_beams=1),
            "written after the bare question": lambda f=features, q=questions: [
                model.caption(f[row], prompt=text, max_new_tokens=5)[0] for row, text in enumerate(q)
            ],
            "`choices=`": lambda f=features, q=questions, c=choices: model.ask(f, q, choices=c),
            "`choices=`, three phrasings": lambda f=features, q=questions, c=choices: thrice(model, f, q, c),
        }
        common = max(set(truth), key=truth.count)
        yield {"kind": kind, "way": f"always {common!r}", **accuracy([common] * len(truth), truth)}
        for name, way in ways.items():
            yield {"kind": kind, "way": name, **accuracy(way(), truth)}


def evenly(rows: Sequence[Any], limit: int) -> list[Any]:
    """At most so many of them, evenly taken."""
    count = min(limit, len(rows))
    return [rows[place * len(rows) // count] for place in range(count)]


def thrice(model: Blip2, features: ImageFeatures, questions: list[str], choices: list[str]) -> list[str]:
    """The choice that is likeliest over three phrasings of each question."""
    total = np.zeros((len(questions), len(choices)))
    for phrasing in ("{}", *ASKED_AGAIN):
        found = model.ask(features, [phrasing.format(text) for text in questions], choices=choices, details=True)
        total += np.array([ranking.log_probs for ranking in found])
    return [choices[place] for place in total.argmax(1).tolist()]


def accuracy(given: Sequence[str], truth: Sequence[str]) -> dict[str, Any]:
    """Share of right answers, compared as VQAv2 does."""
    right = [answering.score(one, [answer]) for one, answer in zip(given, truth, strict=True)]
    return {"accuracy": float(np.mean(right)), "questions": len(right)}


def _kind(question: str, answer: str) -> str:
    if question.startswith("how many"):
        return "how many"
    return "color" if question.startswith("what color") else "yes/no" if answer in ("yes", "no") else "other"


def _pick(written: Sequence[str], samples: Sequence[Sample], rows: Sequence[int]) -> tuple[list[str], list[Sample]]:
    return [written[row] for row in rows], [samples[row] for row in rows]


def line(row: dict[str, Any]) -> str:
    """A row of a table in Markdown."""
    cells = [row[key] for key in ("kind", "way") if key in row]
    if "CIDEr" in row:
        value, low, high = row["CIDEr"]
        cells += [f"{value:.3f} ({low:.3f} to {high:.3f})", f"{100 * row['made up']:.0f}% of {row['pictures']}"]
    else:
        cells.append(f"{row['accuracy']:.2f} of {row['questions']}")
    return f"| {' | '.join(cells)} |"


def shown(rows: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, each printed when it is there."""
    found: list[dict[str, Any]] = []
    for row in rows:
        print(line(row), flush=True)
        found.append(row)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures")
    parser.add_argument("--questions", type=Path)
    parser.add_argument("--only", nargs="+", choices=("captions", "objects", "answers"))
    parser.add_argument("--limit", type=int, default=100, help="pictures, and questions of each kind")
    parser.add_argument("--model")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    only = given.only or ["captions", "objects", *(["answers"] if given.questions else [])]
    samples = sources.read(given.pictures, questions=given.questions)
    some = evenly(samples, given.limit)
    model = load(given.model)
    found: dict[str, list[dict[str, Any]]] = {}
    if set(only) & {"captions", "objects"}:
        features = run.encode(model, some)
        for name, measure in (("captions", captions), ("objects", objects)):
            if name in only:
                found[name] = shown(measure(model, features, some))
    if "answers" in only:
        found["answers"] = shown(answers(model, samples, given.limit))
    if given.json:
        given.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
