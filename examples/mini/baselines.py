"""The floors that `mini` has to beat: what its frozen parts do without a trained bridge.

- a straight line (ridge regression) from the encoder's pooled feature to MiniLM's sentence vector, for retrieval;
- the best single sentence for all pictures, for captions;
- the classifier's own top name, for naming;
- the most frequent answer of each kind, for questions.

python examples/mini/baselines.py --shards FLICKR8K --made PREPARED --cache FEATURES --out baselines
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import Data, Numbers, answer_numbers, markdown, recall_numbers, write
from naming import Naming
from numpy.typing import NDArray
from wordnet import DATABASE, WordNet

from blip2 import adapters, evaluate, image
from blip2.adapters.efficientnet import class_names
from blip2.config import PRESETS, PartConfig
from blip2.data.shards import ImageRef
from blip2.data.sources import Prototype, Sample
from blip2.evaluate.estimate import mean
from blip2.evaluate.java import tokenize
from blip2.model.qformer import QFormer
from blip2.weights.bert import start_from_bert

Floats = NDArray[np.float64]

PENALTIES = tuple(10.0**power for power in np.arange(-1.5, 2.6, 0.25))
FOLDS = 5  # over the training concepts, to choose the stamps' penalty and data
SHORTLIST = 60  # sentences whose CIDEr is computed exactly


# The straight line


@dataclass(frozen=True)
class Line:
    """Ridge regression between two centred spaces.

    Attributes:
        weights: float64[Dx, Dy].
        image_mean: float64[Dx] of the training features, each of unit length.
        text_mean: float64[Dy] of the training texts.
    """

    weights: Floats
    image_mean: Floats
    text_mean: Floats

    @classmethod
    def fit(cls, images: Floats, texts: Floats, penalty: float) -> Line:
        """From unit image features float64[N, Dx] and the mean text of each, float64[N, Dy]."""
        image_mean, text_mean = images.mean(0), texts.mean(0)
        x, y = images - image_mean, texts - text_mean
        gram = x.T @ x + penalty * np.eye(x.shape[1])
        return cls(np.linalg.solve(gram, x.T @ y), image_mean, text_mean)

    def cosines(self, images: Floats, texts: Floats) -> Floats:
        """float64[N, M]."""
        return unit((images - self.image_mean) @ self.weights) @ unit(texts - self.text_mean).T


def unit(rows: Floats) -> Floats:
    """Rows of length 1."""
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


@dataclass(frozen=True)
class Pairs:
    """Pictures with their texts, as vectors.

    Attributes:
        images: float64[N, Dx], unit length.
        texts: float64[M, Dy].
        fits: bool[N, M].
    """

    images: Floats
    texts: Floats
    fits: NDArray[np.bool_]

    @property
    def targets(self) -> Floats:
        """float64[N, Dy]: the mean of each picture's texts."""
        return (self.fits / self.fits.sum(1, keepdims=True)) @ self.texts

    def only(self, rows: NDArray[np.bool_]) -> Pairs:
        """Some of the pictures, and their texts."""
        columns = self.fits[rows].any(0)
        return Pairs(self.images[rows], self.texts[columns], self.fits[rows][:, columns])

    def recall(self, line: Line) -> evaluate.Recall:
        """Retrieval by the line."""
        return evaluate.retrieval(line.cosines(self.images, self.texts), self.fits)

    def quality(self, line: Line) -> float:
        """What a penalty is chosen by: the mean of R@1, 5 and 10, both ways."""
        similarity = line.cosines(self.images, self.texts)
        placed = (evaluate.ranks(similarity, self.fits), evaluate.ranks(similarity.T, self.fits.T))
        return float(np.mean([np.mean(rank < depth) for rank in placed for depth in (1, 5, 10)]))


def together(parts: Iterable[Pairs]) -> tuple[Floats, Floats]:
    """Features and targets of several sets, for `Line.fit`."""
    sets = list(parts)
    return np.concatenate([part.images for part in sets]), np.concatenate([part.targets for part in sets])


def best_penalty(train: Pairs, val: Pairs) -> float:
    """The penalty that ranks the validation set best."""
    return max(PENALTIES, key=lambda penalty: val.quality(Line.fit(train.images, train.targets, penalty)))


def cross_validated(
    stamps: Pairs, folds: NDArray[np.int64], plain: NDArray[np.bool_], extra: Sequence[Pairs]
) -> tuple[float, float]:
    """The best penalty for unseen concepts, and its mean quality over folds of the training concepts.

    Args:
        folds: int64[N], one for all pictures of a concept.
        plain: bool[N], the pictures to measure on: one a stamp, on white as the unseen ones are.
        extra: further training pairs, in every fold.
    """
    quality: dict[float, list[float]] = defaultdict(list)
    for fold in range(FOLDS):
        images, targets = together([stamps.only(folds != fold), *extra])
        held = stamps.only((folds == fold) & plain)
        for penalty in PENALTIES:
            quality[penalty].append(held.quality(Line.fit(images, targets, penalty)))
    best = max(PENALTIES, key=lambda penalty: np.mean(quality[penalty]))
    return best, float(np.mean(quality[best]))


# What the frozen parts see and read


class Parts:
    """The frozen parts, and the vectors that they give; those of pictures are kept in a folder."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.encoder: Any = adapters.image_encoder(PartConfig("efficientnet-lite2", 1280))
        self.transform = image.Transform(self.encoder.image_size, self.encoder.mean, self.encoder.std)
        text = adapters.text_part(PartConfig("minilm-l6", 384))
        self.tokenizer = text.tokenizer
        self.reader = QFormer(PRESETS["mini"].qformer).eval()  # its text side, untrained, is MiniLM
        start_from_bert(self.reader, text.weights)

    def pairs(self, samples: Sequence[Sample]) -> Pairs:
        """Pictures and texts as vectors."""
        texts, fits = evaluate.texts_of(samples)
        return Pairs(unit(self.pooled(samples)), self.sentences(texts), fits)

    def pooled(self, samples: Sequence[Sample]) -> Floats:
        """float64[N, 1280]: the pooled feature, the first of the encoder's tokens."""
        return self._kept("pooled", samples, lambda pixels: self.encoder(pixels)[:, 0])

    def top_names(self, samples: Sequence[Sample]) -> list[str]:
        """The classifier's likeliest class of each picture."""
        names = class_names()
        classes = self._kept(
            "classes", samples, lambda pixels: self.encoder.class_probabilities(pixels).topk(1).indices
        )
        return [names[int(index)] for (index,) in classes]

    def class_rows(self, names: Sequence[Sample]) -> Pairs:
        """The rows of the classifier's last layer, each as if it were the feature of a picture of its class."""
        rows = self.encoder.network._fc.weight.detach().double().numpy()
        classes = [sample.image.index for sample in names if isinstance(sample.image, Prototype)]
        texts, fits = evaluate.texts_of(names)
        return Pairs(unit(rows[classes]), self.sentences(texts), fits)

    @torch.inference_mode()
    def sentences(self, texts: Sequence[str]) -> Floats:
        """float64[M, 384], unit length: the mean over a sentence's tokens."""
        parts: list[Floats] = []
        for start in range(0, len(texts), 256):
            ids = self.tokenizer.batch(texts[start : start + 256], PRESETS["mini"].qformer.positions)
            real = self.reader.real(ids)[..., None]
            pooled = (self.reader.read(ids) * real).sum(1) / real.sum(1)
            parts.append(unit(pooled.double().numpy()))
        return np.concatenate(parts)

    @torch.inference_mode()
    def _kept(self, what: str, samples: Sequence[Sample], see: Callable[[torch.Tensor], torch.Tensor]) -> Floats:
        key = hashlib.sha256("\n".join(f"{sample.id} {sample.image}" for sample in samples).encode()).hexdigest()[:16]
        path = self.cache / f"{what}-{key}.npy"
        if path.is_file():
            return np.load(path)
        rows: list[Floats] = []
        for start in range(0, len(samples), 16):
            pictures: list[Any] = []
            for sample in samples[start : start + 16]:
                assert isinstance(sample.image, ImageRef)
                pictures.append(image.open(sample.image.read()))
            rows.append(see(self.transform(pictures)).double().numpy())
            print(f"\r{what}: {min(start + 16, len(samples))} of {len(samples)}", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)
        self.cache.mkdir(parents=True, exist_ok=True)
        np.save(path, np.concatenate(rows))
        return np.concatenate(rows)


# The best single sentence


def best_sentence(candidates: Iterable[str], references: Sequence[Sequence[str]]) -> str:
    """The candidate with the highest CIDEr as the caption of every picture.

    A cosine that leaves out CIDEr's clipping and its penalty on length draws up a shortlist, which is then measured.

    Args:
        candidates: captions, tokenized.
        references: captions of each picture, tokenized.
    """
    from pycocoevalcap.cider.cider import Cider

    frequency = Counter(gram for texts in references for gram in set().union(*(grams(text) for text in texts)))

    def vector(text: str) -> list[dict[str, float]]:
        found: list[dict[str, float]] = [{} for _ in range(4)]
        for gram, count in grams(text).items():
            found[gram.count(" ")][gram] = count * np.log(len(references) / max(1, frequency[gram]))
        lengths = [np.sqrt(sum(value**2 for value in order.values())) or 1.0 for order in found]
        return [{g: v / length for g, v in order.items()} for order, length in zip(found, lengths, strict=True)]

    middle: dict[str, float] = defaultdict(float)
    for texts in references:
        for text in texts:
            for order in vector(text):
                for gram, value in order.items():
                    middle[gram] += value / len(texts)
    unique = sorted(set(candidates))
    rough = {text: sum(v * middle.get(g, 0.0) for order in vector(text) for g, v in order.items()) for text in unique}
    shortlist = sorted(unique, key=lambda text: -rough[text])[:SHORTLIST]
    truth = {number: list(texts) for number, texts in enumerate(references)}

    def cider(text: str) -> float:
        return float(Cider().compute_score(truth, {number: [text] for number in truth})[0])

    return max(shortlist, key=cider)


def grams(text: str) -> Counter[str]:
    """Runs of one to four words, and how often they come."""
    words = text.split()
    return Counter(" ".join(words[at : at + n]) for n in (1, 2, 3, 4) for at in range(len(words) - n + 1))


# The rows of the table


def retrieval_floors(data: Data, parts: Parts) -> Numbers:
    """The straight line on Flickr8k's test set and on stamps of unseen concepts."""
    train, val, test = (parts.pairs(data.flickr8k(split)) for split in ("train", "val", "test"))
    penalty = best_penalty(train, val)
    print(f"Flickr8k: penalty {penalty:.3g}", file=sys.stderr)
    numbers: Numbers = {
        "Flickr8k test, straight line": recall_numbers(test.recall(Line.fit(train.images, train.targets, penalty)))
    }
    samples, concepts = data.stamps("train"), data.concepts("train")
    stamps, unseen = parts.pairs(samples), parts.pairs(data.stamps("unseen"))
    order = {concept: number for number, concept in enumerate(sorted(set(concepts.values())))}
    folds = np.random.default_rng(0).permutation(len(order))[[order[concepts[s.id]] for s in samples]] % FOLDS
    plain = np.array([sample.id.endswith("-white") for sample in samples])
    rows = parts.class_rows(data.classes())
    for name, extra in {"": [], " and Flickr8k": [train], " and class rows": [rows]}.items():
        penalty, quality = cross_validated(stamps, folds, plain, extra)
        print(f"stamps{name}: penalty {penalty:.3g}, mean recall over folds {quality:.3f}", file=sys.stderr)
        line = Line.fit(*together([stamps, *extra]), penalty)
        numbers[f"unseen stamps, straight line from stamps{name}"] = recall_numbers(unseen.recall(line))
    return numbers


def caption_floors(data: Data) -> tuple[Numbers, str]:
    """The best single sentence, chosen on the validation set among the training captions."""
    train, val, test = ([sample.captions for sample in data.flickr8k(split)] for split in ("train", "val", "test"))
    candidates = tokenize([text for texts in train for text in texts])
    words = iter(tokenize([text for texts in val for text in texts]))
    sentence = best_sentence(candidates, [[next(words) for _ in texts] for texts in val])
    found: dict[str, Any] = dict(evaluate.captions([sentence] * len(test), test))
    return {"Flickr8k test, one sentence for all": found}, sentence


def naming_floor(data: Data, parts: Parts, naming: Naming) -> tuple[Numbers, list[dict[str, Any]]]:
    """The classifier's top name of held-out stamp photographs whose names are trained."""
    samples, things = data.stamps("named"), data.things("named")
    texts = [
        {
            "id": sample.id,
            "thing": things[sample.id],
            "given": name,
            "right": naming.same_thing(name, things[sample.id]),
        }
        for sample, name in zip(samples, parts.top_names(samples), strict=True)
    ]
    return {"held-out stamps, the classifier's top name": {"named": mean([text["right"] for text in texts])}}, texts


def question_floors(data: Data) -> Numbers:
    """The most frequent training answer of each kind, and the best single answer to the test questions."""
    frequent: dict[str, Counter[str]] = defaultdict(Counter)
    for sample in data.questions("train"):
        for question, answer in sample.questions:
            frequent[data.kind(question, answer)][answer] += 1
    asked = [(sample.id, *pair) for sample in data.questions("test") for pair in sample.questions]
    kinds = [data.kind(question, answer) for _, question, answer in asked]
    given = [max(sorted(frequent[kind]), key=lambda answer, kind=kind: frequent[kind][answer]) for kind in kinds]
    found = evaluate.answers(given, [[answer] for *_, answer in asked], kinds, [key for key, *_ in asked])
    return {"questions, the most frequent answer": answer_numbers(found)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=Path, required=True, help="folder of the prepared Flickr8k shards")
    parser.add_argument("--made", type=Path, required=True, help="folder that prepare.py wrote questions and stamps to")
    parser.add_argument("--cache", type=Path, required=True, help="folder to keep the pictures' features in")
    parser.add_argument("--out", type=Path, required=True, help="where to write: OUT.json and OUT.md")
    parser.add_argument("--wordnet", type=Path, default=DATABASE, help=f"folder of WordNet's files ({DATABASE})")
    parsed = parser.parse_args(arguments)
    started = time.monotonic()
    data, parts = Data(parsed.shards, parsed.made), Parts(parsed.cache)
    names, named = naming_floor(data, parts, Naming(WordNet(parsed.wordnet)))
    captions, sentence = caption_floors(data)
    numbers = {**retrieval_floors(data, parts), **captions, **names, **question_floors(data)}
    write(parsed.out, numbers, sys.argv, time.monotonic() - started, sentence=sentence, named=named)
    print(markdown(numbers))


if __name__ == "__main__":
    main()
