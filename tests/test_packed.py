"""Packed weights: the same products, the same bits back, and nobody who asks for parameters misses one.

Tolerance of products: a few units in the last place of the type, of the largest value; the sums run in another order.
"""

from __future__ import annotations

import copy
import dataclasses
import io
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import blip2
from blip2 import packed
from blip2.config import OPTConfig, T5Config
from blip2.model.opt import OPT
from blip2.model.t5 import T5
from blip2.packed import PackedLinear, pack_layers, packs, plain_weights, reads_packed, unpack_layers
from tiny_model import CONTEXT, build, picture

pytestmark = pytest.mark.skipif(not reads_packed(torch.float32), reason="this torch has no packed product")

TYPES = [torch.float32, *([torch.bfloat16] if packs(torch.zeros(512, 512, dtype=torch.bfloat16)) else [])]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of any size are packed."""
    monkeypatch.setattr(packed, "LEAST", 1)


def linear(dtype: torch.dtype = torch.float32, *, bias: bool = True, trained: bool = False) -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(96, 160, bias=bias).to(dtype).requires_grad_(trained)


def both(**options: bool) -> tuple[nn.Linear, PackedLinear]:
    plain = linear(**options)
    layer = PackedLinear(copy.deepcopy(plain))
    layer.pack()
    assert layer.is_packed
    return plain, layer


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 96), (5, 96), (2, 7, 96), (257, 96), (0, 96)], ids=str)
def test_products_are_those_of_the_plain_layer(dtype: torch.dtype, bias: bool, shape: tuple[int, ...]):
    plain = linear(dtype, bias=bias)
    layer = PackedLinear(copy.deepcopy(plain))
    x = torch.randn(shape).to(dtype)
    found, expected = layer(x), plain(x)
    assert found.shape == expected.shape
    assert found.dtype == dtype
    if len(x):
        assert (found - expected).abs().max() <= 4 * torch.finfo(dtype).eps * expected.abs().max()
    assert layer.is_packed


def test_rows_that_are_no_neighbours_in_memory_are_right_too():
    plain, layer = both()
    x = torch.randn(96, 5).T
    torch.testing.assert_close(layer(x), plain(x))
    x = torch.randn(2, 3, 200)[..., 50:146]
    torch.testing.assert_close(layer(x), plain(x))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_weights_come_back_bit_for_bit_to_everyone_who_asks(dtype: torch.dtype):
    def pickled(layer: PackedLinear) -> Tensor:
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        return torch.load(file, weights_only=False).weight

    asks: list[Callable[[PackedLinear], Tensor]] = [
        lambda layer: layer.weight,
        lambda layer: next(layer.parameters()),
        lambda layer: dict(layer.named_parameters())["weight"],
        lambda layer: layer.state_dict()["weight"],
        lambda layer: copy.deepcopy(layer).weight,
        pickled,
    ]
    for ask in asks:
        plain = linear(dtype)
        layer = PackedLinear(copy.deepcopy(plain))
        assert torch.equal(ask(layer), plain.weight)
        layer.pack()
        assert torch.equal(ask(layer), plain.weight)


def test_a_state_dict_leaves_weights_packed_and_takes_new_ones():
    plain, layer = both()
    state = layer.state_dict()
    assert layer.is_packed
    assert {name: tensor.shape for name, tensor in state.items()} == {"weight": (160, 96), "bias": (160,)}
    layer.load_state_dict({name: tensor * 2 for name, tensor in state.items()})
    x = torch.randn(3, 96)
    torch.testing.assert_close(layer(x), 2 * plain(x))


def test_weights_changed_in_place_count():
    _, layer = both()
    layer.weight.data.zero_()
    assert torch.equal(layer(torch.randn(2, 96)), layer.bias.expand(2, -1))
    layer.pack()
    assert layer.is_packed
    assert torch.equal(layer(torch.randn(2, 96)), layer.bias.expand(2, -1))


def test_the_gradient_to_the_input_is_that_of_the_plain_layer():
    plain, layer = both()
    x, y = (torch.ones(3, 96, requires_grad=True) for _ in range(2))
    plain(x).square().sum().backward()
    layer(y).square().sum().backward()
    assert x.grad is not None
    assert y.grad is not None
    assert torch.equal(x.grad, y.grad)


def test_what_is_trained_is_trained():
    plain, layer = both(trained=True)
    with torch.no_grad():
        layer(torch.ones(1, 96))
    assert layer.is_packed
    for each in (plain, layer):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
        each(torch.ones(2, 96)).square().sum().backward()
        optimizer.step()
    assert torch.equal(plain.weight, layer.weight)
    assert layer.weight.requires_grad


def test_weights_may_be_packed_after_some_uses_unless_somebody_has_asked_for_them():
    x = torch.randn(2, 96)
    layer = PackedLinear(linear(), uses=3)
    found = [layer(x) for _ in range(3)]
    assert not layer.is_packed
    found += [layer(x) for _ in range(2)]
    assert layer.is_packed
    for each in found:
        torch.testing.assert_close(each, linear()(x))
    layer = PackedLinear(linear(), uses=3)
    weight = layer.weight
    for _ in range(5):
        layer(x)
    assert layer.weight is weight


def test_weights_are_packed_for_their_first_product_and_reading_them_before_changes_nothing():
    layer, x = PackedLinear(linear()), torch.randn(2, 96)
    assert not layer.is_packed
    layer.state_dict()
    torch.testing.assert_close(layer(x), linear()(x))
    assert layer.is_packed


def test_two_threads_may_pack_a_layer_at_once(monkeypatch: pytest.MonkeyPatch):
    lay_out, both_there = packed._packed, threading.Barrier(2, timeout=20)  # pyright: ignore[reportPrivateUsage]

    def together(weight: Tensor) -> Tensor:
        both_there.wait()
        return lay_out(weight)

    monkeypatch.setattr(packed, "_packed", together)
    layer, x = PackedLinear(linear()), torch.randn(2, 96)

    def product() -> Tensor:
        with torch.no_grad():
            return layer(x)

    with ThreadPoolExecutor(2) as threads:
        found = [each.result() for each in [threads.submit(product) for _ in range(2)]]
    assert layer.is_packed
    for each in found:
        torch.testing.assert_close(each, linear()(x))


def test_another_type_is_packed_again_or_plain():
    _, layer = both()
    assert layer.double().weight.dtype == torch.float64
    _, layer = both()
    again = layer.to(torch.float32)
    assert again.is_packed
    with pytest.raises(RuntimeError):
        layer(torch.randn(2, 96).double())


def test_a_kernel_that_is_missing_or_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch):
    right = packed._product
    reads_packed.cache_clear()
    monkeypatch.setattr(packed, "_product", lambda x, weight, bias: right(x, weight, bias) * 1.01)
    assert not reads_packed(torch.float32)
    reads_packed.cache_clear()
    monkeypatch.setattr(packed, "_product", lambda *_: torch.ops.mkldnn._no_such_product())
    assert not reads_packed(torch.float32)
    module = nn.Sequential(linear())
    pack_layers(module)
    assert type(module[0]) is nn.Linear
    reads_packed.cache_clear()


def test_weights_that_two_modules_share_stay_shared():
    module = nn.ModuleDict({"words": nn.Embedding(160, 96), "head": nn.Linear(96, 160, bias=False), "own": linear()})
    module["head"].weight = module["words"].weight
    pack_layers(module, None, "no module")
    assert module["head"].weight is module["words"].weight
    assert isinstance(module["own"], PackedLinear)


@pytest.mark.parametrize("kind", ["opt", "t5", "t5 untied"])
def test_a_language_model_writes_the_same_with_a_packed_head(kind: str):
    torch.manual_seed(0)
    if kind == "opt":
        made = OPT(OPTConfig(width=64, layers=2, heads=2, mlp_width=128, vocab_size=90, context=32))
    else:
        sizes = {"width": 64, "layers": 2, "heads": 2, "head_width": 32, "mlp_width": 96, "vocab_size": 90}
        made = T5(T5Config(**sizes, tied=kind == "t5"))
    fast = copy.deepcopy(made)
    pack_layers(fast)
    prefix, lengths = torch.randn(3, 5, 64), torch.tensor([5, 2, 4])
    some = torch.tensor([1, 4, 8, 80])
    with torch.no_grad():
        for vocabulary in (None, some, None):
            expected, cache = made.prefill(prefix, lengths, vocabulary)
            found, other = fast.prefill(prefix, lengths, vocabulary)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
            ids = torch.tensor([1, 2, 3])
            torch.testing.assert_close(
                fast.step(ids, other, vocabulary), made.step(ids, cache, vocabulary), rtol=1e-5, atol=1e-5
            )
    again = copy.deepcopy(fast)  # with what the head keeps
    assert torch.equal(again.prefill(prefix, lengths)[0], fast.prefill(prefix, lengths)[0])
    wide = fast.double()
    assert wide.prefill(prefix.double(), lengths)[0].dtype == torch.float64
    targets = torch.tensor([[4, 8], [1, -100], [80, 1]])
    losses = []
    for each in (made.double(), wide):
        x = prefix.double().requires_grad_()
        each.log_probs(x, lengths, targets).sum().backward()
        losses.append(x.grad)
    torch.testing.assert_close(losses[1], losses[0])


def test_a_loaded_model_is_packed_writes_the_same_and_is_saved_as_it_was(tmp_path: Path):
    tiny = build(language=False)
    blip2.weights.save(tmp_path / "first", tiny.config, tiny.bridge, tiny.encoder)
    model = blip2.load(tmp_path / "first", device="cpu", dtype="float32")
    assert isinstance(model.encoder, nn.Module)
    layers = [each for part in (model.encoder, model.bridge) for each in part.modules() if type(each) is PackedLinear]
    assert layers
    assert not any(layer.is_packed for layer in layers)  # until it is used
    torch.testing.assert_close(model.embed_images(picture(0)), tiny.embed_images(picture(0)))
    layers = [layer for layer in layers if layer.is_packed]
    assert layers
    torch.testing.assert_close(model.embed_images(picture(0)), tiny.embed_images(picture(0)))
    assert all(layer.is_packed for layer in layers)  # no verb asks for weights
    model.save(tmp_path / "second")
    assert all(layer.is_packed for layer in layers)
    for name in ("bridge.safetensors", "vision.safetensors"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_weights_are_plain_for_a_while():
    module = nn.Sequential(linear())
    pack_layers(module)
    module(torch.randn(2, 96))
    with plain_weights(module, None):
        assert not module[0].is_packed
    assert module[0].is_packed
    assert unpack_layers(module)
    assert not unpack_layers(module)
    with plain_weights(module):
        pass
    assert not module[0].is_packed


def test_weights_are_held_plain_and_packed_one_layer_at_a_time(monkeypatch: pytest.MonkeyPatch):
    module = nn.Sequential(*(linear() for _ in range(6)))
    plain = [weakref.ref(layer.weight) for layer in module if isinstance(layer, nn.Linear)]
    alive: list[int] = []
    lay_out = packed._packed  # pyright: ignore[reportPrivateUsage]

    def counting(weight: Tensor) -> Tensor:
        alive.append(sum(held() is not None for held in plain))
        return lay_out(weight)

    monkeypatch.setattr(packed, "_packed", counting)
    pack_layers(module)
    for layer in module:
        layer(torch.randn(2, 96))
    assert alive == [6, 5, 4, 3, 2, 1]
    assert all(held() is None for held in plain)


def test_verbs_leave_packed_layers_packed():
    torch.manual_seed(0)
    made = build()
    words = made.writer()[0].vocab_size
    opt = OPT(OPTConfig(width=16, layers=2, heads=2, mlp_width=32, vocab_size=words, context=CONTEXT))
    model = dataclasses.replace(made, language=opt)
    parts = [part for part in (model.encoder, model.bridge, opt) if isinstance(part, nn.Module)]
    pack_layers(*parts)
    layers = [layer for part in parts for layer in part.modules() if isinstance(layer, PackedLinear)]
    assert layers
    for layer in layers:
        layer.pack()
    features = model.encode([picture(0), picture(1)])
    model.caption(features, num_beams=3, max_new_tokens=4)
    model.ask(features[:1], ["what ?", "why ?"], max_new_tokens=4)
    model.ask(features, "what ?", choices=["yes", "no"])
    model.chat(picture(0)).say("what ?")
    model.match(features, ["a dog", "a cat"])
    "".join(model.caption(picture(0), stream=True, max_new_tokens=4))
    assert all(layer.is_packed for layer in layers)
