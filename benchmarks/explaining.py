"""Whether the maps of `explain` are right: held against what covering a part of the picture does. See docs/explain.md.

    python -m benchmarks.explaining PICTURES [--limit N] [--model M]

PICTURES is a data set with captions. Each cell of the encoder's grid is covered with the picture's mean colour, one at
a time, and the score computed anew: of the match with the first caption, of each of its words, and of the caption that
the model writes. Printed is the rank correlation of a map with what its score lost, over the cells of a picture: 1 is
the same order, 0 is chance.

Letters: C cells of the grid, W words, T text positions, S side of the square.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.remedies import evenly
from blip2 import explain, image
from blip2.blip2 import Blip2
from blip2.data import sources
from blip2.data.sources import ImageRef
from blip2.evaluate import estimate
from blip2.explain.words import spans_of_text, without_each
from blip2.loading import load
from blip2.model import prefix
from blip2.protocols import Places
from blip2.results import ImageFeatures


def covered(square: Tensor, places: Places) -> Tensor:
    """A picture, then the same with each cell in its mean colour: uint8[S, S, 3] to uint8[1 + C, S, S, 3]."""
    colour = square.float().mean((0, 1)).round().to(torch.uint8)
    ends = [np.linspace(0, len(square), count + 1).round().astype(int) for count in (places.rows, places.columns)]
    found = [square]
    for row in range(places.rows):
        for column in range(places.columns):
            other = square.clone()
            other[ends[0][row] : ends[0][row + 1], ends[1][column] : ends[1][column + 1]] = colour
            found.append(other)
    return torch.stack(found)


def losses(scores: Tensor) -> Tensor:
    """What each cover cost: scores float[1 + C, ...] to float[C, ...]."""
    return scores[0] - scores[1:]


def odds(model: Blip2, features: ImageFeatures, rows: Tensor) -> Tensor:
    """Log-odds of the match of every image with every text, int64[W, T]: float32[1 + C, W]."""
    pairs = torch.cartesian_prod(torch.arange(len(features)), torch.arange(len(rows)))
    logits = model.match_logits(features, rows, pairs)
    return (logits[:, 1] - logits[:, 0]).view(len(features), len(rows))


@torch.no_grad()
def said(model: Blip2, features: ImageFeatures, ids: Sequence[int]) -> Tensor:
    """Log-probability of a caption's tokens about every image: float32[1 + C]."""
    language, tokenizer = model.writer()
    prompts = tokenizer.prompts([model.config.prompts.caption] * len(features))
    visual = model.bridge.project(features.queries)
    built = prefix.build(language, visual, prompts, tokenizer.bos, model.config.prompts.visual)
    return language.log_probs(*built, torch.tensor([list(ids)] * len(features), device=model.device)).sum(1)


def rank_correlation(one: Tensor, other: Tensor) -> float:
    """Spearman's: equal values share the mean of their ranks; 0 where all values of one are equal."""
    ranks = [_ranks(values.flatten().cpu().numpy()) for values in (one, other)]
    return float(np.corrcoef(*ranks)[0, 1]) if all(np.ptp(each) for each in ranks) else 0.0


def _ranks(values: NDArray[np.float32]) -> NDArray[np.float64]:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[place]


def compared(model: Blip2, square: Tensor, text: str) -> Iterator[tuple[str, float]]:
    """Each map of one picture by name, and its correlation with what covering cost."""
    first = explain.queries(model, model.encode(square[None]))
    features = model.encode(covered(square, first.places))
    ids, words = spans_of_text(model, text)
    lost = losses(odds(model, features, without_each(ids, words, model.config.qformer.pad_id)))  # (C, 1 + W)
    found = explain.match(model, features[0], text)
    grid = found.places.grid
    assert found.evidence is not None
    yield "match, attention", rank_correlation(grid(found.attention.mean(0)), lost[:, 0])
    yield "match, evidence", rank_correlation(grid(found.evidence), lost[:, 0])
    for number, word in enumerate(found.words, 1):
        part = lost[:, 0] - lost[:, number]  # of what the word adds
        assert word.attention is not None, "the mean over layers has one that words come after"
        yield "word, attention", rank_correlation(grid(word.attention), part)
        yield "word, evidence", rank_correlation(grid(word.evidence), part)
    if model.language is not None:
        written = explain.caption(model, features[0])
        (caption,) = model.caption(features[0], details=True)
        assert written.evidence is not None
        cost = losses(said(model, features, caption.ids))
        yield "caption, attention", rank_correlation(grid(written.attention.mean(0)), cost)
        yield "caption, evidence", rank_correlation(grid(written.evidence), cost)


def positive(text: str) -> int:
    """A number of pictures, one at least."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text}: one picture at least")
    return number


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures")
    parser.add_argument("--limit", type=positive, default=20)
    parser.add_argument("--model")
    given = parser.parse_args()
    model = load(given.model)
    found: dict[str, list[float]] = defaultdict(list)
    samples = [(sample.image, sample.captions) for sample in sources.read(given.pictures)]
    told = [(source, captions) for source, captions in samples if captions and isinstance(source, ImageRef)]
    if not told:
        parser.error(f"{given.pictures}: has no pictures with captions")
    for source, captions in evenly(told, given.limit):
        square = torch.from_numpy(model.transform.square(image.open(source.read())).copy())
        by_name: dict[str, list[float]] = defaultdict(list)
        for name, value in compared(model, square, captions[0]):
            by_name[name].append(value)
        for name, values in by_name.items():
            found[name].append(float(np.mean(values)))  # of a picture's words the mean: pictures are what is drawn
    for name in sorted(found):
        print(f"| {name} | {estimate.mean(found[name])} | {len(found[name])} |")


if __name__ == "__main__":
    main()
