"""Pictures that are opened when they are needed."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from blip2 import image
from blip2.data.sources import ImageRef, Prototype, Sample
from blip2.errors import DataError
from blip2.train.pixels import Pixels


def test_pixels_open_pictures_and_draw_views_by_sample_and_number(tmp_path: Path):
    Image.effect_noise((40, 30), 90).convert("RGB").save(tmp_path / "a.png")
    samples = [Sample("a", ImageRef(tmp_path / "a.png"), ("x",))]
    settings = (16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    pixels = Pixels(samples, image.Transform(*settings), image.RandomView(*settings))
    plain, first, again, second = pixels([0, 0, 0, 0], [0, 1, 1, 2])
    assert torch.equal(plain, image.Transform(*settings)(image.open(tmp_path / "a.png"))[0])
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert not torch.equal(first, plain)


def test_pixels_name_a_picture_that_is_none_and_refuse_prototypes(tmp_path: Path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    transform = image.Transform(16, (0.5,) * 3, (0.5,) * 3)
    with pytest.raises(DataError, match=r"a\.png \(sample 'a'\)"):
        Pixels([Sample("a", ImageRef(tmp_path / "a.png"), ("x",))], transform)([0], [0])
    with pytest.raises(DataError, match="'c' is a class prototype"):
        Pixels([Sample("c", Prototype(0), ("x",))], transform)
