"""The index's answers against exact ones: recall, time, size.

    blip2 embed holiday/ --out photos.npz
    python benchmarks/search.py photos.npz captions.txt --images 8000 --images 100000

Real vectors, repeated with noise where there are fewer than asked for; texts of the same kind, a line each. Recall@10
is the share of the ten places whose score is one that the exact answer has there: equal scores are equal. Times are of
one query with its vectors given, medians over the texts, after a warm-up.

Letters: N images, Q queries an image, E width of the image-text space, M texts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

import blip2
from blip2.search import ImageIndex, nearest, shortlist
from blip2.search.nearest import Query
from blip2.search.store import Collection, Store

NOISE = 0.3  # length of what is added to a copy's unit vectors: a picture of the same kind, not a duplicate
TOP = 10
WRITTEN = 4096  # images a write


class Given:
    """Embeds texts by looking them up, and a picture of one pixel as the image whose number is its colour."""

    def __init__(self, texts: list[str], text_vectors: Tensor, image_vectors: Tensor) -> None:
        self.identity = "benchmark"
        self._texts = dict(zip(texts, text_vectors, strict=True))
        self._images = image_vectors

    def embed_texts(self, texts: list[str]) -> Tensor:
        return torch.stack([self._texts[text] for text in texts])

    def embed_images(self, images: list[Image.Image]) -> Tensor:
        numbers = [int.from_bytes(image.tobytes(), "big") for image in images]
        return self._images[numbers].float()

    def unread(self, text: str) -> int:
        del text
        return 0


def picture(number: int) -> Image.Image:
    return Image.frombytes("RGB", (1, 1), number.to_bytes(3, "big"))


def repeated(vectors: Tensor, count: int) -> Tensor:
    """float16[count, Q, E]: the first ones as they are, copies with noise."""
    draw = torch.Generator().manual_seed(0)
    parts = [vectors[:count].half()]
    while sum(map(len, parts)) < count:
        some = vectors[: count - sum(map(len, parts))]
        noise = normalize(torch.randn(some.shape, generator=draw), dim=-1)
        parts.append(normalize(some + NOISE * noise, dim=-1).half())
    return torch.cat(parts)


def measure(vectors: Tensor, model: Given, texts: list[str], probes: int) -> dict[str, Any]:
    """A row of the table."""
    shortlist.PROBES = probes
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder) / "index")
        collection = Collection(model.identity)
        started = time.perf_counter()
        with store.alone():
            for start in range(0, len(vectors), WRITTEN):
                part = vectors[start : start + WRITTEN]
                files = [(f"/{start + row}", 0, 0) for row in range(len(part))]
                collection = collection.plus(files, part, torch.zeros(len(part), 3, dtype=torch.uint8))
                collection = store.write(collection)
            written = time.perf_counter() - started
            collection = shortlist.renewed(store, collection)
        built = time.perf_counter() - started - written
        opening = time.perf_counter()
        index: Any = ImageIndex.open(store.directory, model)  # pyright: ignore[reportArgumentType]
        index.search(texts[0], TOP)
        opening = time.perf_counter() - opening
        by_text = [answer(index, text, vectors, Query(model.embed_texts([text])[0], None)) for text in texts]
        pictures = [picture(number) for number in range(0, len(vectors), len(vectors) // len(texts))]
        by_image = [
            answer(index, each, vectors, Query(None, nearest.rounded(model.embed_images([each])[0])))
            for each in pictures[: len(texts) // 2]
        ]
        seconds = [each[0] for each in by_text[1:]]
        return {
            "images": len(vectors),
            "by": "shortlist" if collection.shortlist else "scan",
            "write_s": round(written, 2),
            "shortlist_s": round(built, 2),
            "open_and_first_s": round(opening, 3),
            "vectors_mb": round(sum(segment.nbytes for segment in collection.segments) / 1e6),
            "shortlist_mb": round(collection.shortlist.size / 1e6) if collection.shortlist else 0,
            "ms": round(1e3 * statistics.median(seconds), 2),
            "ms_p95": round(1e3 * float(np.quantile(seconds, 0.95)), 2),
            "recall": round(statistics.mean(each[1] for each in by_text), 4),
            "image_ms": round(1e3 * statistics.median(each[0] for each in by_image[1:]), 2),
            "image_recall": round(statistics.mean(each[1] for each in by_image), 4),
        }


def answer(index: Any, asked: Any, vectors: Tensor, query: Query) -> tuple[float, float]:
    """Seconds and recall of one search, against the best scores of all images."""
    before = time.perf_counter()
    hits = index.search(asked, TOP)
    seconds = time.perf_counter() - before
    near = nearest.best(nearest.scan(vectors, np.arange(len(vectors)), query), TOP)  # all that can be among them
    exact = nearest.scores(vectors[torch.from_numpy(near)], query).topk(TOP).values
    return seconds, sum(hit.score >= float(exact[-1]) for hit in hits) / TOP


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("vectors", type=Path, help="a .npz that `blip2 embed` wrote")
    parser.add_argument("texts", type=Path, help="queries, a line each")
    parser.add_argument("--images", type=int, action="append", help="sizes of the index; as many as there are vectors")
    parser.add_argument("--probes", type=int, action="append", help="cells that the shortlist looks into")
    parser.add_argument("--queries", type=int, default=200, help="texts that are searched for")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if library := shortlist.faiss():
        library.omp_set_num_threads(given.threads)
    vectors = torch.from_numpy(np.load(given.vectors)["vectors"])  # (N, Q, E)
    texts = list(dict.fromkeys(given.texts.read_text(encoding="utf-8").splitlines()))[: given.queries]
    text_vectors = blip2.load().embed_texts(texts)
    rows: list[dict[str, Any]] = []
    for count in given.images or [len(vectors)]:
        every = repeated(vectors, count)
        model = Given(texts, text_vectors, every)
        for probes in given.probes or [shortlist.PROBES]:
            row = {"probes": probes, **measure(every, model, texts, probes)}
            rows.append(row)
            print(json.dumps(row), flush=True)
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
