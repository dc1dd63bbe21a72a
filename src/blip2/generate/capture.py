"""Steps of a language model as CUDA graphs: one launch instead of a thousand, a graph for each shape of buffers.

Letters: B rows, V vocabulary.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor

from blip2.model.cache import Cache
from blip2.model.fixed import Fixed, Shape, shape_of
from blip2.protocols import LanguageModel

KEPT = 2**32  # bytes of all shapes' buffers together; the one that was not used for longest leaves
WARM = 2  # steps before a capture: kernels are chosen and memory is found in them

Replay = Callable[[], Tensor]

_plain = ContextVar("plain", default=False)


class Captured:
    """`LanguageModel.step` over buffers of fixed size; the cache that it is given stays what it would be without.

    Args:
        language: one of ours, whose caches are `model.cache.Cache`.
        capture: makes a replay of a function that reads and writes the same memory each time: a CUDA graph of it. The
            function itself will do too, and is what tests on a CPU give.
    """

    def __init__(
        self, language: LanguageModel, capture: Callable[[Callable[[], Tensor]], Replay] | None = None
    ) -> None:
        self._language, self._capture = language, graph if capture is None else capture
        self._impossible = False
        self._kept: OrderedDict[tuple[Shape, int | None], tuple[Fixed, Replay]] = OrderedDict()

    def step(self, ids: Tensor, cache: Cache, vocabulary: Tensor | None = None) -> Tensor:
        """See `protocols.LanguageModel`: int64[B] to float[B, V or K]."""
        shape = shape_of(cache)
        if shape is None or self._impossible:
            return self._language.step(ids, cache, vocabulary)
        key = shape, None if vocabulary is None else vocabulary.data_ptr()
        if key not in self._kept:
            with torch.inference_mode(False):  # they are written in place, later too
                fixed = Fixed(shape, cache)
            fixed.load(ids, cache)
            step = partial(self._language.step, fixed.ids, fixed, vocabulary)
            try:
                self._kept[key] = fixed, self._capture(step)
            except RuntimeError as error:  # a part that a graph cannot hold, such as a kernel that waits for the device
                warnings.warn(f"no CUDA graph of this language model, its steps are slower: {error}", stacklevel=2)
                self._impossible = True
                return self._language.step(ids, cache, vocabulary)
            while len(self._kept) > 1 and sum(each.nbytes for each, _ in self._kept.values()) > KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        fixed, replay = self._kept[key]
        fixed.load(ids, cache)
        return fixed.unload(replay(), cache)


def graph(step: Callable[[], Tensor]) -> Replay:
    """A CUDA graph of a function of memory that stays where it is."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM):
            step()
    torch.cuda.current_stream().wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        logits = step()

    def replay() -> Tensor:
        captured.replay()
        return logits

    return replay


def stepper(language: LanguageModel, cache: Any) -> Callable[..., Tensor]:
    """How to step: through graphs on a CUDA device where the cache is one of ours, plainly elsewhere."""
    if isinstance(cache, Cache) and cache.starts.is_cuda and not _plain.get():
        kept: Captured | None = getattr(language, "_captured", None)
        if kept is None:
            kept = Captured(language)
            object.__setattr__(language, "_captured", kept)
        return kept.step
    return language.step


@contextmanager
def without_graphs() -> Generator[None, None, None]:
    """Steps inside read the weights anew, as training wants: a graph would keep autocast's copies of them."""
    before = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(before)
