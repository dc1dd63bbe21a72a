"""Pictures to features: the same whatever they come from, however many go together, whatever the bridge computes in."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from blip2 import image
from blip2.blip2 import Blip2
from blip2.compiling import compile_sight
from blip2.errors import ConfigError, ImageError
from blip2.loading import load
from tiny_model import build, picture

CLOSE = {"atol": 1e-5, "rtol": 1e-4}  # float32 sums in another order


@pytest.fixture(scope="module")
def model() -> Blip2:
    return build()


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    for seed in range(7):
        Image.fromarray(picture(seed)).save(tmp_path / f"{seed}.png")
    return [str(tmp_path / f"{seed}.png") for seed in range(7)]


def test_squares_give_the_pixels_that_pictures_do_bit_for_bit(model: Blip2) -> None:
    transform = image.Transform(28, (0.48, 0.46, 0.41), (0.27, 0.26, 0.28))
    pictures = [image.open(picture(seed)) for seed in range(3)]
    squares = torch.stack([torch.from_numpy(transform.square(each).copy()) for each in pictures])
    assert torch.equal(transform.normalised(squares), transform(pictures))
    assert transform.fits(squares)
    for other in (squares.float(), squares[:, :27], squares[0], squares[:0], pictures, squares.permute(0, 3, 1, 2)):
        assert not transform.fits(other)
    found, expected = model.encode(squares), model.encode(pictures)
    for name in ("patches", "queries", "vectors"):
        assert torch.equal(getattr(found, name), getattr(expected, name))
    assert model.caption(squares) == model.caption(pictures)


def test_files_read_ahead_give_what_pictures_in_memory_give_and_a_broken_one_is_named(
    model: Blip2, files: list[str]
) -> None:
    expected = model.encode([picture(seed) for seed in range(7)])
    for size in (None, 2, 7):
        found = model.encode(files, batch_size=size)
        torch.testing.assert_close(found.queries, expected.queries, **CLOSE)
    Path(files[4]).write_bytes(b"no picture")
    with pytest.raises(ImageError, match=r"4\.png"):
        model.encode(files)


def test_one_open_file_many_times_in_a_list_is_read_one_after_another(model: Blip2, files: list[str]) -> None:
    with Image.open(files[0]) as shared:
        found = model.encode([shared] * 5)
    torch.testing.assert_close(found.queries, model.encode(files[0]).queries.expand(5, -1, -1), **CLOSE)


def test_where_memory_runs_out_images_are_encoded_in_halves(
    model: Blip2, files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, forward, seen = model.encode(files), type(model.encoder).forward, list[int]()

    def short(self: object, pixels: Tensor) -> Tensor:
        if len(pixels) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        seen.append(len(pixels))
        return forward(self, pixels)  # pyright: ignore

    monkeypatch.setattr(type(model.encoder), "forward", short)
    with pytest.warns(RuntimeWarning, match="memory ran out at 7 images"):
        found = model.encode(files)
    assert seen == [1] * 7  # 7, then 3, then 1
    torch.testing.assert_close(found.queries, expected.queries, **CLOSE)


def test_a_bridge_in_bfloat16_sees_what_one_in_float32_sees(model: Blip2) -> None:
    half = dataclasses.replace(model, bridge=copy.deepcopy(model.bridge).to(torch.bfloat16))
    photos, texts = [picture(seed) for seed in range(3)], ["a dog", "the cat runs"]
    found, expected = half.encode(photos), model.encode(photos)
    assert (found.patches.dtype, found.queries.dtype, found.vectors.dtype) == (
        torch.bfloat16, torch.bfloat16, torch.float32,
    )  # fmt: skip
    # bfloat16 keeps 8 bits, 0.4% an operation; two layers of weights that add up, made for words to differ, give 2.6%
    assert (found.queries.float() - expected.queries).norm() < 0.05 * expected.queries.norm()
    torch.testing.assert_close(found.vectors.norm(dim=-1), torch.ones(3, 4))  # unit length in float32
    assert (found.vectors * expected.vectors).sum(-1).min() > 0.99
    ours, theirs = half.match(photos, texts), model.match(photos, texts)
    assert ours.itm.dtype == ours.itc.dtype == torch.float32
    torch.testing.assert_close(ours.itc, theirs.itc, atol=0.06, rtol=0)  # 0.028 seen
    torch.testing.assert_close(ours.itm, theirs.itm, atol=0.02, rtol=0)  # 0.005 seen
    assert half.embed_texts(texts).dtype == torch.float32
    written = half.caption(photos, details=True)
    assert all(text.ids for text in written)


def test_compiled_it_gives_what_it_gave(model: Blip2) -> None:
    photos, texts = [picture(seed) for seed in range(3)], ["a dog", "the cat runs"]
    fast = build()
    torch.compiler.reset()
    compile_sight(fast, backend="eager")  # traced whole; what machine code comes of it is torch's matter
    for some in (photos, photos[:2], photos[:1]):  # of several sizes
        torch.testing.assert_close(fast.encode(some).vectors, model.encode(some).vectors, **CLOSE)
    assert fast.caption(photos) == model.caption(photos)
    torch.testing.assert_close(fast.match(photos, texts).itm, model.match(photos, texts).itm, **CLOSE)
    assert fast.encoder.state_dict().keys() == model.encoder.state_dict().keys()  # pyright: ignore
    assert fast.bridge.state_dict().keys() == model.bridge.state_dict().keys()


def test_compiling_does_not_go_with_blocks_that_move() -> None:
    with pytest.raises(ConfigError, match="compile: not with device_map"):
        load(compile=True, device_map="auto")
