"""Loading with coarse weights, in float16, and with blocks elsewhere: the same model, where it was asked to lie."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import blip2
from blip2 import packed
from blip2.blip2 import Blip2
from blip2.config import Blip2Config, OPTConfig, QFormerConfig, T5Config, VisionConfig
from blip2.errors import CheckpointError, ConfigError
from blip2.kernels import tuned
from blip2.model.bridge import Bridge
from blip2.model.opt import OPT
from blip2.model.t5 import T5
from blip2.model.vision import VisionTransformer
from blip2.quantize import SCHEMES, quantize_layers
from blip2.quantize.fp8 import Fp8Linear
from blip2.quantize.half import HalfLinear
from blip2.quantize.int4 import Int4Linear
from blip2.quantize.int8 import Int8Linear
from blip2.quantize.linear import QuantLinear
from blip2.weights import fill, placement, transformers
from blip2.weights.placement import DISK, Home, Memory, plan
from blip2.weights.skeleton import skeleton
from tiny_model import build, picture, tokenizer

VISION = VisionConfig(image_size=28, patch_size=7, width=64, layers=2, heads=2, mlp_width=128)
QFORMER = QFormerConfig(width=16, layers=2, heads=2, mlp_width=32, queries=4, encoder_width=64, text=False)
LANGUAGES = {
    "opt": OPTConfig(width=64, layers=3, heads=2, mlp_width=128, vocab_size=26, context=64),
    "t5": T5Config(width=64, layers=2, heads=2, head_width=32, mlp_width=128, vocab_size=26),
}
CPU, FIRST, SECOND = torch.device("cpu"), torch.device("cuda", 0), torch.device("cuda", 1)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BLIP2_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def made(kind: str) -> Blip2:
    """A model of made-up weights, its blocks wide enough for int4."""
    config = Blip2Config(vision=VISION, qformer=QFORMER, language=LANGUAGES[kind], heads=False)
    torch.manual_seed(1)
    language = transformers.build_language(LANGUAGES[kind])
    bridge, vision = Bridge(config).eval(), VisionTransformer(VISION).eval()
    for module in (bridge, vision, language):
        for parameter in module.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.1)
    return Blip2(config, vision, bridge, language, tokenizer(), None, CPU)


@pytest.fixture(scope="module", params=LANGUAGES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp(request.param)
    transformers.save(made(request.param), place)
    return place


@torch.no_grad()
def logits(model: Blip2) -> Tensor:
    features = model.encode([picture(0), picture(1)])
    assert model.language is not None
    return model.language.prefill(model.bridge.project(features.queries), torch.tensor([4, 3]))[0]


def load(folder: Path, **options: Any) -> Blip2:
    return blip2.load(folder, **{"device": "cpu", "dtype": "float32", **options})


def kinds(model: Blip2) -> set[type]:
    """Of the linear layers in blocks."""
    return {
        type(child)
        for part in (model.encoder, model.language)
        if isinstance(part, nn.Module)
        for name, child in part.named_modules()
        if isinstance(child, nn.Linear | QuantLinear) and any(step.isdigit() for step in name.split("."))
    }


@pytest.mark.parametrize(
    ("scheme", "kind", "error"),
    [("int8", Int8Linear, 0.01), ("fp8", Fp8Linear, 0.01), ("int4", Int4Linear, 0.05), ("half", HalfLinear, 1e-6)],
)
def test_weights_made_coarse_on_their_way_are_those_made_coarse_afterwards(
    folder: Path, scheme: Any, kind: type, error: float
):
    """Tolerance: see test_quantize; layers in a row let it grow, in T5 the most. The worst seen was a third of it."""
    coarse, plain, exact = load(folder, quantize=scheme), load(folder), load(folder)
    assert kinds(coarse) == {kind}
    for part, same in ((plain.encoder, exact.encoder), (plain.language, exact.language)):
        assert isinstance(part, nn.Module)
        assert isinstance(same, nn.Module)
        quantize_layers(part, scheme, CPU)
        for name, layer in part.named_modules():
            if isinstance(layer, QuantLinear):
                placement.put(same, f"{name}.weight", torch.cat(list(layer.plain(torch.float32))))
    plain = tuned(plain, Memory(scheme))
    assert torch.equal(logits(coarse), logits(plain))
    assert coarse.caption(picture(0)) == plain.caption(picture(0))
    assert float((logits(coarse) - logits(exact)).norm() / logits(exact).norm()) < error


@pytest.mark.parametrize("options", [{}, *({"quantize": name} for name in SCHEMES), {"dtype": "bfloat16"}], ids=str)
def test_a_model_on_disk_gives_the_same_and_leaves_no_file(folder: Path, cache: Path, options: dict[str, Any]):
    """Tolerance: what has a place is not packed, and sums in another order may round an activation the other way."""
    expected = logits(load(folder, **options))
    model = load(folder, **options, device_map={"": "disk"})
    error = {"int8": 0.01, "half": 1e-5}.get(options.get("quantize", ""), 0.0)
    assert float((logits(model) - expected).norm()) <= error * float(expected.norm())
    assert list(cache.rglob("*.safetensors")) == []
    again = load(folder, **options, device_map="auto")  # all of it fits here
    assert torch.equal(logits(again), logits(model))


def test_only_the_image_encoder_takes_even_rows_in_one_half(folder: Path):
    for scheme, kind in (("int8", Int8Linear), ("fp8", Fp8Linear)):
        model = load(folder, quantize=scheme)
        for part, expected in ((model.encoder, True), (model.language, False)):
            assert isinstance(part, nn.Module)
            assert {each.one_half for each in part.modules() if isinstance(each, kind)} == {expected}


def test_plain_weights_are_packed_unless_they_were_given_places(folder: Path, monkeypatch: pytest.MonkeyPatch):
    if not packed.reads_packed(torch.float32):
        pytest.skip("this torch has no packed product")
    monkeypatch.setattr(packed, "LEAST", 1)
    expected = logits(load(folder, device_map={"": "disk"}))
    model = load(folder)
    assert kinds(model) == {packed.PackedLinear}
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)  # sums in another order
    assert kinds(load(folder, device_map={"": "disk"})) == {nn.Linear}
    transformers.save(model, folder.with_name(folder.name + "-again"))
    again = load(folder.with_name(folder.name + "-again"))
    assert torch.equal(logits(again), logits(model))


def test_what_the_checkpoint_holds_as_it_is_needed_gets_no_copy(folder: Path, monkeypatch: pytest.MonkeyPatch):
    written: list[torch.Size] = []
    keep = fill.on_disk
    monkeypatch.setattr(fill, "on_disk", lambda tensor: written.append(tensor.shape) or keep(tensor))
    load(folder, device_map={"vision": "disk"})
    assert written == []
    load(folder, device_map={"language": "disk"})
    stacked = [shape for shape in written if len(shape) == 2]
    assert stacked
    assert all(shape[0] in (3 * 64, 2 * 64, 2 * 128) for shape in stacked)  # fused projections, and nothing else


def test_a_full_disk_is_named_with_the_way_out(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    def full(_: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fill, "save_file", full)
    with pytest.raises(CheckpointError, match="No space left on device; free some space there or set BLIP2_CACHE"):
        load(folder, quantize="int8", device_map={"": "disk"})
    assert list(cache.rglob("*.safetensors")) == []


def test_t5_in_float16_keeps_in_float32_what_would_overflow(tmp_path: Path):
    transformers.save(made("t5"), tmp_path)
    model = load(tmp_path, dtype="float16")
    assert isinstance(model.language, T5)
    types = {name: tensor.dtype for name, tensor in model.language.state_dict().items()}
    assert {name for name, dtype in types.items() if dtype == torch.float32} == {
        f"{half}.{n}.mlp.down.weight" for half in ("encoder", "decoder") for n in range(2)
    }
    coarse = load(tmp_path, dtype="float16", quantize="int8")
    assert isinstance(coarse.language, T5)
    for layer in coarse.language.encoder:
        layer.mlp.down.scale *= 3e5
    found = logits(coarse)
    assert found.isfinite().all()


def test_a_coarse_model_is_not_saved(folder: Path, tmp_path: Path):
    model = load(folder, quantize="int8")
    with pytest.raises(CheckpointError, match="load the model without `quantize` to save it"):
        transformers.save(model, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_model_in_our_own_format_becomes_coarse_too_and_lies_on_one_device(tmp_path: Path):
    tiny = build(language=False)
    blip2.weights.save(tmp_path, tiny.config, tiny.bridge, tiny.encoder)
    model = load(tmp_path, quantize="int8")
    assert kinds(model) == {Int8Linear}
    torch.testing.assert_close(model.embed_images(picture(0)), tiny.embed_images(picture(0)), rtol=0, atol=0.05)
    with pytest.raises(ConfigError, match="lies on one device; use `device`"):
        load(tmp_path, device_map={"": "disk"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": "int2"}, "quantize 'int2' is none; use int8, fp8, int4, half"),
        ({"device_map": "balanced"}, "device_map 'balanced' is none; use auto, or places by name"),
        ({"device_map": {"language.layers.9": "disk"}}, "'language.layers.9' is no block of this model"),
        ({"device_map": {"bridge": "disk"}}, "'bridge' is no block of this model"),
        ({"device_map": {"": "tpu"}}, "device 'tpu' is none"),
        ({"device_map": {"": 63}}, "cuda:63"),
        ({"device_map": {"": 1.5}}, "device_map: '': 1.5 is no place; name a block, and a device"),
        ({"device_map": {"vision": None}}, "device_map: 'vision': None is no place"),
        ({"device_map": {"vision": True}}, "device_map: 'vision': True is no place"),
        ({"device_map": {3: "cpu", "x": "cpu"}}, "device_map: 3: 'cpu' is no place"),
        ({"device_map": ["cpu"]}, "device_map \\['cpu'\\] is none"),
    ],
)
def test_what_cannot_be_placed_is_named(folder: Path, options: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        load(folder, **options)


# -- several devices, which only stand for themselves here -------------------------------------------------------------


class _Indexing(TorchFunctionMode):
    """`x[...]`, `~x` and `x.copy_` in functions that ask no device; torch's own do, and there may be none."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__invert__:
            return args[0].logical_not()
        if func is Tensor.copy_:
            return torch.ops.aten.copy_.default(*args)
        if func not in (Tensor.__getitem__, Tensor.__setitem__):
            return func(*args, **(kwargs or {}))
        x, at = args[0], 0
        for step in args[1] if isinstance(args[1], tuple) else (args[1],):
            if step is None:
                x = x.unsqueeze(at)
            elif isinstance(step, int):
                x, at = x.select(at, step), at - 1
            elif isinstance(step, Tensor):
                x = x.index_select(at, step)
            else:
                start, end, _ = step.indices(x.shape[at])
                x = x.narrow(at, start, end - start)
            at += 1
        return x if func is Tensor.__getitem__ else torch.ops.aten.copy_.default(x, args[2])


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch):
    """Two CUDA devices whose tensors have shapes and a place, but no values: what mixes places is an error."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), _Indexing():  # asks whether there is CUDA, and stands in for it where there is not
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        yield


@pytest.mark.usefixtures("devices")
def test_auto_fills_devices_in_order_then_memory_then_disk(monkeypatch: pytest.MonkeyPatch):
    config = LANGUAGES["opt"]
    assert isinstance(config, OPTConfig)
    modules: dict[str, nn.Module] = {"vision": VisionTransformer(VISION), "language": OPT(config)}
    blocks, rest = placement._sizes(modules, None)
    assert list(blocks) == ["vision.blocks.0", "vision.blocks.1", *(f"language.layers.{n}" for n in range(3))]
    total = sum(tensor.nbytes for module in modules.values() for tensor in module.state_dict().values())
    assert sum(blocks.values()) + rest == total
    vision, layer = blocks["vision.blocks.0"], blocks["language.layers.0"]
    free = {FIRST: rest + max(vision, layer) + 2 * vision, SECOND: layer, CPU: layer}
    monkeypatch.setattr(placement, "free_memory", lambda device: free[device] / (1 - placement.SPARE) + 9)
    home = plan(modules, FIRST, Memory(device_map="auto"))
    assert home.places == {"language.layers.0": SECOND, "language.layers.1": CPU, "language.layers.2": DISK}
    assert plan(modules, FIRST, Memory("int4", "auto")).places == {}  # a quarter of it fits
    home = plan(modules, FIRST, Memory(device_map={"": 0, "language": "cuda:1", "language.layers.2": "cpu"}))
    assert home.places == {"language.layers.0": SECOND, "language.layers.1": SECOND, "language.layers.2": CPU}


@pytest.mark.usefixtures("devices")
@pytest.mark.parametrize("kind", LANGUAGES)
@torch.no_grad()
def test_blocks_on_other_devices_and_in_memory_run_with_the_rest(kind: str):
    with skeleton():
        language, vision = transformers.build_language(LANGUAGES[kind]), VisionTransformer(VISION)
    parts: dict[str, nn.Module] = {"vision": vision, "language": language}
    names = list(placement._sizes(parts, None)[0])
    places = {name: (SECOND, CPU)[number % 2] for number, name in enumerate(names)}
    home = Home(FIRST, places=places)
    for key, part in parts.items():
        for name, tensor in part.state_dict().items():
            place = home.place(f"{key}.{name}")
            placement.put(part, name, torch.empty(tensor.shape, device=torch.device(place)))
    home.connect(parts)
    assert vision(torch.zeros(2, 3, 28, 28, device=FIRST)).device == FIRST
    prefix, lengths = torch.zeros(2, 5, 64, device=FIRST), torch.full((2,), 5, device=FIRST)
    ids = torch.zeros(2, dtype=torch.long, device=FIRST)
    if isinstance(language, OPT):
        hidden, cache = language.read(prefix, lengths)
    else:
        cache = _unchecked(language, prefix, lengths)
        hidden = language.write(ids[:, None], cache)
    assert hidden.device == FIRST
    for _ in range(2):
        assert language.step(ids, cache).device == FIRST
    assert {key.device for key, _ in zip(cache.tiers[0].keys, cache.tiers[0].values, strict=True)} == {
        SECOND,
        FIRST,
    }  # what lies in memory is brought to the first


def _unchecked(language: T5, prefix: Tensor, lengths: Tensor) -> Any:
    """`read` without its look at the values, which there are none of."""
    from blip2.model import t5

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(t5, "check_prefix", lambda _: None)
        return language.read(prefix, lengths)
