"""Every number of `mini`'s model card, by one command.

python examples/mini/evaluate.py --model DIRECTORY --shards FLICKR8K --made PREPARED --out results

Sections: retrieval (Flickr8k test, by ITC and with the best re-ranked by ITM), captions (Flickr8k test, beams), unseen
(stamps of held-out concepts: text among captions and picture among pictures), named (held-out stamp photographs of
trained names), classes (both kinds of stamps by their names, bare and in templates, without a caption), questions (made
from test captions, each kind). `--only` picks some, `--limit` gives a quick look.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from measuring import Data, Numbers, answer_numbers, markdown, recall_numbers, write
from naming import Naming
from wordnet import DATABASE, WordNet

import blip2
from blip2.blip2 import Blip2
from blip2.decoding import BEAMS
from blip2.errors import Blip2Error
from blip2.evaluate import evaluate_answers, evaluate_captions, evaluate_retrieval, of_samples, write_captions
from blip2.evaluate.classification import DEPTHS, accuracy, places
from blip2.evaluate.estimate import mean
from blip2.evaluate.run import encode
from blip2.zero_shot import BARE, TEMPLATES, Classifier

TOP = 32  # of each query's best are re-ranked by matching
WEIGHT = 0.05  # of a match's logit beside the cosine: the best of 0.02 to 1 for text to image on validation pictures

Texts = list[dict[str, Any]]


def retrieval(model: Blip2, data: Data) -> tuple[Numbers, Texts]:
    """Flickr8k's test set, and the same with the best re-ranked."""
    found = evaluate_retrieval(model, data.flickr8k("test"), top=TOP, weight=WEIGHT, progress=show)
    return {
        "Flickr8k test, ITC": recall_numbers(found["itc"]),
        f"Flickr8k test, top {TOP} re-ranked by ITM": recall_numbers(found["itm"]),
    }, []


def captions(model: Blip2, data: Data) -> tuple[Numbers, Texts]:
    """Flickr8k's test set."""
    samples = data.flickr8k("test")
    found, written = evaluate_captions(model, samples, progress=show)
    texts = [{"id": sample.id, "caption": caption.text} for sample, caption in zip(samples, written, strict=True)]
    return {f"Flickr8k test, captions with {BEAMS} beams": {**found}}, texts


def unseen(model: Blip2, data: Data) -> tuple[Numbers, Texts]:
    """Stamps of concepts that training never met, among each other."""
    found = evaluate_retrieval(model, data.stamps("unseen"), progress=show)
    return {"unseen stamps, ITC": recall_numbers(found["itc"])}, []


def named(model: Blip2, data: Data, naming: Naming) -> tuple[Numbers, Texts]:
    """Held-out photographs of things whose names are trained: is the caption's head noun the thing?"""
    samples, things = data.stamps("named"), data.things("named")
    texts: Texts = []
    for sample, written in zip(samples, write_captions(model, samples, progress=show), strict=True):
        thing, caption = things[sample.id], written.text
        texts.append({"id": sample.id, "thing": thing, "given": caption, "right": naming.same_thing(caption, thing)})
    return {"held-out stamps, captions": {"named": mean([text["right"] for text in texts])}}, texts


def classes(model: Blip2, data: Data) -> tuple[Numbers, Texts]:
    """Both sets of held-out stamps, each among its own names: bare, in templates, what these gain, and by matching."""
    numbers: Numbers = {}
    for name, title in (("unseen", "unseen stamps"), ("named", "held-out stamps")):
        samples, things = data.stamps(name), data.things(name)
        truth = [things[sample.id] for sample in samples]
        labels = sorted(set(truth))
        features = encode(model, samples, progress=show)
        ways = {
            "bare, ITC": Classifier.of(model, labels, BARE),
            "templates, ITC": Classifier.of(model, labels, TEMPLATES),
            "bare, ITM": Classifier.of(model, labels, BARE, by="itm"),
        }
        found = {way: places(each.scores(features).cpu().numpy(), labels, truth) for way, each in ways.items()}
        rows = {f"{way}, {depth}": value for way, place in found.items() for depth, value in accuracy(place).items()}
        for depth in DEPTHS:
            bare, framed = ((found[way] < depth).astype(float) for way in ("bare, ITC", "templates, ITC"))
            rows[f"templates beyond bare, ITC, top-{depth}"] = mean(framed - bare)
        numbers[f"{title}, {len(labels)} names"] = {**rows}
    return numbers, []


def questions(model: Blip2, data: Data) -> tuple[Numbers, Texts]:
    """Questions made from Flickr8k's test captions, beside the best single answer to each kind."""
    asked = of_samples(data.questions("test"), data.kind)
    found, given = evaluate_answers(model, asked, progress=show)
    texts = [
        {"id": question.picture, "question": question.text, "answer": question.answers[0], "given": answer.text}
        for question, answer in zip(asked, given, strict=True)
    ]
    return {"questions": answer_numbers(found)}, texts


SECTIONS = ("retrieval", "captions", "unseen", "named", "classes", "questions")


def show(what: str, done: int, total: int) -> None:
    """Progress on one line of stderr."""
    print(f"\r{what}: {done} of {total}", end="\n" if done == total else "", file=sys.stderr, flush=True)


def measure(model: Blip2, data: Data, sections: Sequence[str], wordnet: Path) -> tuple[Numbers, dict[str, Texts]]:
    """The chosen sections, and what the model wrote in each."""
    run: dict[str, Callable[[], tuple[Numbers, Texts]]] = {
        "retrieval": lambda: retrieval(model, data),
        "captions": lambda: captions(model, data),
        "unseen": lambda: unseen(model, data),
        "named": lambda: named(model, data, Naming(WordNet(wordnet))),
        "classes": lambda: classes(model, data),
        "questions": lambda: questions(model, data),
    }
    numbers: Numbers = {}
    texts: dict[str, Texts] = {}
    for section in sections:
        found, written = run[section]()
        numbers |= found
        if written:
            texts[section] = written
    return numbers, texts


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini", help="directory of a model; the one of the package without")
    parser.add_argument("--shards", type=Path, required=True, help="folder of the prepared Flickr8k shards")
    parser.add_argument("--made", type=Path, required=True, help="folder that prepare.py wrote questions and stamps to")
    parser.add_argument("--out", type=Path, required=True, help="where to write: OUT.json and OUT.md")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, help="some of the sections")
    parser.add_argument("--limit", type=int, help="at most so many pictures of each set, for a quick look")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--wordnet", type=Path, default=DATABASE, help=f"folder of WordNet's files ({DATABASE})")
    parsed = parser.parse_args(arguments)
    started = time.monotonic()
    try:
        data = Data(parsed.shards, parsed.made, parsed.limit)
        numbers, texts = measure(blip2.load(parsed.model, device=parsed.device), data, parsed.only, parsed.wordnet)
    except (Blip2Error, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from None
    write(parsed.out, numbers, sys.argv, time.monotonic() - started, model=parsed.model, texts=texts)
    print(markdown(numbers))


if __name__ == "__main__":
    main()
