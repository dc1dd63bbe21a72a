"""int8 and int4 weights: right whatever multiplies them, outliers kept, rows apart, gradients there.

Tolerances: int8 activations are two halves, 16 bits of a row's largest value: 1e-3 where an outlier is 60 times the
rest. The other kernels sum in bfloat16: 1e-2.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip2 import products, quantize
from blip2.config import OPTConfig
from blip2.device import passes
from blip2.errors import ConfigError
from blip2.model.opt import OPT
from blip2.quantize import half as half_weights
from blip2.quantize import int4, int8, quantized
from blip2.quantize.int4 import GROUP, Int4Linear
from blip2.quantize.int8 import Int8Linear
from blip2.quantize.linear import QuantLinear

CPU = torch.device("cpu")
DEVICES = [
    CPU,
    pytest.param(torch.device("cuda"), marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="GPU")),
]
OUTLIERS = {3: 60.0, 40: 45.0, 101: 50.0}  # channels, and how many times the rest


@pytest.fixture(params=["as found", "plain"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With what this machine multiplies with, and with nothing but plain weights."""
    if request.param == "plain":
        monkeypatch.setattr(int8, "multiplies_whole_numbers", lambda _: False)
        monkeypatch.setattr(int8, "reads_int8", lambda: False)
        for module in (int4, quantize):
            monkeypatch.setattr(module, "reads_int4", lambda: None)
        monkeypatch.setattr(half_weights, "multiplies_half", lambda: False)
    return request.param


def linear(outputs: int = 192, inputs: int = 128, *, bias: bool = True) -> nn.Linear:
    torch.manual_seed(2)
    layer = nn.Linear(inputs, outputs, bias=bias).requires_grad_(False)
    layer.weight[7] *= 30  # an output channel of its own size
    layer.weight[9] = 0
    return layer


def activations(rows: int, inputs: int = 128, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(rows))
    for channel, times in OUTLIERS.items():
        x[:, channel] *= times
    return x.to(dtype)


def weights(layer: QuantLinear) -> Tensor:
    return torch.cat(list(layer.plain(torch.float32)))


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("scheme", "tolerance"), [("int8", 1e-3), ("int4", 1e-2), ("half", 1e-6), ("fp8", 1e-2)])
@pytest.mark.parametrize("rows", [1, 5, 40, 257])
def test_activations_with_outliers_meet_the_coarse_weights_themselves(
    kernels: str, scheme: quantize.Scheme, tolerance: float, rows: int, device: torch.device
):
    layer = quantized(linear().to(device), linear().weight.to(device), scheme, device)
    x = activations(rows).to(device)
    expected = F.linear(x, weights(layer), layer.bias)
    assert relative(layer(x), expected) < (tolerance if kernels == "as found" else 1e-2)
    half = layer(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert relative(half, expected) < 1e-2


def test_int8_is_half_a_step_of_each_output_channel_and_int4_of_each_group():
    plain = linear().weight
    eight, four = (quantized(linear(), plain, scheme, CPU) for scheme in ("int8", "int4"))
    assert isinstance(eight, Int8Linear)
    assert isinstance(four, Int4Linear)
    step = plain.abs().amax(1) / 127
    assert ((weights(eight) - plain).abs() <= step[:, None] * 0.501).all()
    groups = plain.view(len(plain), -1, GROUP)
    step = (groups.amax(2) - groups.amin(2)) / 15
    error = (weights(four).view_as(groups) - groups).abs()
    assert (error <= step[..., None] * 0.58 + 1e-9).all()  # scale and zero are rounded to bfloat16: 2**-8 of 8 steps
    assert (weights(eight)[9] == 0).all()
    assert (weights(four)[9].abs() < 1e-30).all()


def test_a_row_does_not_depend_on_its_neighbours(kernels: str):
    layer = quantized(linear(), linear().weight, "int8", CPU)
    x = activations(6)
    together = layer(x)
    x[1:] *= 1000
    if kernels == "as found" and products.multiplies_whole_numbers("cpu"):
        assert torch.equal(layer(x)[0], together[0])  # sums of whole numbers, the same in any batch
    torch.testing.assert_close(layer(x)[0], together[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scheme", quantize.SCHEMES)
def test_the_gradient_is_that_of_the_plain_weights(scheme: quantize.Scheme):
    layer = quantized(linear(), linear().weight, scheme, CPU)
    x = activations(5).requires_grad_()
    layer(x).square().sum().backward()
    assert x.grad is not None
    y = activations(5).requires_grad_()
    F.linear(y, weights(layer), layer.bias).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-5, atol=1e-3)  # some 800 large; summed in pieces


def test_int4_takes_int8_where_its_groups_do_not_fit():
    assert isinstance(quantized(linear(192, 100), linear(192, 100).weight, "int4", CPU), Int8Linear)
    assert isinstance(quantized(linear(100, 128), linear(100, 128).weight, "int4", CPU), Int8Linear)


def test_size_counts_what_lies_in_memory():
    for scheme in quantize.SCHEMES:
        for shape in ((192, 128), (100, 128)):
            layer = quantized(linear(*shape, bias=False), linear(*shape).weight, scheme, CPU)
            size = sum(tensor.nbytes for tensor in layer.state_dict().values())
            assert quantize.coarse_size(torch.Size(shape), scheme) == size


def test_nan_and_infinity_are_not_hidden():
    layer = quantized(linear(), linear().weight, "int8", CPU)
    for value in (float("nan"), float("inf")):
        x = activations(3)
        x[1, 5] = value
        found = layer(x)
        assert not found[1].isfinite().any()
        assert found[[0, 2]].isfinite().all()


def test_a_kernel_that_is_missing_or_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch):
    def missing() -> bool:
        return torch.ops.aten._no_such_kernel(torch.zeros(1))

    assert not passes(missing)
    assert passes(lambda: True)
    right = torch.ops.aten._int_mm
    products.multiplies_whole_numbers.cache_clear()
    monkeypatch.setattr(torch.ops.aten, "_int_mm", lambda x, y: right(x, y).clamp(-(2**15), 2**15 - 1))
    assert not products.multiplies_whole_numbers("cpu")
    products.multiplies_whole_numbers.cache_clear()


def test_few_rows_by_the_kernel_of_cpus_without_vnni(monkeypatch: pytest.MonkeyPatch):
    if not products.reads_int8():
        pytest.skip("this torch has no such kernel")
    monkeypatch.setattr(int8, "multiplies_whole_numbers", lambda _: False)
    layer = quantized(linear(), linear().weight, "int8", CPU)
    for rows in (int8.FEW, int8.FEW + 1):
        x = activations(rows)
        assert relative(layer(x), F.linear(x, weights(layer), layer.bias)) < 1e-2


@pytest.fixture(params=["oneDNN", "fbgemm"])
def packs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """One way of packing after the other, of those that are exact here."""
    kind = next((each for each in products.packings() if each.name == request.param), None)
    if kind is None:
        pytest.skip(f"{request.param} has no packed product that is exact here")
    monkeypatch.setattr(int8, "packing", lambda: kind)


@pytest.mark.usefixtures("packs")
def test_packed_weights_give_the_same_and_come_back_as_they_were():
    layer, packed = (quantized(linear(), linear().weight, "int8", CPU) for _ in range(2))
    assert isinstance(packed, Int8Linear)
    packed.pack()
    for rows in (1, 5, 40, 257):
        x = activations(rows)
        assert relative(packed(x), layer(x)) < 1e-6
    assert torch.equal(packed(activations(6))[2], packed(activations(6)[2:3])[0])
    assert torch.equal(packed.weight, layer.weight)
    assert {name: tensor.shape for name, tensor in packed.state_dict().items()} == {
        name: tensor.shape for name, tensor in layer.state_dict().items()
    }
    x = activations(3).requires_grad_()
    y = activations(3).requires_grad_()
    layer(x).sum().backward()
    packed(y).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    for same in (copy.deepcopy(packed), packed.to(torch.float32)):
        assert torch.equal(same.weight, layer.weight)
        assert relative(same(activations(5)), layer(activations(5))) < 1e-6


@pytest.mark.parametrize("kernel", [True, False])
def test_half_weights_are_those_of_a_bfloat16_checkpoint_and_large_ones_are_cut(
    kernel: bool, monkeypatch: pytest.MonkeyPatch
):
    if kernel and not products.multiplies_half():
        pytest.skip("this torch has no product with float16 weights")
    monkeypatch.setattr(half_weights, "multiplies_half", lambda: kernel)
    plain = linear().bfloat16()
    layer = quantized(plain, plain.weight, "half", CPU)
    layer.pack()
    assert (layer._packed is not None) == kernel
    assert (weights(layer) - plain.weight.float()).abs().max() <= 3e-8
    for rows in (1, 5, 40):
        x = activations(rows)
        assert relative(layer(x), F.linear(x, weights(layer), plain.bias.float())) < 1e-6
    assert copy.deepcopy(layer)._packed is None
    large = quantized(plain, plain.weight * 1e6, "half", CPU)
    assert weights(large).isfinite().all()


def test_even_rows_in_one_half_err_as_much_as_weights_do_and_uneven_ones_less():
    """A step is a largest value over 127: uniform within it, 6 / 127 / sqrt(12) = 1.4% of the root mean square."""
    layer = quantized(linear(), linear().weight, "int8", CPU)
    assert isinstance(layer, Int8Linear)
    layer.one_half = True
    layer.pack()
    assert layer._packed is None
    x = torch.randn(50, 128, generator=torch.Generator().manual_seed(0))
    x[::2] = activations(25)
    expected = F.linear(x, weights(layer), layer.bias)
    errors = (layer(x) - expected).norm(dim=1) / expected.norm(dim=1)
    assert errors[::2].max() < 1e-3
    assert errors[1::2].mean() < (0.014 if products.multiplies_whole_numbers("cpu") else 1e-2)
    assert torch.equal(layer(x[7:9]), layer(x)[7:9])


def test_a_head_of_few_or_all_words_is_coarse_and_its_embeddings_are_not():
    model = OPT(OPTConfig(width=64, layers=1, heads=2, mlp_width=64, vocab_size=90, context=32))
    nn.init.normal_(model.words.weight)
    hidden, some = torch.randn(3, 64), torch.tensor([2, 50, 80])
    plain = model.logits(hidden), model.logits(hidden, some)
    words = model.words.weight.clone()
    quantize.quantize_head(model, CPU)
    with torch.no_grad():
        for found, exact in zip((model.logits(hidden), model.logits(hidden, some)), plain, strict=True):
            assert 0 < relative(found, exact) < 0.01
    assert torch.equal(model.words.weight, words)


def test_a_head_of_pieces_is_the_head_in_one_piece(monkeypatch: pytest.MonkeyPatch):
    words, hidden = linear(150, 64).weight, activations(3)[:, :64]
    whole = quantize._int8_head(words, CPU)(hidden)
    monkeypatch.setattr(quantize, "HEAD_AT_ONCE", 64 * 40)
    assert torch.equal(quantize._int8_head(words, CPU)(hidden), whole)


def test_only_linear_layers_in_blocks_become_coarse():
    module = nn.ModuleDict({"head": linear(), "layers": nn.ModuleList([nn.ModuleDict({"up": linear()})])})
    quantize.quantize_layers(module, "int8", CPU)
    kinds = {name: type(child) for name, child in module.named_modules() if name.endswith(("head", "up"))}
    assert kinds == {"head": nn.Linear, "layers.0.up": Int8Linear}


def test_an_unknown_scheme_lists_the_known():
    with pytest.raises(ConfigError, match="quantize 'int3' is none; use int8, fp8, int4, half"):
        quantize.check_scheme("int3", CPU)
    assert quantize.check_scheme(None, CPU) is None
