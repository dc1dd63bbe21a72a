"""int4 weights as CUDA reads them: what torch's operators are given, and what is made of what they give.

No CPU has the two operators. They stand here as torch documents them beside their code for CUDA
(`aten/src/ATen/native/cuda/int4mm.cu`): where a lane finds each of its inputs, one at a time. What the fastest path
does with them is compared with the weights made plain; on a machine with a GPU the same is asked of the real ones.
"""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import tiny_model
from blip2.config import OPTConfig
from blip2.kernels import tuned
from blip2.model.opt import OPT
from blip2.quantize import int4, int8, quantize_layers, quantized
from blip2.quantize.int4 import BLOCKS, GROUP, MANY, Int4Linear, by_tiles, plain_int4, reads_tiles, to_int4, to_tiles
from blip2.weights.placement import Memory

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LANES = 32
NIBBLES = (
    (3, 0),
    (2, 0),
    (1, 0),
    (0, 0),
    (3, 1),
    (2, 1),
    (1, 1),
    (0, 1),
)  # byte, and 1 for its upper half; highest first


def bytes_of(lane: int, word: int, outer: int, tiles: int) -> tuple[int, int, int, int]:
    """Which bytes of an output a lane's word holds: each is two inputs."""
    first = (outer * tiles + 2 * word) * 8 + lane % 4
    return first, first + 4, first + 8, first + 12


def convert(pairs: Tensor, tiles: int) -> Tensor:
    """`_convert_weight_to_int4pack`: uint8[N, K/2], the first of two inputs in the upper half, to int32 words."""
    assert pairs.dtype == torch.uint8
    assert pairs.is_contiguous()
    outputs, inputs = pairs.shape[0], 2 * pairs.shape[1]
    assert inputs % (16 * tiles) == 0
    made = torch.zeros(outputs // 8, inputs // (16 * tiles), LANES, tiles // 2, dtype=torch.int64)
    for outer in range(made.shape[1]):
        for lane in range(LANES):
            for word in range(tiles // 2):
                places = bytes_of(lane, word, outer, tiles)
                for byte, upper in NIBBLES:
                    value = pairs[lane // 4 :: 8, places[byte]].long() >> 4 * upper & 15
                    made[:, outer, lane, word] = made[:, outer, lane, word] << 4 | value
    return (made & 0xFFFFFFFF).to(torch.int32)


def multiply(x: Tensor, packed: Tensor, group: int, scale: Tensor) -> Tensor:
    """`_weight_int4pack_mm`: a weight is (level - 8) * scale + zero, in bfloat16; scales and zeros [G, N, 2]."""
    assert (x.dtype, packed.dtype, scale.dtype) == (torch.bfloat16, torch.int32, torch.bfloat16)
    assert x.is_contiguous()
    count, across, _, words = packed.shape
    tiles, inputs = 2 * words, across * words * 32
    assert x.shape[1] == inputs
    assert tuple(scale.shape) == (inputs // group, 8 * count, 2)
    levels = torch.zeros(8 * count, inputs)
    for outer in range(across):
        for lane in range(LANES):
            for word in range(words):
                value = packed[:, outer, lane, word].long()
                places = bytes_of(lane, word, outer, tiles)
                for turn, (byte, upper) in enumerate(reversed(NIBBLES)):
                    levels[lane // 4 :: 8, 2 * places[byte] + 1 - upper] = (value >> 4 * turn & 15).float()
    width, zero = scale.float().repeat_interleave(group, 0).unbind(-1)  # (K, N)
    weight = ((levels.T - 8) * width + zero).bfloat16()
    return (x.float() @ weight.float()).bfloat16()


@pytest.fixture
def operators(monkeypatch: pytest.MonkeyPatch):
    """A CPU with CUDA's operators, and layers that are laid out for them."""
    monkeypatch.setattr(torch.ops.aten, "_convert_weight_to_int4pack", convert)
    monkeypatch.setattr(torch.ops.aten, "_weight_int4pack_mm", multiply)
    monkeypatch.setattr(Int4Linear, "laid_out_on", "cpu")
    monkeypatch.setattr(int4, "reads_tiles", lambda _: True)
    reads_tiles.cache_clear()
    yield
    reads_tiles.cache_clear()


def linear(outputs: int = 128, inputs: int = 384) -> nn.Linear:
    torch.manual_seed(2)
    layer = nn.Linear(inputs, outputs).requires_grad_(False)
    layer.weight[9] = 0
    return layer


def layer_for(device: torch.device, *sides: int) -> Int4Linear:
    layer = quantized(linear(*sides), linear(*sides).weight, "int4", device)
    assert isinstance(layer, Int4Linear)
    return layer


def plain(layer: Int4Linear) -> Tensor:
    return torch.cat(list(layer.plain(torch.float32)))


def activations(rows: int, inputs: int = 384) -> Tensor:
    x = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(rows))
    x[:, 3] *= 60
    return x


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


@pytest.mark.usefixtures("operators")
@pytest.mark.parametrize("sides", [(128, 384), (192, 192)])  # eight tiles beside each other, and four
def test_weights_in_tiles_give_the_same_and_come_back_as_they_were(sides: tuple[int, int]):
    """Tolerance: weights and sums are rounded to bfloat16, as by the CPU's kernel in test_quantize."""
    layer, packed = layer_for(CUDA, *sides), layer_for(CUDA, *sides)
    packed.pack()
    assert packed._packed is not None
    assert "weight" not in packed._buffers
    assert torch.equal(packed.weight, layer.weight)
    assert torch.equal(plain(packed), plain(layer))
    for rows in (1, 5, 40, MANY + 1):
        x = activations(rows, sides[1])
        assert relative(packed(x), F.linear(x, plain(layer), layer.bias)) < 1e-2
    assert packed(activations(2, sides[1]).bfloat16()).dtype == torch.bfloat16
    assert torch.equal(packed(activations(6, sides[1]))[2], packed(activations(6, sides[1])[2:3])[0])
    for same in (copy.deepcopy(packed), packed.to(torch.float32)):
        assert torch.equal(same.weight, layer.weight)
        assert relative(same(activations(3, sides[1])), packed(activations(3, sides[1]))) < 1e-2
    state = packed.state_dict()
    assert torch.equal(state["weight"], layer.weight)


@pytest.mark.usefixtures("operators")
def test_few_rows_are_multiplied_in_tiles_and_many_by_plain_weights(monkeypatch: pytest.MonkeyPatch):
    layer, seen = layer_for(CUDA), list[int]()
    layer.pack()

    def counted(x: Tensor, packed: Tensor, group: int, scale: Tensor) -> Tensor:
        seen.append(len(x))
        return multiply(x, packed, group, scale)

    monkeypatch.setattr(torch.ops.aten, "_weight_int4pack_mm", counted)
    for rows in (1, MANY, MANY + 1):
        layer(activations(rows))
    layer(activations(3).requires_grad_()).sum().backward()
    assert seen == [1, MANY]


@pytest.mark.usefixtures("operators")
def test_the_operators_are_used_where_they_are_right_only(monkeypatch: pytest.MonkeyPatch):
    assert reads_tiles("cpu")

    def swapped(pairs: Tensor, tiles: int) -> Tensor:
        return convert((pairs << 4) | (pairs >> 4), tiles)

    def other_zero(x: Tensor, packed: Tensor, group: int, scale: Tensor) -> Tensor:
        width, zero = scale.unbind(-1)
        return multiply(x, packed, group, torch.stack([width, zero - 8 * width], -1))

    for name, wrong in (("_convert_weight_to_int4pack", swapped), ("_weight_int4pack_mm", other_zero)):
        with monkeypatch.context() as change:
            change.setattr(torch.ops.aten, name, wrong)
            reads_tiles.cache_clear()
            assert not reads_tiles("cpu")


def test_without_the_operators_weights_stay_as_they_are(monkeypatch: pytest.MonkeyPatch):
    reads_tiles.cache_clear()
    assert not reads_tiles("cpu")
    monkeypatch.setattr(Int4Linear, "laid_out_on", "cpu")
    monkeypatch.setattr(int4, "reads_tiles", lambda _: False)
    layer = layer_for(CUDA)
    layer.pack()
    assert layer._packed is None
    x = activations(5)
    assert relative(layer(x), F.linear(x, plain(layer), layer.bias)) < 1e-6
    monkeypatch.setattr(int4, "reads_tiles", lambda _: True)
    on_a_cpu = layer_for(CPU)  # which has a layout of its own
    on_a_cpu.pack()
    assert on_a_cpu._packed is None


def test_what_the_operators_are_given_has_the_shapes_and_types_that_torch_asks_for():
    for inputs in (384, 192):
        weight, scale = to_int4(linear(128, inputs).weight, BLOCKS[0])
        with FakeTensorMode() as fake:
            packed = to_tiles(fake.from_tensor(weight))
            found = by_tiles(torch.empty(3, inputs), packed, fake.from_tensor(scale))
        tiles = 8 if inputs % 128 == 0 else 4
        assert (packed.dtype, tuple(packed.shape)) == (torch.int32, (16, inputs // (16 * tiles), LANES, tiles // 2))
        assert (found.dtype, tuple(found.shape)) == (torch.bfloat16, (3, 128))


@pytest.mark.usefixtures("operators")
def test_levels_scales_and_zeros_are_those_of_the_plain_weights():
    weight, scale = to_int4(linear().weight, BLOCKS[0])
    eye = torch.eye(384).bfloat16()  # a row for each input gives the weights themselves
    found = multiply(eye, to_tiles(weight), GROUP, scale).float().T
    exact = torch.cat(list(plain_int4(weight, scale, torch.float32)))
    assert (found - exact).abs().max() <= 2**-8 * exact.abs().max()  # rounded once to bfloat16


@pytest.mark.usefixtures("operators")
@torch.no_grad()
def test_a_model_on_a_gpu_is_laid_out_when_it_is_loaded(monkeypatch: pytest.MonkeyPatch):
    """Tolerance: the head is int8, which loses 0.8% of normal weights; 0.0104 was seen with sums in bfloat16."""
    monkeypatch.setattr(int8, "multiplies_whole_numbers", lambda _: False)
    torch.manual_seed(0)
    language = OPT(OPTConfig(width=128, layers=2, heads=2, mlp_width=256, vocab_size=len(tiny_model.WORDS), context=64))
    for parameter in language.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.1)
    quantize_layers(language, "int4", CUDA)
    prefix, lengths = torch.randn(2, 9, 128), torch.tensor([9, 5])
    expected = language.prefill(prefix, lengths)[0]
    model = dataclasses.replace(tiny_model.build(), language=language, device=CUDA)
    tuned(model, Memory("int4"))
    layers = [child for child in language.modules() if isinstance(child, Int4Linear)]
    assert layers
    assert all(layer._packed is not None for layer in layers)
    assert language.make_head is not None
    assert 0 < relative(language.prefill(prefix, lengths)[0], expected) < 2e-2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="GPU")
def test_on_a_gpu_the_real_operators_do_as_those_here():
    weight, scale = (each.to(CUDA) for each in to_int4(linear().weight, BLOCKS[0]))
    if not reads_tiles("cuda"):
        pytest.skip("this GPU has no such operators")
    pairs = torch.randint(0, 256, (64, 192), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    real = torch.ops.aten._convert_weight_to_int4pack(pairs.to(CUDA), 8)
    assert torch.equal(real.cpu(), convert(pairs, 8))
    layer = layer_for(CUDA)
    layer.weight, layer.scale, layer.bias = weight, scale, None
    layer.pack()
    x = activations(5).to(CUDA)
    assert relative(layer(x), x @ plain(layer).T) < 1e-2
