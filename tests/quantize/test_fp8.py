"""8-bit floating-point weights: right where they are multiplied as such, by torch's own product, which CPUs have too.

A layer for CUDA whose tensors lie here multiplies as it would there. Tolerances: sums come out in bfloat16, twice 2^-9
of them at most, and two halves of activations leave 2^-8 of a number at most: 0.0024 was seen, 0.004 is allowed. One
half leaves 2^-4 at most, 0.036 in the mean where that is uniform.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import tiny_model
from blip2 import quantize
from blip2.blip2 import Blip2
from blip2.config import OPTConfig
from blip2.errors import ConfigError
from blip2.model import prefix
from blip2.model.opt import OPT
from blip2.quantize import fp8, quantize_layers, quantized
from blip2.quantize.fp8 import E4M3, Fp8Linear, by_fp8, multiplies_fp8, to_fp8
from blip2.quantize.linear import QuantLinear

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
TWO, ONE = 0.004, 0.036
OUTLIERS = {3: 60.0, 40: 45.0, 101: 50.0}  # channels, and how many times the rest


@pytest.fixture
def multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers for CUDA multiply e4m3 numbers as this CPU does."""
    if not multiplies_fp8("cpu"):
        pytest.skip("this torch has no such product on a CPU")
    monkeypatch.setattr(fp8, "multiplies_fp8", lambda _: True)


def linear(outputs: int = 192, inputs: int = 128) -> nn.Linear:
    torch.manual_seed(2)
    layer = nn.Linear(inputs, outputs).requires_grad_(False)
    layer.weight[7] *= 30
    layer.weight[9] = 0
    return layer


def layer_for(device: torch.device) -> Fp8Linear:
    layer = quantized(linear(), linear().weight, "fp8", device)
    assert isinstance(layer, Fp8Linear)
    return layer


def activations(rows: int) -> Tensor:
    x = torch.randn(rows, 128, generator=torch.Generator().manual_seed(rows))
    for channel, times in OUTLIERS.items():
        x[:, channel] *= times
    return x


def exact(layer: QuantLinear, x: Tensor, *, bias: bool = True) -> Tensor:
    return F.linear(x, torch.cat(list(layer.plain(torch.float32))), layer.bias if bias else None)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def test_a_weight_keeps_four_bits_and_a_channel_of_zeros_is_zero():
    plain = linear().weight
    coarse, scale = to_fp8(plain)
    found = coarse.view(E4M3).float() * scale[:, None]
    least = 2.0**-10 * scale[:, None]  # half a step of the smallest numbers
    assert ((found - plain).abs() <= torch.maximum(plain.abs() / 16, least) * 1.001).all()
    assert (found[9] == 0).all()
    assert torch.equal(found.abs().amax(1)[:9], plain.abs().amax(1)[:9])  # 448 of 448


@pytest.mark.usefixtures("multiplied")
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_two_halves_of_activations_lose_nothing_that_counts_and_one_as_much_as_weights(rows: int):
    layer = layer_for(CUDA)
    for size in (1.0, 1e-15, 1e15):
        x = activations(rows) * size
        assert 0 < relative(layer.product(x), exact(layer, x, bias=False)) < TWO
    half = layer(activations(rows).bfloat16())
    assert half.dtype == torch.bfloat16
    assert relative(half, exact(layer, activations(rows).bfloat16().float())) < TWO
    layer.one_half = True
    error = relative(layer(activations(rows)), exact(layer, activations(rows)))
    assert TWO < error < ONE


def test_on_a_cpu_and_where_sides_do_not_fit_weights_are_made_plain(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fp8, "multiplies_fp8", lambda _: True)
    assert relative(layer_for(CPU)(activations(5)), exact(layer_for(CPU), activations(5))) < 1e-6
    for shape in ((192, 120), (200, 128)):
        layer = quantized(linear(*shape), linear(*shape).weight, "fp8", CUDA)
        x = torch.randn(3, shape[1], generator=torch.Generator().manual_seed(0))
        assert relative(layer(x), exact(layer, x)) < 1e-6


@pytest.mark.usefixtures("multiplied")
def test_rows_are_apart_zeros_stay_zeros_and_what_is_no_number_is_seen():
    layer = layer_for(CUDA)
    x = activations(6)
    x[4] = 0
    together = layer(x)
    assert layer.bias is not None
    assert torch.equal(together[4], layer.bias)
    changed = x.clone()
    changed[1:] *= 1000
    torch.testing.assert_close(layer(changed)[0], together[0], rtol=1e-5, atol=1e-5)
    for value in (float("nan"), float("inf")):
        changed = x.clone()
        changed[1, 5] = value
        found = layer(changed)
        assert not found[1].isfinite().any()
        assert torch.equal(found[[0, 2, 3, 4, 5]], together[[0, 2, 3, 4, 5]])


@pytest.mark.usefixtures("multiplied")
def test_the_gradient_is_that_of_the_plain_weights_where_they_are_multiplied_as_they_are():
    layer = layer_for(CUDA)
    x, y = activations(5).requires_grad_(), activations(5).requires_grad_()
    layer(x).square().sum().backward()
    exact(layer, y).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


@pytest.mark.usefixtures("multiplied")
def test_a_change_of_type_copies_and_saving_keep_the_bits():
    layer = layer_for(CUDA)
    bits = layer.weight.clone()
    for same in (copy.deepcopy(layer), copy.deepcopy(layer).to(torch.bfloat16), copy.deepcopy(layer).half()):
        assert same.weight.dtype == torch.int8
        assert torch.equal(same.weight, bits)
        assert relative(same(activations(5)), exact(layer, activations(5))) < 2 * TWO  # scales in 16 bits
    again = layer_for(CUDA)
    again.weight.zero_()
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(activations(3)), layer(activations(3)))


@pytest.mark.parametrize("one", [False, True])
@pytest.mark.parametrize("rows", [1, 5, 257])
def test_what_the_product_is_given_has_the_shapes_and_strides_that_cuda_asks_for(
    rows: int, one: bool, monkeypatch: pytest.MonkeyPatch
):
    real = torch.ops.aten._scaled_mm

    def checked(*given: Tensor, **more: torch.dtype) -> Tensor:
        """What torch checks for CUDA, without a value."""
        with FakeTensorMode(), monkeypatch.context() as change:
            change.setattr(torch.ops.aten, "_scaled_mm", real)  # torch looks it up itself
            there = (torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=CUDA) for x in given)
            found = real(*there, **more)
        return torch.zeros(found.shape, dtype=found.dtype)

    monkeypatch.setattr(torch.ops.aten, "_scaled_mm", checked)
    weight, scale = torch.zeros(192, 128, dtype=torch.int8), torch.ones(192)
    for x in (torch.randn(rows, 128), torch.randn(128, rows).bfloat16().T):
        found = by_fp8(x, weight, scale, one=one)
        assert (tuple(found.shape), found.dtype) == ((rows, 192), torch.bfloat16)
    with pytest.raises(RuntimeError, match="divisible by 16"):  # it does check
        by_fp8(torch.randn(rows, 120), weight[:, :120].contiguous(), scale, one=one)


def test_a_product_that_is_missing_or_leaves_out_a_scale_is_not_used(monkeypatch: pytest.MonkeyPatch):
    right = torch.ops.aten._scaled_mm

    def unscaled(x: Tensor, w: Tensor, over: Tensor, across: Tensor, **more: torch.dtype) -> Tensor:
        return right(x, w, over, torch.ones_like(across), **more)

    def refusing(*_: object, **__: object) -> Tensor:
        raise RuntimeError("Only devices with compute capability 8.9 and newer")

    for wrong in (unscaled, refusing):
        multiplies_fp8.cache_clear()
        monkeypatch.setattr(torch.ops.aten, "_scaled_mm", wrong)
        assert not multiplies_fp8("cpu")
    multiplies_fp8.cache_clear()


def test_a_device_without_such_numbers_is_told_what_to_use(monkeypatch: pytest.MonkeyPatch):
    assert quantize.check_scheme("fp8", CPU) == "fp8"
    monkeypatch.setattr(quantize, "holds_fp8", lambda _: False)
    assert quantize.check_scheme("int8", CPU) == "int8"
    with pytest.raises(ConfigError, match="quantize 'fp8': mps has no such numbers; use int8"):
        quantize.check_scheme("fp8", torch.device("mps"))


# -- whole models ------------------------------------------------------------------------------------------------------


def coarse_model(device: torch.device) -> Blip2:
    model = tiny_model.build()
    for part in (model.encoder, model.language):
        assert isinstance(part, nn.Module)
        quantize_layers(part, "fp8", device)
        assert any(isinstance(child, Fp8Linear) for child in part.modules())
    return model


def read(model: Blip2, written: list[list[int]]) -> Tensor:
    """Logits of every next word of texts about pictures, one after another: float[words, V]."""
    language, tokenizer = model.writer()
    rows: list[Tensor] = []
    for number, ids in enumerate(written):
        visual = model.bridge.project(model.encode(tiny_model.picture(number)).queries)
        prompts = tokenizer.prompts([model.config.prompts.caption])
        embeds, lengths = prefix.build(language, visual, prompts, tokenizer.bos, model.config.prompts.visual)
        logits, cache = language.prefill(embeds, lengths)
        rows += [logits, *(language.step(torch.tensor([token]), cache) for token in ids[:-1])]
    return torch.cat(rows)


@pytest.mark.usefixtures("multiplied")
@torch.inference_mode()
def test_a_model_chooses_the_same_words_with_weights_multiplied_and_made_plain():
    """Words that lead by more than what the sums in bfloat16 may move them: 2% of the largest logit."""
    plain, multiplied = coarse_model(CPU), coarse_model(CUDA)
    found = plain.caption([tiny_model.picture(number) for number in range(8)], num_beams=1, details=True)
    written = [list(each.ids) for each in found]
    expected, logits = read(plain, written), read(multiplied, written)
    moved = 0.02 * float(expected[expected.isfinite()].abs().max())
    assert 0 < float((logits - expected).abs().max()) < moved
    first, second = expected.topk(2).values.unbind(-1)
    clear = first - second > 2 * moved
    assert clear.float().mean() > 0.5
    assert torch.equal(logits.argmax(-1)[clear], expected.argmax(-1)[clear])


def with_outliers() -> OPT:
    """A model whose norms give outliers in the same channels, as those of large ones do."""
    torch.manual_seed(0)
    made = OPT(OPTConfig(width=256, layers=2, heads=4, mlp_width=1024, vocab_size=512, context=64))
    for name, parameter in made.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.02)
        elif name.endswith("norm.weight") and name != "norm.weight":
            for channel, times in OUTLIERS.items():
                parameter[channel] = times
    return made


@pytest.mark.usefixtures("multiplied")
@torch.no_grad()
def test_logits_err_more_than_in_int8_less_than_in_int4_and_multiplied_as_little_as_made_plain():
    """Normal weights lose 2.6% in e4m3, 0.8% in int8, 9% in int4: the same order in the logits."""
    prefix, lengths = torch.randn(2, 20, 256, generator=torch.Generator().manual_seed(1)), torch.tensor([20, 13])
    expected = with_outliers().prefill(prefix, lengths)[0]

    def error(scheme: quantize.Scheme, device: torch.device = CPU, *, one: bool = False) -> float:
        model = with_outliers()
        quantize_layers(model, scheme, device)
        for child in model.modules():
            if isinstance(child, Fp8Linear):
                child.one_half = one
        return relative(model.prefill(prefix, lengths)[0], expected)

    plain, multiplied = error("fp8"), error("fp8", CUDA)
    assert error("int8") < plain < error("int4")
    assert multiplied < 1.1 * plain
    assert multiplied < error("fp8", CUDA, one=True) < 2 * plain


def test_a_product_of_another_layout_in_memory_is_the_same():
    if not multiplies_fp8("cpu"):
        pytest.skip("this torch has no such product on a CPU")
    coarse, scale = to_fp8(linear().weight)
    x = activations(7)
    for one in (False, True):
        columns = x.T.contiguous().T
        assert torch.equal(by_fp8(columns, coarse, scale, one=one), by_fp8(x, coarse, scale, one=one))
