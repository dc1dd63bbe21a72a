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
from blip2.protocols import LanguageModel

KEPT = 2**28  # bytes that the images of one call may leave behind: 12 images of OPT-2.7b in float32, 200 of mini


class Reading:
    """What language models have read of one image: keys and values of its positions, kept with its features.

    A model finds what it read itself, and only while the image's queries reach it as they did then.
    """

    def __init__(self) -> None:
        self._kept: WeakKeyDictionary[Any, tuple[Tensor, Any]] = WeakKeyDictionary()

    def find(self, language: LanguageModel, visual: Tensor) -> Any:
        """The cache, one row, of a model that has read these projected queries, float[Q, D]; None of any other."""
        seen, cache = self._kept.get(language, (None, None))
        same = seen is not None and seen.device == visual.device and torch.equal(seen, visual)
        return cache if same else None

    def keep(self, language: LanguageModel, visual: Tensor, cache: Any) -> None:
        """What the model has read of the projected queries; nothing of one that is being trained, for it changes."""
        if not isinstance(language, nn.Module) or not any(each.requires_grad for each in language.parameters()):
            self._kept[language] = visual, cache


class Asked:
    """Prompts about images; satisfies `generate.Prompts`.

    Of a decoder-only model, an image that begins several prompts, or began one before, is read once: the prompts go on
    from its keys and values.

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
        self.device, self._language, self._ids, self._bos, self._layout = device, language, ids, bos, layout
        order = {id(reading): number for number, reading in reversed(list(enumerate(readings)))}
        first = sorted(order.values())  # of each image, where it comes first
        place = {number: at for at, number in enumerate(first)}
        self._readings = [readings[number] for number in first]
        self._visual = project(queries[first].to(device))  # (I, Q, D)
        images = iter(place[order[id(reading)]] for reading in readings)
        self._images = [[next(images) for _ in range(count)] for count in counts]
        self._width = queries.shape[1]
        self.lengths = [prefix.length(row, count, self._width, bos) for row, count in zip(ids, counts, strict=True)]
        self._apart = self._goes_apart()

    def read(self, which: list[int]) -> tuple[Tensor, Any]:
        """See `generate.Prompts`. Equal prompts about the same images are read once."""
        first: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
        owners = [
            first.setdefault((tuple(self._images[number]), tuple(self._ids[number])), len(first)) for number in which
        ]
        different = [which[owners.index(owner)] for owner in range(len(first))]
        logits, cache = self._go_on(different) if self._apart else self._together(different)
        if len(different) == len(which):
            return logits, cache
        rows = torch.tensor(owners, device=self.device)
        return logits[rows], cache.select(rows)

    def prefix(self) -> tuple[Tensor, Tensor]:
        """All prompts with their images: embeddings float[N, S, D], right-padded, and int64[N] lengths."""
        return self._built(list(range(len(self._ids))))

    def _goes_apart(self) -> bool:
        """Whether images are read before the prompts: each begins its prompt alone, and that pays."""
        if not self._can_go_apart():
            return False
        shared = len(self._images) > len(self._readings)
        tails = all(self._ids) or (self._layout == "before_bos" and self._bos is not None)
        return tails and (shared or any(self._known(image) is not None for image in range(len(self._readings))))

    def _can_go_apart(self) -> bool:
        alone = all(len(images) == 1 for images in self._images) and not any(prefix.SLOT in row for row in self._ids)
        return alone and getattr(self._language, "goes_on", False)

    def _known(self, image: int) -> Any:
        return self._readings[image].find(self._language, self._visual[image])

    def _together(self, which: list[int]) -> tuple[Tensor, Any]:
        """Images and words in one prefill; of a few images, what was read stays for the next prompt."""
        logits, cache = self._language.prefill(*self._built(which))
        if self._can_go_apart():
            self._keep([self._images[number][0] for number in which], cache)
        return logits, cache

    def _built(self, which: list[int]) -> tuple[Tensor, Tensor]:
        images = [image for number in which for image in self._images[number]]
        words, counts = [self._ids[number] for number in which], [len(self._images[number]) for number in which]
        return prefix.build(self._language, self._visual[images], words, self._bos, self._layout, counts)

    def _go_on(self, which: list[int]) -> tuple[Tensor, Any]:
        """Images where they are new, then the words after them."""
        images = [image for number in which for image in self._images[number]]
        order = list(dict.fromkeys(images))
        caches = {image: self._known(image) for image in order}
        new = [image for image, cache in caches.items() if cache is None]
        if new:
            bos = self._bos if self._layout == "after_bos" else None
            heads = prefix.build(self._language, self._visual[new], [[]] * len(new), bos, self._layout)
            cache: Any = self._language.prefill(*heads)[1]
            self._keep(new, cache)
            rows = torch.arange(len(new), device=self.device)
            caches |= {image: cache.select(row) for image, row in zip(new, rows.split(1), strict=True)}
        known = [caches[image] for image in order]
        if len(new) == len(order) > 1:
            known = [cache]
        past: Any = reduce(lambda left, right: left.join(right), known)
        past = past.select(torch.tensor([order.index(image) for image in images], device=self.device))
        bos = self._bos if self._layout == "before_bos" else None
        words = [self._ids[number] for number in which]
        tails = prefix.build(self._language, self._visual[:0], words, bos, self._layout, [0] * len(which))
        return self._language.prefill(*tails, None, past)  # pyright: ignore[reportCallIssue]

    def _keep(self, images: list[int], cache: Any) -> None:
        """Leave what was read of each image with its features, where all of them together are small."""
        count = self._width + (self._bos is not None and self._layout == "after_bos")
        if cache.bytes_of(count) * len(self._readings) > KEPT:
            return
        for row, image in enumerate(images):
            part = cache.part(torch.tensor([row], device=self.device), count)
            self._readings[image].keep(self._language, self._visual[image], part)
