"""Images read ahead: in order, no more than asked for, in constant memory however many and however large."""

from __future__ import annotations

import time
import tracemalloc
import warnings
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import tiny_model
from blip2 import image
from blip2.batching import BatchSize
from blip2.bulk import Failure, caption_files, each
from blip2.bulk.reading import opened

CPU = torch.device("cpu")


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    """24 noisy pictures of different sizes, the seventh broken."""
    paths = [tmp_path / f"{n:02}.png" for n in range(24)]
    for n, path in enumerate(paths):
        Image.fromarray(tiny_model.picture(n)[: 20 + n]).save(path)
    paths[6].write_bytes(b"no picture")
    return paths


def test_no_more_images_are_read_than_asked_for(photos: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    monkeypatch.setattr(image, "open", lambda path: read.append(path) or Image.new("RGB", (1, 1)))
    stream = opened(photos, image.Transform(2, (0.5,) * 3, (0.5,) * 3), ahead=lambda: 4, workers=2)
    taken = [next(stream) for _ in range(3)]
    time.sleep(0.05)
    assert [item[0] for item in taken if not isinstance(item, Failure)] == photos[:3]
    assert len(read) == 3 + 4
    stream.close()


def test_captions_and_vectors_do_not_depend_on_the_batch_size(photos: list[Path]) -> None:
    model = tiny_model.build()
    alone = {path: model.caption(path) for path in photos if path != photos[6]}
    out = photos[0].with_name("captions.jsonl")
    for size in (1, 3, 24, "auto"):
        with closing(each(model.caption, photos, model.transform, BatchSize(size, CPU))) as stream:  # pyright: ignore
            found = dict(pair for batch in stream for pair in batch)
        assert list(found) == photos
        assert isinstance(found.pop(photos[6]), Failure)
        assert found == alone
        with closing(each(model.embed_images, photos[:6], model.transform, BatchSize(size, CPU))) as stream:  # pyright: ignore
            vectors = torch.stack([row for batch in stream for _, row in batch])
        # float32 sums in the order of another batch: 2e-7 seen on vectors of length 1
        torch.testing.assert_close(vectors, model.embed_images(photos[:6]), atol=2e-6, rtol=0)
    assert caption_files(model, photos, out).done == 23


class Full:
    """A model with memory for so many images."""

    transform = image.Transform(28, (0.5,) * 3, (0.5,) * 3)
    device = CPU

    def __init__(self, room: int, error: Exception) -> None:
        self.room, self.error = room, error
        self.seen: list[int] = []

    def caption(self, images: Tensor, **_: Any) -> list[str]:
        if len(images) > self.room:
            raise self.error
        self.seen.append(len(images))
        return [str(int(square.sum())) for square in images]


@pytest.mark.parametrize("error", [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
])  # fmt: skip
def test_where_memory_runs_out_batches_are_halved_nothing_is_lost_and_it_is_said_once(
    photos: list[Path], error: Exception
) -> None:
    good = [path for path in photos if path != photos[6]]
    model = Full(3, error)
    out = photos[0].with_name("captions.jsonl")
    with pytest.warns(RuntimeWarning, match="memory ran out at 16 images.*nothing is lost") as said:
        assert caption_files(model, good, out, batch_size=16).done == 23
    assert len(said) == 1
    assert max(model.seen) == 2  # 16, 8 and 4 were too many
    expected = out.read_bytes()
    out.unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        caption_files(Full(99, error), good, out, batch_size=1)
    assert out.read_bytes() == expected


def test_an_image_for_which_there_is_no_memory_is_an_error_and_other_errors_are_not_tried_again(
    photos: list[Path],
) -> None:
    out = photos[0].with_name("captions.jsonl")
    with pytest.raises(MemoryError), pytest.warns(RuntimeWarning, match="memory ran out"):
        caption_files(Full(0, MemoryError()), photos, out)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        caption_files(Full(0, RuntimeError("shapes do not fit")), photos, out)


def test_memory_does_not_grow_with_the_number_of_images(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)
    for number in range(400):
        Image.fromarray(noise).resize((8, 8)).save(tmp_path / "photos" / f"{number:03}.png")
    model = Full(8, MemoryError())
    model.transform = image.Transform(224, (0.5,) * 3, (0.5,) * 3)  # 150 KB an image
    files = sorted((tmp_path / "photos").iterdir())
    peaks: list[int] = []
    for count in (50, 400):
        tracemalloc.start()
        caption_files(model, files[:count], tmp_path / f"{count}.jsonl", batch_size=8)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[0] > 8 * 224 * 224 * 3
    assert peaks[1] < 1.3 * peaks[0]  # the paths and what is done are kept: 350 squares more would be 15 times as much
