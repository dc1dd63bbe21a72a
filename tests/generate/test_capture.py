"""A step over buffers of fixed size gives the same tokens, and is the same calls on the same memory each time."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from blip2.config import GemmaConfig, OPTConfig, T5Config
from blip2.generate import Beam, Greedy, Limits, Method, Sample, generate
from blip2.generate.capture import Captured, stepper, without_graphs
from blip2.model.cache import Cache
from blip2.model.fixed import shape_of
from blip2.model.gemma import Gemma
from blip2.model.opt import OPT
from blip2.model.t5 import T5

VOCAB, WIDTH = 23, 16
SIZES: dict[str, Any] = {"width": WIDTH, "layers": 2, "heads": 2, "mlp_width": 24, "vocab_size": VOCAB}
SHAPE: dict[str, Any] = {"key_heads": 1, "head_width": 8, "query_scale": 8, "window": 4, "global_every": 2}


class Recorder(TorchDispatchMode):
    """Stands in for a CUDA graph: what a function did on its first run, done again call by call."""

    def __init__(self, step: Callable[[], Tensor]) -> None:
        super().__init__()
        self._calls: list[tuple[Any, Any, Any, Any]] = []
        with self:
            self._result = step()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "a step asks for a number of a tensor"
        found = func(*args, **(kwargs or {}))
        self._calls.append((func, args, kwargs or {}, found))
        return found

    def __call__(self) -> Tensor:
        made: dict[int, Tensor] = {}

        def now(value: Any) -> Any:
            return made.get(id(value), value)

        def remember(old: Any, new: Any) -> None:
            if isinstance(old, Tensor):
                made[id(old)] = new
            elif isinstance(old, list | tuple):
                for each in zip(old, new, strict=True):
                    remember(*each)

        for func, args, kwargs, found in self._calls:
            remember(found, func(*tree_map(now, args), **tree_map(now, kwargs)))
        return made[id(self._result)]


@pytest.fixture(params=["opt", "gemma", "t5"])
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(2)
    made: Any = {
        "opt": lambda: OPT(OPTConfig(context=128, **SIZES)),
        "gemma": lambda: Gemma(GemmaConfig(context=128, **SHAPE, **SIZES)),
        "t5": lambda: T5(T5Config(head_width=8, buckets=8, max_distance=7, **SIZES)),
    }[request.param]()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.5 if parameter.ndim > 1 else 0.2))
    return made.double()


@pytest.mark.parametrize("method", [Greedy(), Beam(3), Sample(seed=3)], ids=repr)
def test_replayed_steps_write_the_same_tokens(model: Any, method: Method, monkeypatch: pytest.MonkeyPatch):
    prefix = torch.randn(7, 6, WIDTH, generator=torch.Generator().manual_seed(1)).double()
    lengths = torch.tensor([6, 1, 3, 6, 2, 5, 4])
    arguments = (model, prefix, lengths, method, Limits(40), (1, 4))
    expected = generate(*arguments, capacity=3)

    captured = Captured(model, Recorder)
    monkeypatch.setattr("blip2.generate.batch.stepper", lambda *_: captured.step)
    found = generate(*arguments, capacity=3)

    assert len(captured._kept) > 1
    assert [[text.ids for text in row] for row in found] == [[text.ids for text in row] for row in expected]
    for row, other in zip(found, expected, strict=True):
        for text, same in zip(row, other, strict=True):
            assert text.log_probs == pytest.approx(same.log_probs, abs=1e-5)  # float32 within T5's norms and angles


@pytest.mark.parametrize("model", ["opt", "gemma"], indirect=True)
@torch.no_grad()
def test_what_prompts_share_is_laid_before_each(model: Any):
    image = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(1)).double()
    words = torch.randn(3, 4, WIDTH, generator=torch.Generator().manual_seed(2)).double()
    read = model.prefill(image, torch.tensor([5, 5]))[1]
    read = read.part(0, 5).join(read.part(1, 5))
    cache = model.prefill(words, torch.tensor([4, 1, 3]), None, read.select(torch.tensor([1, 0, 1])))[1]
    rows = torch.tensor([0, 0, 1, 2, 2])
    plain, other, captured = cache.select(rows), cache.select(rows), Captured(model, Recorder)
    assert shape_of(plain) == (4, 2, 32, 32)
    for token in range(5):
        ids = torch.arange(5) + token
        torch.testing.assert_close(captured.step(ids, other), model.step(ids, plain))
    assert len(captured._kept) == 1


@torch.no_grad()
def test_buffers_that_are_too_many_leave(model: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("blip2.generate.capture.KEPT", 0)
    captured = Captured(model, Recorder)
    for rows in (1, 4, 2):
        cache = model.prefill(torch.randn(rows, 3, WIDTH).double(), torch.full((rows,), 3))[1]
        assert isinstance(cache, Cache)
        captured.step(torch.zeros(rows, dtype=torch.long), cache)
        assert [shape.prompts for shape, _ in captured._kept] == [rows]


@torch.no_grad()
def test_a_model_that_no_graph_can_hold_is_stepped_plainly_and_says_so(model: Any):
    def refuse(_: Callable[[], Tensor]) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    prefix, lengths, ids = torch.randn(2, 3, WIDTH).double(), torch.tensor([3, 2]), torch.tensor([1, 2])
    captured = Captured(model, refuse)
    cache, other = (model.prefill(prefix, lengths)[1] for _ in range(2))
    with pytest.warns(UserWarning, match="no CUDA graph of this language model, its steps are slower: operation not"):
        found = captured.step(ids, cache)
    torch.testing.assert_close(found, model.step(ids, other))
    torch.testing.assert_close(captured.step(ids, cache), model.step(ids, other))


def test_weights_that_are_being_trained_are_read_anew_at_each_step():
    language, cache = SimpleNamespace(step=lambda *_: None), Cache(torch.tensor([1]))
    cache.starts = SimpleNamespace(is_cuda=True)  # type: ignore[assignment]
    captured = stepper(language, cache)  # type: ignore[arg-type]
    assert captured != language.step
    with without_graphs():
        assert stepper(language, cache) == language.step  # type: ignore[arg-type]
    assert stepper(language, cache) == captured  # type: ignore[arg-type]
