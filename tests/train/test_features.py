"""The feature cache: right after any interruption, shared by runs, never computed twice."""

import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from blip2 import image
from blip2.data.sources import ImageRef, Prototype, Sample
from blip2.errors import DataError
from blip2.train.features import FeatureCache, PrototypeFeatures

SETTINGS = (8, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
TRANSFORM = image.Transform(*SETTINGS)
VIEWS = image.RandomView(*SETTINGS)


@dataclass
class Encoder:
    """4 patches of 3 channel means; counts the pictures that it saw."""

    width: int = 3
    image_size: int = 8
    mean: tuple[float, float, float] = SETTINGS[1]
    std: tuple[float, float, float] = SETTINGS[2]
    scale: float = 1.0
    layout: int = 0
    seen: int = 0
    before: Callable[[int], None] = field(default=lambda _: None)

    def __call__(self, pixels: Tensor) -> Tensor:
        self.before(self.seen)
        self.seen += len(pixels)
        return torch.nn.functional.adaptive_avg_pool2d(pixels, 2).flatten(2).transpose(1, 2) * self.scale


def make_pictures(folder: Path, count: int) -> list[Sample]:
    draw = np.random.default_rng(0)
    samples: list[Sample] = []
    for number in range(count):
        path = folder / f"{number}.png"
        Image.fromarray(draw.integers(0, 255, (12, 10, 3), dtype=np.uint8)).save(path)
        samples.append(Sample(f"s{number}", ImageRef(path), ("x",)))
    return samples


def make_cache(folder: Path, samples: list[Sample], encoder: Encoder | None = None, **changes: Any) -> FeatureCache:
    return FeatureCache(folder / "cache", encoder or Encoder(), "toy 1", TRANSFORM, samples, **changes)


def right(samples: list[Sample]) -> Tensor:
    pictures = [image.open(sample.image.read()) for sample in samples if isinstance(sample.image, ImageRef)]
    return Encoder()(TRANSFORM(pictures)).half()


def everything(cache: FeatureCache, view: int = 0) -> Tensor:
    return cache.patches(range(len(cache.samples)), [view] * len(cache.samples))


def test_cached_features_are_the_encoders_own_in_half_precision(tmp_path: Path):
    samples = make_pictures(tmp_path, 20)
    cache = make_cache(tmp_path, samples)
    assert torch.equal(everything(cache), right(samples))
    assert torch.equal(cache.patches([7, 3, 7], [0, 0, 0]), right(samples)[[7, 3, 7]])


def test_what_is_cached_is_not_computed_again(tmp_path: Path):
    samples = make_pictures(tmp_path, 5)
    make_cache(tmp_path, samples)
    again = Encoder()
    assert torch.equal(everything(make_cache(tmp_path, samples, again)), right(samples))
    assert again.seen == 0


def test_views_are_of_their_own_and_added_without_redoing_the_first(tmp_path: Path):
    samples = make_pictures(tmp_path, 5)
    make_cache(tmp_path, samples)
    encoder = Encoder()
    cache = make_cache(tmp_path, samples, encoder, views=3, augment=VIEWS)
    assert encoder.seen == 10
    assert torch.equal(everything(cache), right(samples))
    assert not torch.equal(everything(cache, 1), everything(cache, 2))
    mixed = cache.patches([2, 2, 4], [0, 2, 1])
    expected = [everything(cache, view)[row] for row, view in ((2, 0), (2, 2), (4, 1))]
    assert torch.equal(mixed, torch.stack(expected))


def test_another_encoder_transform_picture_or_augmentation_is_another_cache(tmp_path: Path):
    samples = make_pictures(tmp_path, 3)
    make_cache(tmp_path, samples, views=2, augment=VIEWS)

    def computed(encoder_id: str = "toy 1", transform: Any = TRANSFORM, augment: Any = VIEWS, layout: int = 0) -> int:
        encoder = Encoder(layout=layout)
        FeatureCache(tmp_path / "cache", encoder, encoder_id, transform, samples, views=2, augment=augment)
        return encoder.seen

    assert computed() == 0
    assert computed(encoder_id="toy 2") == 6
    assert computed(layout=1) == 6
    assert computed(transform=image.Transform(8, (0.4, 0.5, 0.5), (0.5, 0.5, 0.5))) == 6
    assert computed(augment=image.RandomView(*SETTINGS, scale=(0.2, 1.0))) == 3
    Image.new("RGB", (12, 10), "red").save(tmp_path / "1.png")
    assert computed() == 6


class Weighted(torch.nn.Module):
    """An encoder with a weight, and so with a type of number."""

    width, image_size, mean, std = 3, *SETTINGS

    def __init__(self) -> None:
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(1 / 3))

    def forward(self, pixels: Tensor) -> Tensor:
        return Encoder()(pixels * self.factor)


def test_features_of_a_half_precision_encoder_are_not_taken_for_those_of_the_full_one(tmp_path: Path):
    samples = make_pictures(tmp_path, 2)
    full, half = (everything(make_cache(tmp_path, samples, encoder)) for encoder in (Weighted(), Weighted().bfloat16()))
    assert not torch.equal(full, half)


def test_pictures_are_read_again_only_if_they_were_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    samples = make_pictures(tmp_path, 4)
    for path in tmp_path.glob("*.png"):
        os.utime(path, (1e9, 1e9))
    make_cache(tmp_path, samples)
    read: list[str] = []
    original = ImageRef.read
    monkeypatch.setattr(ImageRef, "read", lambda ref: read.append(ref.path.name) or original(ref))
    make_cache(tmp_path, samples)
    assert read == []
    content = (tmp_path / "3.png").read_bytes()
    (tmp_path / "1.png").write_bytes(content)
    os.utime(tmp_path / "1.png", (1e9 + 1, 1e9 + 1))
    changed = make_cache(tmp_path, samples)
    assert read[0] == "1.png"
    assert torch.equal(everything(changed)[1], everything(changed)[3])
    assert not list((tmp_path / "cache").glob("*.partial"))


@pytest.mark.parametrize("damage", [b"{", b"[1, 2]", b'{"x": 1}', b"\xff"])
def test_a_damaged_memory_of_pictures_is_as_good_as_none(tmp_path: Path, damage: bytes):
    samples = make_pictures(tmp_path, 2)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "pictures.json").write_bytes(damage)
    assert torch.equal(everything(make_cache(tmp_path, samples)), right(samples))


def test_a_picture_changed_just_now_is_not_remembered_for_it_may_change_within_a_tick(tmp_path: Path):
    samples = make_pictures(tmp_path, 2)
    os.utime(tmp_path / "0.png", (1e9, 1e9))
    os.utime(tmp_path / "1.png", (time.time() + 60, time.time() + 60))
    make_cache(tmp_path, samples)
    (place,) = json.loads((tmp_path / "cache" / "pictures.json").read_text())
    assert place.startswith(str(tmp_path / "0.png"))


def test_what_has_no_stable_name_cannot_be_cached(tmp_path: Path):
    with pytest.raises(DataError, match="give it a repr that states its settings"):
        FeatureCache(tmp_path, Encoder(), "toy", lambda pictures: TRANSFORM(pictures), make_pictures(tmp_path, 1))


def test_a_fault_midway_keeps_what_was_done(tmp_path: Path):
    samples = make_pictures(tmp_path, 40)

    def stop(seen: int) -> None:
        if seen >= 16:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_cache(tmp_path, samples, Encoder(before=stop))
    encoder = Encoder()
    assert torch.equal(everything(make_cache(tmp_path, samples, encoder)), right(samples))
    assert encoder.seen == 24


def _slowly(folder: Path, samples: list[Sample]) -> None:
    make_cache(folder, samples, Encoder(before=lambda _: time.sleep(0.02)))


def test_killed_at_any_moment_it_resumes_to_the_right_features(tmp_path: Path):
    samples = make_pictures(tmp_path, 150)
    kills = 0
    for wait in (0.02, 0.05, 0.09, 0.15):
        process = multiprocessing.get_context("fork").Process(target=_slowly, args=(tmp_path, samples))
        process.start()
        assert process.pid is not None
        time.sleep(wait)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        kills += process.exitcode == -signal.SIGKILL
    assert kills > 0
    assert torch.equal(everything(make_cache(tmp_path, samples)), right(samples))


def test_two_runs_share_one_cache(tmp_path: Path):
    samples = make_pictures(tmp_path, 60)
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_slowly, args=(tmp_path, samples)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    encoder = Encoder()
    assert torch.equal(everything(make_cache(tmp_path, samples, encoder)), right(samples))
    assert encoder.seen == 0
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 1


def test_torn_data_without_its_mark_is_computed_again(tmp_path: Path):
    samples = make_pictures(tmp_path, 4)
    make_cache(tmp_path, samples)
    (folder,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    content = bytearray((folder / "features").read_bytes())
    content[30:40] = b"\xff" * 10
    (folder / "features").write_bytes(content)
    (folder / "marks").write_bytes(b"\x00\x00\x01\x01")
    assert torch.equal(everything(make_cache(tmp_path, samples)), right(samples))


def test_a_picture_that_is_none_is_named_or_dropped_and_counted(tmp_path: Path):
    samples = make_pictures(tmp_path, 5)
    (tmp_path / "2.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"2\.png \(sample 's2'\)"):
        make_cache(tmp_path, samples)
    cache = make_cache(tmp_path, samples, unreadable="drop", views=2, augment=VIEWS)
    assert cache.dropped == ["s2"]
    kept = [sample for sample in samples if sample.id != "s2"]
    assert cache.samples == kept
    assert torch.equal(everything(cache), right(kept))
    with pytest.raises(DataError, match=r"2\.png"):
        make_cache(tmp_path, samples)


def test_pictures_that_all_fail_are_an_error_even_when_dropped(tmp_path: Path):
    samples = make_pictures(tmp_path, 1)
    (tmp_path / "0.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match="none of 1 pictures could be opened"):
        make_cache(tmp_path, samples, unreadable="drop")


def test_features_beyond_half_precision_are_an_error(tmp_path: Path):
    with pytest.raises(DataError, match="beyond half precision"):
        make_cache(tmp_path, make_pictures(tmp_path, 1), Encoder(scale=1e6))


def test_a_full_disk_says_so_and_keeps_what_was_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    samples = make_pictures(tmp_path, 20)
    write = os.pwrite

    def full(file: int, data: bytes, offset: int) -> int:
        if offset >= 18 * 24:
            raise OSError(28, "No space left on device")
        return write(file, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(DataError, match=r"No space left on device.*make room and start again: what is done is kept"):
        make_cache(tmp_path, samples)
    monkeypatch.undo()
    encoder = Encoder()
    assert torch.equal(everything(make_cache(tmp_path, samples, encoder)), right(samples))
    assert encoder.seen == 4


def test_too_little_room_is_told_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    with pytest.raises(DataError, match="MB are needed"):
        make_cache(tmp_path, make_pictures(tmp_path, 20))


def test_progress_counts_all_views(tmp_path: Path):
    seen: list[tuple[int, int]] = []
    samples = make_pictures(tmp_path, 20)
    make_cache(tmp_path, samples, views=2, augment=VIEWS, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(16, 40), (20, 40), (36, 40), (40, 40)]


def test_prototypes_stand_in_for_pictures_of_classes():
    samples = [Sample(f"c{n}", Prototype(n), ("x",)) for n in (4, 1)]

    def draw(classes: Sequence[int], draws: Sequence[int]) -> Tensor:
        return torch.tensor([*zip(classes, draws, strict=True)])[:, None].float()

    features = PrototypeFeatures(draw, 5, samples)
    assert features.patches([1, 0, 1], [7, 8, 9]).tolist() == [[[1, 7]], [[4, 8]], [[1, 9]]]
    assert features.patches([0], [0]).dtype == torch.float16
    with pytest.raises(DataError, match="'c9': class 9 of an encoder with 5"):
        PrototypeFeatures(draw, 5, [Sample("c9", Prototype(9), ("x",))])
    with pytest.raises(DataError, match="'p' has a picture"):
        PrototypeFeatures(draw, 5, [Sample("p", ImageRef(Path("p")), ("x",))])
