"""What a language model has read of images, and prompts that go on from there.

Letters: N prompts, I images, Q queries, S and T positions, D width of the language model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from blip2.model import prefix
from blip2.packed import learns
from blip2.protocols import LanguageModel

KEPT = 2**28  # bytes that the images of one call may leave behind: 12 images of OPT-2.7b in float32, 200 of mini


class Reading:
    """What language models have read of one image, and of the words after it: kept with its features.

    A model finds what it read itself, and only while the image's queries reach it as they did then.
    """

    def __init__(self) -> None:
        self._kept: WeakKeyDictionary[Any, tuple[Tensor, list[int], Any]] = WeakKeyDictionary()

    def __reduce__(self) -> tuple[type[Reading], tuple[()]]:
        return Reading, ()  # a copy, in another process perhaps, has read nothing

    def find(self, language: LanguageModel, visual: Tensor) -> tuple[list[int], Any]:
        """What a model has read that begins with these projected queries, float[Q, D].

        Returns:
            the words after them, and the cache of one row and one tier; no words and None where it has read nothing.
        """
        seen, words, cache = self._kept.get(language, (None, [], None))
        if seen is None or seen.device != visual.device or not torch.equal(seen, visual):
            return [], None
        return words, cache

    def keep(self, language: LanguageModel, visual: Tensor, words: list[int], cache: Any) -> None:
        """What the model has read; it must not be one that is being trained, for that changes."""
        self._kept[language] = visual, words, cache


class Asked:
    """Prompts about images; satisfies `generate.Prompts`.

    Of a decoder-only model, an image that begins several prompts, or began one before, is read once: the prompts go on
    from its keys and values, and from those of the words that they have in common with the last prompt.

    Args:
        project: queries of images, float[I, Q, Dq], to what the language model reads, float[I, Q, D].
        queries: of all prompts' images, in order.
        readings: of the same images; one object is one image.
        ids: of each prompt, `SLOT` where an image stands.
        bos, layout: as `prefix.build` takes them.
        counts: images of each prompt.
    """

    def __init__(
        self,
        language: LanguageModel,
        project: Callable[[Tensor], Tensor],
        queries: Tensor,
        readings: Sequence[Reading],
        ids: Sequence[Sequence[int]],
        bos: int | None,
        layout: Literal["before_bos", "after_bos"],
        counts: Sequence[int],
        device: torch.device,
    ) -> None:
        self.device, self._language, self._ids, self._bos = device, language, ids, bos
        self._layout: Literal["before_bos", "after_bos"] = layout
        order = {id(reading): number for number, reading in reversed(list(enumerate(readings)))}
        first = sorted(order.values())  # of each image, where it comes first
        place = {number: at for at, number in enumerate(first)}
        self._readings = [readings[number] for number in first]
        self._visual = project(queries[first].to(device))  # (I, Q, D)
        images = iter(place[order[id(reading)]] for reading in readings)
        self._images = [[next(images) for _ in range(count)] for count in counts]
        self._width = queries.shape[1]
        self.lengths = [prefix.length(row, count, self._width, bos) for row, count in zip(ids, counts, strict=True)]
        self._fresh: dict[int, tuple[list[int], Any]] = {}  # images that were read for the prompts at hand
        alone = all(count == 1 for count in counts) and not any(prefix.SLOT in row for row in ids)
        self._begins = alone and getattr(language, "goes_on", False)  # each prompt has one image, which begins it
        self._stays = not (isinstance(language, nn.Module) and learns(language))  # what is read of images may be kept
        self._apart = self._pays()

    def read(self, which: list[int], vocabulary: Tensor | None = None) -> tuple[Tensor, Any]:
        """See `generate.Prompts`. Equal prompts about the same images are read once."""
        first: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
        owners = [
            first.setdefault((tuple(self._images[number]), tuple(self._ids[number])), len(first)) for number in which
        ]
        different = [which[owners.index(owner)] for owner in range(len(first))]
        if self._apart:
            *tails, past = self._tails(different)
            logits, cache = self._language.prefill(*tails, vocabulary, past)  # pyright: ignore[reportCallIssue]
        else:
            asked = () if vocabulary is None else (vocabulary,)
            logits, cache = self._language.prefill(*self._built(different), *asked)
        if self._begins and self._stays:
            self._keep(different, cache)
        if len(different) == len(which):
            return logits, cache
        rows = torch.tensor(owners, device=self.device)
        return logits[rows], cache.select(rows)

    def prefix(self) -> tuple[Tensor, Tensor, Any]:
        """All prompts at once: embeddings float[N, S, D], right-padded, int64[N] lengths, and what they go on from.

        That is a cache where one image begins them all, which it then holds, and None elsewhere.
        """
        every = list(range(len(self._ids)))
        if self._begins and len(self._readings) == 1 and all(map(self._words, every)):
            return self._tails(every)
        return *self._built(every), None

    @property
    def _head(self) -> int:
        """Positions of an image that begins a prompt, the begin token with it where that stands before it."""
        return self._width + (self._bos is not None and self._layout == "after_bos")

    def _pays(self) -> bool:
        """Whether images are read before their prompts: they begin several, or were read before."""
        if not self._begins or not all(map(self._words, range(len(self._ids)))):
            return False
        return len(self._images) > len(self._readings) or any(map(self._known, range(len(self._readings))))

    def _words(self, number: int) -> list[int]:
        """What a prompt has after its image."""
        begin = [self._bos] if self._bos is not None and self._layout == "before_bos" else []
        return [*begin, *self._ids[number]]

    def _known(self, image: int) -> bool:
        return self._readings[image].find(self._language, self._visual[image])[1] is not None

    def _built(self, which: list[int]) -> tuple[Tensor, Tensor]:
        """Images and words of some prompts."""
        images = [image for number in which for image in self._images[number]]
        words, counts = [self._ids[number] for number in which], [len(self._images[number]) for number in which]
        return prefix.build(self._language, self._visual[images], words, self._bos, self._layout, counts)

    def _tails(self, which: list[int]) -> tuple[Tensor, Tensor, Any]:
        """The words of some prompts that were not read yet, and the cache of what was, images where they are new."""
        about: dict[int, list[int]] = {}
        for number in which:
            about.setdefault(self._images[number][0], []).append(number)
        self._read_new([image for image in about if not self._known(image)])
        pasts: list[Any] = []
        left: dict[int, list[int]] = {}
        for image, numbers in about.items():
            known, cache = self._fresh.get(image) or self._readings[image].find(self._language, self._visual[image])
            words = [self._words(number) for number in numbers]
            same = min(_common(known, each) for each in words)
            pasts.append(cache.head(self._head + same))
            left |= {number: each[same:] for number, each in zip(numbers, words, strict=True)}
        self._fresh = {}
        rows = [row for row, numbers in enumerate(about.values()) for _ in numbers]
        order = {number: row for row, number in enumerate(number for numbers in about.values() for number in numbers)}
        past = reduce(lambda mine, other: mine.join(other), pasts)
        past = past.select(torch.tensor([rows[order[number]] for number in which], device=self.device))
        words = [left[number] for number in which]
        embeds, lengths = prefix.build(self._language, self._visual[:0], words, None, "before_bos", [0] * len(which))
        return embeds, lengths, past

    def _read_new(self, images: list[int]) -> None:
        """Images alone, for the prompts after them; they stay where they may."""
        if not images:
            return
        bos = self._bos if self._layout == "after_bos" else None
        heads = prefix.build(self._language, self._visual[images], [[]] * len(images), bos, self._layout)
        cache: Any = self._language.prefill(*heads)[1]
        for row, image in enumerate(images):
            self._fresh[image] = [], cache.part(row, self._head)
            self._leave(image, *self._fresh[image])

    def _keep(self, which: list[int], cache: Any) -> None:
        """Leave what was just read with the features: all of a single prompt, for the next may begin alike."""
        if len(which) == 1:
            words, image = self._words(which[0]), self._images[which[0]][0]
            count = self._head + len(words)
            if self._small(cache, count):
                self._leave(image, words, cache.part(0, count))
        elif not self._apart and self._small(cache, self._head):
            for row, number in enumerate(which):
                self._leave(self._images[number][0], [], cache.part(row, self._head))

    def _leave(self, image: int, words: list[int], cache: Any) -> None:
        if self._stays and self._small(cache, self._head + len(words)):
            self._readings[image].keep(self._language, self._visual[image], words, cache)

    def _small(self, cache: Any, count: int) -> bool:
        """Whether so many positions of every image of this call may stay."""
        return cache.bytes_of(count) * len(self._readings) <= KEPT


def _common(known: list[int], words: list[int]) -> int:
    """How many words were read before; one at least is left to read."""
    pairs = zip(known, words[:-1], strict=False)
    return next((number for number, (old, new) in enumerate(pairs) if old != new), min(len(known), len(words) - 1))
