"""The index's answers against exact ones: recall, time, size, by text, by picture and by both.

    python -m benchmarks.search "data/flickr8k/*.tar" --cache runs/search

encodes the pictures with mini, once (what is in the cache is not encoded again, so it may be stopped), makes indexes of
2,000, 8,000, 20,000 and 100,000 images, and writes docs/search.json and the table in docs/search.md from it; `--images`
chooses sizes, whose rows take the place of earlier ones. The data is what `blip2 train` reads. 3 GB of memory; on two
cores five minutes, and half an hour before that to encode 8,000 pictures.

Pictures that are asked for, with their captions, are evenly taken out of the data and not in the index; the others are
repeated with noise where there are fewer than asked. By both: a picture, and the caption of another. Recall@10 is the
share of the ten places whose score is one that the exact answer has there: equal scores are equal. Times are of one
query with its vectors given, medians after a warm-up.

Letters: N images, Q queries an image, E width of the image-text space, M searches.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

import blip2
from benchmarks import tables
from blip2.bench import machine
from blip2.data.sources import Sample, read
from blip2.evaluate.kept import Kept
from blip2.evaluate.run import encode
from blip2.search import ImageIndex, nearest, shortlist
from blip2.search.nearest import Query
from blip2.search.store import Collection, Store

NOISE = 0.3  # length of what is added to a copy's unit vectors: a picture of the same kind, not a duplicate
TOP = 10
WRITTEN = 4096  # images a write
ENCODED = 64  # pictures that a stop may cost
SIZES = (2_000, 8_000, 20_000, 100_000)
KINDS = ("text", "image", "both")
PAGE = Path(__file__).parents[1] / "docs" / "search.md"


class Given:
    """Embeds texts by looking them up, and a picture of one pixel as the one whose number is its colour."""

    def __init__(self, texts: list[str], text_vectors: Tensor, image_vectors: Tensor) -> None:
        self.identity = "benchmark"
        self._texts = dict(zip(texts, text_vectors, strict=True))
        self._images = image_vectors

    def embed_texts(self, texts: list[str]) -> Tensor:
        return torch.stack([self._texts[text] for text in texts])

    def embed_images(self, images: list[Image.Image]) -> Tensor:
        return self._images[[int.from_bytes(image.tobytes(), "big") for image in images]]

    def unread(self, text: str) -> int:
        del text
        return 0


def picture(number: int) -> Image.Image:
    return Image.frombytes("RGB", (1, 1), number.to_bytes(3, "big"))


def embedded(model: blip2.Blip2, samples: Sequence[Sample], cache: Path) -> Tensor:
    """float32[N, Q, E] of the samples' pictures, kept block by block."""
    kept, found = Kept(cache), list[np.ndarray]()
    for start in range(0, len(samples), ENCODED):
        block = samples[start : start + ENCODED]
        name = sha256("\n".join([model.identity, *(sample.id for sample in block)]).encode()).hexdigest()
        found.append(kept.block(name, lambda block=block: encode(model, block, patches=False).vectors.float().numpy()))
        print(f"\r{start + len(block)} of {len(samples)} pictures", end="", flush=True)
    print()
    return torch.from_numpy(np.concatenate(found))


def repeated(vectors: Tensor, count: int) -> Tensor:
    """float16[count, Q, E]: the first ones as they are, copies with noise."""
    draw = torch.Generator().manual_seed(0)
    parts = [vectors[:count].half()]
    while sum(map(len, parts)) < count:
        some = vectors[: count - sum(map(len, parts))]
        noise = normalize(torch.randn(some.shape, generator=draw), dim=-1)
        parts.append(normalize(some + NOISE * noise, dim=-1).half())
    return torch.cat(parts)


def least(vectors: Tensor, queries: Sequence[Query]) -> list[float]:
    """The score of the exact answer's last place, for each search; all of a kind, in one pass over the vectors."""
    values = torch.cat([_roughly(block.float(), queries) for block in vectors.split(nearest.SCANNED)]).numpy()  # (N, M)
    near = (nearest.best(column, TOP) for column in values.T)  # all that can be among them
    pairs = zip(near, queries, strict=True)
    return [float(nearest.scores(vectors[torch.from_numpy(rows)], query).topk(TOP).values[-1]) for rows, query in pairs]


def _roughly(block: Tensor, queries: Sequence[Query]) -> Tensor:
    """Similarities float32[B, M] of float32[B, Q, E], as `nearest.scan` has them."""
    found = torch.zeros(len(block), len(queries))
    for parts in zip(*(query.parts for query in queries), strict=True):
        asked = torch.stack([part for _, part in parts])  # (M, E) or (M, Q, E)
        if asked.ndim == 2:
            found += parts[0][0] * (block @ asked.T).amax(1)
        else:
            found += parts[0][0] / block.shape[1] * (block.flatten(1) @ asked.flatten(1).T)
    return found


def built(vectors: Tensor, store: Store) -> dict[str, Any]:
    """An index of the vectors, and what it took."""
    started = time.perf_counter()
    collection = Collection("benchmark")
    with store.alone():
        for start in range(0, len(vectors), WRITTEN):
            part = vectors[start : start + WRITTEN]
            files = [(f"/{start + row}", 0, 0) for row in range(len(part))]
            collection = store.write(collection.plus(files, part, torch.zeros(len(part), 3, dtype=torch.uint8)))
        collection = shortlist.renewed(store, collection)
    made = [known for known in (collection.shortlist, collection.sketch) if known]
    return {
        "images": len(vectors),
        "by": "shortlists" if made else "comparing all",
        "made_s": round(time.perf_counter() - started, 1),
        "vectors_mb": round(sum(segment.nbytes for segment in collection.segments) / 1e6),
        "shortlists_mb": [round(known.size / 1e6) for known in made],
    }


def measure(vectors: Tensor, model: Given, texts: list[str]) -> dict[str, Any]:
    """A row of the table."""
    seen = nearest.rounded(model.embed_images([picture(number) for number in range(len(texts))]))  # (M, Q, E)
    words = model.embed_texts([*texts[1:], texts[0]])  # (M, E), of other pictures
    with tempfile.TemporaryDirectory() as folder:
        row = built(vectors, Store(Path(folder) / "index"))
        index = ImageIndex.open(Path(folder) / "index", model)  # pyright: ignore[reportArgumentType]
        for kind in KINDS:
            asked: list[tuple[dict[str, Any], Query]] = []
            for number in range(len(texts)):
                text, image = (texts[(number + 1) % len(texts)], picture(number))
                asked.append(
                    {
                        "text": ({"query": text}, Query(words[number], None)),
                        "image": ({"query": image}, Query(None, seen[number])),
                        "both": ({"query": text, "image": image}, Query(words[number], seen[number])),
                    }[kind]
                )
            exact = least(vectors, [query for _, query in asked])
            seconds, right = list[float](), 0
            for (given, _), score in zip(asked, exact, strict=True):
                before = time.perf_counter()
                hits = index.search(k=TOP, **given)
                seconds.append(time.perf_counter() - before)
                right += sum(hit.score >= score for hit in hits)
            row[kind] = {
                "recall": round(right / TOP / len(asked), 4),
                "ms": round(1e3 * statistics.median(seconds[1:]), 1),
                "p95_ms": round(1e3 * float(np.quantile(seconds[1:], 0.95)), 1),
            }
    return row


def table(results: dict[str, Any]) -> str:
    """The rows, and what they were measured on."""
    columns = ["images", "by", *(f"{kind}: recall@10" for kind in KINDS), *(f"{kind}, ms (p95)" for kind in KINDS)]
    rows = [
        [
            f"{row['images']:,}", row["by"],
            *(f"{row[kind]['recall']:.3f}" for kind in KINDS),
            *(f"{row[kind]['ms']:.1f} ({row[kind]['p95_ms']:.1f})" for kind in KINDS),
            f"{row['made_s']} s", f"{row['vectors_mb']} MB", " + ".join(f"{size} MB" for size in row["shortlists_mb"]),
        ]
        for row in results["rows"]
    ]  # fmt: skip
    own = results["machine"]
    versions = ", ".join(f"{name} {value}" for name, value in own["versions"].items())
    return (
        tables.table([*columns, "made in", "vectors", "shortlists"], rows)
        + f"\n{results['pictures']:,} pictures, {results['queries']} searches of each kind; {own['processor']}, "
        + f"{own['threads']} threads; {versions}; `{results['command']}`.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="pictures with captions, as `blip2 train` reads them")
    parser.add_argument("--cache", type=Path, required=True, help="keeps the pictures' vectors")
    parser.add_argument("--images", type=int, nargs="+", default=SIZES, help="sizes of the index")
    parser.add_argument("--limit", type=int, help="only the first so many pictures")
    parser.add_argument("--queries", type=int, default=200, help="searches of each kind")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--page", type=Path, default=PAGE, help="holds the table; the numbers lie beside it")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    faiss.omp_set_num_threads(given.threads)
    model, samples = blip2.load(), read(given.data)[: given.limit]
    vectors = embedded(model, samples, given.cache)
    held = np.linspace(0, len(samples) - 1, given.queries).astype(int)
    texts = [samples[row].captions[0] for row in held]
    asks = Given(texts, model.embed_texts(texts), vectors[held])
    known = torch.from_numpy(np.delete(vectors.numpy(), held, axis=0))
    place: Path = given.page.with_suffix(".json")
    results: dict[str, Any] = json.loads(place.read_text(encoding="utf-8")) if place.is_file() else {"rows": []}
    results |= {"pictures": len(known), "queries": len(texts), "machine": asdict(machine.describe(model.device))}
    results["command"] = 'python -m benchmarks.search "data/flickr8k/*.tar" --cache runs/search'
    for count in given.images:
        row = measure(repeated(known, count), asks, texts)
        print(json.dumps(row), flush=True)
        results["rows"] = sorted(
            [*(kept for kept in results["rows"] if kept["images"] != count), row], key=lambda each: each["images"]
        )
        place.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    page = given.page.read_text(encoding="utf-8")
    given.page.write_text(tables.filled(page, results, {"search": table}), encoding="utf-8")


if __name__ == "__main__":
    main()
