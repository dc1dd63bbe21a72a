"""The image encoder, trained: what learns, at which rates, at which size, and that it comes back."""

import shutil
from pathlib import Path

import fine
import pytest
import torch

from blip2.config import VisionConfig
from blip2.errors import ConfigError, ImageError
from blip2.model.vision import VisionTransformer
from blip2.train import optimizer
from blip2.train.recipe import parse
from blip2.weights import load

TRAINED = {"vision": {"train": True}}
LARGER = {"model": {"vision": {"image_size": 42}}}  # 6 x 6 patches in place of 4 x 4
CLOSE = {"rtol": 1e-5, "atol": 1e-6}  # blocks that are computed twice are computed in the same order


@pytest.fixture(scope="module")
def start(opt: Path) -> Path:
    return opt


def vit(**changes: object) -> VisionTransformer:
    torch.manual_seed(0)
    sizes = {"image_size": 28, "patch_size": 7, "width": 8, "layers": 3, "heads": 2, "mlp_width": 16}
    return VisionTransformer(VisionConfig(**(sizes | changes)))  # type: ignore[arg-type]


def test_a_trained_encoder_learns_is_saved_and_answers_for_itself(data: Path, start: Path, tmp_path: Path):
    frozen = fine.run(data, start, tmp_path / "frozen", steps=25, train=["vision_norm.*"], lr=3e-2)
    report = fine.run(data, start, tmp_path / "run", steps=25, train=["vision_norm.*", "vision.*"], lr=3e-2, **TRAINED)
    assert report.last["lm"] < report.first["lm"] - 0.1
    assert report.last["lm"] < frozen.last["lm"], "it helps beyond what the norm behind it does"
    before, after = fine.load(start), fine.load(report.model)
    assert fine.changed(fine.weights(before.encoder), fine.weights(after.encoder)) == set(before.encoder.state_dict())
    assert fine.changed(fine.weights(before.language), fine.weights(after.language)) == set()
    assert (report.model / "vision.safetensors").is_file()
    assert load(report.model).config.base.vision is False


def test_the_next_run_goes_on_from_the_trained_encoder_and_takes_it_along(data: Path, start: Path, tmp_path: Path):
    first = fine.run(data, start, tmp_path / "one", **TRAINED)
    second = fine.run(data, tmp_path / "one", tmp_path / "two")
    one, two = fine.load(first.model), fine.load(second.model)
    assert fine.changed(fine.weights(one.encoder), fine.weights(two.encoder)) == set()
    shutil.rmtree(tmp_path / "one")
    assert fine.said(fine.load(second.model)) == fine.said(two)


def test_each_block_learns_at_the_rate_of_its_depth():
    class Whole(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vision = vit(pre_norm=True)
            self.vision_norm = torch.nn.LayerNorm(8)

    values = fine.recipe(Path("data"), Path("start"), Path("out"), lr=1.0, min_lr=0, lr_scale={"vision.*": 0.5})
    recipe = parse(values | {"vision": {"train": True, "layer_decay": 0.9}})
    parameters = optimizer.choose(Whole(), recipe)
    adamw = optimizer.adamw(parameters, recipe)
    optimizer.set_rate(adamw, 1.0)
    rates = {
        name: group["lr"]
        for group in adamw.param_groups
        for name, parameter in parameters.items()
        if any(parameter is member for member in group["params"])
    }
    stem = {"positions", "class_token", "patch_embedding.weight", "patch_embedding.bias", "pre_norm.weight"}
    for name in stem:
        assert rates[f"vision.{name}"] == pytest.approx(0.5 * 0.9**4)
    for block in range(3):
        assert rates[f"vision.blocks.{block}.attention.qkv.weight"] == pytest.approx(0.5 * 0.9 ** (3 - block))
    assert rates["vision_norm.weight"] == 1.0
    assert optimizer.layer_decay("qformer.layers.0.norm.weight", 3, 0.9) == 1.0


def test_positions_stay_the_same_bits_at_the_old_size_and_another_copy_shares_nothing():
    model = vit()
    same = model.resized(28)
    assert torch.equal(same.positions, model.positions)
    pixels = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    assert torch.equal(same(pixels), model(pixels))
    with torch.no_grad():
        same.positions.add_(1)
    assert not torch.equal(same.positions, model.positions)


def test_positions_at_another_size_are_interpolated_bicubically():
    model = vit()
    small = model.resized(14)
    # Cubic convolution with a = -0.75, half-way between two of four: weights -3/32, 19/32, 19/32, -3/32; what lies
    # beyond the edge is the edge.
    rows = torch.tensor([[16, 19, -3, 0], [0, -3, 19, 16]]) / 32
    grid = model.positions[0, 1:].reshape(4, 4, 8)
    expected = torch.einsum("iy,jx,yxd->ijd", rows, rows, grid).reshape(4, 8)
    torch.testing.assert_close(small.positions[0, 1:], expected, **CLOSE)
    assert torch.equal(small.positions[:, :1], model.positions[:, :1])
    assert small.image_size == 14
    with pytest.raises(ImageError, match="takes 14 x 14"):
        small(torch.zeros(1, 3, 28, 28))
    pixels = torch.randn(1, 3, 14, 14, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(small(pixels), model(pixels, resized=True), **CLOSE)
    with pytest.raises(ImageError, match="20 is no multiple of the patch, 7"):
        model.resized(20)


def test_recomputed_blocks_give_the_same_output_and_the_same_gradients():
    pixels = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    found: list[tuple[torch.Tensor, dict[str, torch.Tensor]]] = []
    calls: list[int] = []
    for recompute in (False, True):
        model = vit()
        model.recompute = recompute
        model.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
        out = model(pixels)
        out.square().sum().backward()
        found.append((out, {name: parameter.grad for name, parameter in model.named_parameters()}))
    assert len(calls) == 3, "once, and then once and once more"
    torch.testing.assert_close(found[1], found[0], **CLOSE)


def test_a_larger_picture_size_is_trained_saved_and_inferred_at(data: Path, start: Path, tmp_path: Path):
    report = fine.run(data, start, tmp_path / "run", vision={"train": True, "recompute": True}, **LARGER)
    model = fine.load(report.model)
    assert model.encoder.image_size == 42
    assert model.encode(fine.published.pictures(1)).patches.shape[1] == 1 + 6 * 6
    assert fine.said(model)


def test_a_frozen_encoder_at_another_size_needs_no_file_of_its_own(data: Path, start: Path, tmp_path: Path):
    cached = {"features": {"cache": str(tmp_path / "features")}}
    report = fine.run(data, start, tmp_path / "run", **LARGER, **cached)
    assert not (report.model / "vision.safetensors").exists()
    model, base = fine.load(report.model), fine.load(start)
    assert torch.equal(model.encoder.positions, base.encoder.resized(42).positions)
    again = fine.run(data, start, tmp_path / "again", **LARGER)
    assert again.last == pytest.approx(report.last, rel=1e-2), "features are kept in half precision"


def test_features_of_an_encoder_at_two_sizes_or_of_two_starts_are_kept_apart(data: Path, start: Path, tmp_path: Path):
    folder = tmp_path / "features"
    cached = {"features": {"cache": str(folder)}, "steps": 1}
    trained = fine.run(data, start, tmp_path / "trained", **TRAINED)
    for number, (place, changes) in enumerate([(start, {}), (start, LARGER), (tmp_path / "trained", {}), (start, {})]):
        fine.run(data, place, tmp_path / f"run{number}", **cached, **changes)
        assert len([path for path in folder.iterdir() if path.is_dir()]) == min(3, number + 1)
    assert trained.steps == 2


def test_a_run_that_trains_everything_goes_on_bit_for_bit(data: Path, start: Path, tmp_path: Path):
    settings = {"steps": 6, "ema": 0.9, "vision": {"train": True, "layer_decay": 0.8}, "lora": {"rank": 2}}
    whole = fine.run(data, start, tmp_path / "whole", **settings)
    fine.run(data, start, tmp_path / "cut", **settings)
    (tmp_path / "cut" / "checkpoints" / "step-00000006.pt").unlink()
    shutil.rmtree(tmp_path / "cut" / "model")
    again = fine.run(data, start, tmp_path / "cut", **settings)
    for name in ("bridge.safetensors", "vision.safetensors", "adapter/adapter_model.safetensors"):
        assert (again.model / name).read_bytes() == (whole.model / name).read_bytes(), name
    assert (tmp_path / "cut" / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()


def test_what_cannot_be_trained_or_kept_is_refused(data: Path, start: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"features\.cache: the image encoder is trained"):
        fine.run(data, start, tmp_path / "run", features={"cache": str(tmp_path / "features")}, **TRAINED)
    import tiny

    from blip2.train.loop import train

    shapes = tiny.draw_shapes(tmp_path / "shapes", 16, seed=0)
    with pytest.raises(ConfigError, match=r"vision\.train: TinyEncoder is another's and stays frozen"):
        train(parse(tiny.recipe(shapes, tmp_path / "other", **TRAINED)), tiny.parts())
    with pytest.raises(ImageError, match="30 is no multiple of the patch"):
        fine.run(data, start, tmp_path / "run", model={"vision": {"image_size": 30}})
