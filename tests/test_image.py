"""Opening images of every kind, refusing what is none, and the pixels that encoders see."""

from __future__ import annotations

import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from blip2 import image
from blip2.config import CLIP_MEAN, CLIP_STD
from blip2.errors import ImageError, MissingExtraError

RED, GREEN, WHITE = (255, 0, 0), (0, 255, 0), (255, 255, 255)


def picture(width: int = 40, height: int = 30, seed: int = 0) -> Image.Image:
    """Coarse noise, which JPEG keeps roughly and PNG exactly."""
    noise = np.random.default_rng(seed).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BILINEAR)


def encoded(source: Image.Image, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    source.save(buffer, form, **options)
    return buffer.getvalue()


def same(one: Image.Image, other: Image.Image) -> bool:
    return one.mode == other.mode == "RGB" and np.array_equal(np.asarray(one), np.asarray(other))


# -- what opens ---------------------------------------------------------------------------------------------------


def test_the_same_picture_opens_from_a_path_bytes_a_file_an_image_an_array_and_a_tensor(tmp_path: Path) -> None:
    expected = picture()
    path = tmp_path / "picture.png"
    path.write_bytes(encoded(expected))
    array = np.array(expected)
    tensor = torch.from_numpy(array)
    with path.open("rb") as file:
        assert same(image.open(file), expected)
    sources = [path, str(path), path.read_bytes(), bytearray(path.read_bytes()), memoryview(path.read_bytes())]
    for source in [*sources, expected, array, tensor, tensor.permute(2, 0, 1)]:
        assert same(image.open(source), expected)


@pytest.mark.parametrize("convert", [
    lambda a: a.astype(np.float32) / 255,
    lambda a: a.astype(np.float64) / 255,
    lambda a: a.astype(np.uint16) * 257,
    lambda a: (a.astype(np.uint16) * 257).astype(">u2"),
    lambda a: a.astype(np.int64),
    lambda a: torch.from_numpy(a).permute(2, 0, 1).float() / 255,
    lambda a: torch.from_numpy(a).permute(2, 0, 1).half() / 255,
    lambda a: torch.from_numpy(a).float().div(255).requires_grad_(),
    lambda a: a[:, ::-1].copy()[:, ::-1],
])  # fmt: skip
def test_arrays_and_tensors_of_every_number_type_give_the_same_picture(convert: Callable[..., object]) -> None:
    expected = picture()
    assert same(image.open(convert(np.array(expected))), expected)  # pyright: ignore


def test_bfloat16_keeps_its_three_digits() -> None:
    expected = np.array(picture())
    opened = np.asarray(image.open(torch.from_numpy(expected).to(torch.bfloat16) / 255))
    assert np.abs(opened.astype(int) - expected).max() <= 2  # half a step of 8 significant bits


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 1)])
def test_one_channel_is_grey(shape: tuple[int, ...]) -> None:
    grey = np.arange(30, dtype=np.uint8).reshape(shape)
    opened = np.asarray(image.open(grey))
    assert (opened == grey.reshape(6, 5, 1)).all()


def test_a_mask_is_black_and_white() -> None:
    assert np.asarray(image.open(np.array([[True, False]]))).tolist() == [[[255] * 3, [0] * 3]]


def test_16_bit_grey_is_scaled_not_clipped() -> None:
    values = np.array([[0, 128, 129, 257, 30000, 65535]], np.uint16)
    expected = np.rint(values / 257).astype(np.uint8)
    for form in ("PNG", "TIFF"):
        opened = image.open(encoded(Image.fromarray(values), form))
        assert (np.asarray(opened) == expected[:, :, None]).all()
    as_integers = Image.fromarray(values.astype(np.int32))
    assert as_integers.mode == "I"
    assert (np.asarray(image.open(as_integers)) == expected[:, :, None]).all()


def test_16_bit_grey_with_a_transparent_value_has_it_white() -> None:
    data = encoded(Image.fromarray(np.array([[1000, 2000]], np.uint16)), transparency=1000)
    assert np.asarray(image.open(data)).tolist() == [[[255] * 3, [8] * 3]]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "La", "RGBa"])
def test_transparency_lies_on_white(mode: str) -> None:
    source = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    source.putpixel((1, 0), (0, 0, 0, 255))
    source = source.convert("LA").convert("La") if mode == "La" else source.convert(mode)
    opened = image.open(source)
    assert [opened.getpixel((x, 0)) for x in (0, 1)] == [WHITE, (0, 0, 0)]


def test_a_palette_with_an_alpha_channel_lies_on_white() -> None:
    source = Image.new("PA", (2, 1))
    source.putpalette([*RED, *GREEN])
    source.putpixel((0, 0), (1, 0))
    source.putpixel((1, 0), (1, 255))
    opened = image.open(source)
    assert [opened.getpixel((x, 0)) for x in (0, 1)] == [WHITE, GREEN]


def test_half_transparent_red_is_pink() -> None:
    assert image.open(Image.new("RGBA", (1, 1), (255, 0, 0, 128))).getpixel((0, 0)) == (255, 127, 127)


@pytest.mark.parametrize("form", ["PNG", "GIF"])
def test_a_palette_with_a_transparent_colour_opens(form: str) -> None:
    source = Image.new("P", (2, 1))
    source.putpalette([*RED, *GREEN])
    source.putpixel((1, 0), 1)
    opened = image.open(encoded(source, form, transparency=0))
    assert [opened.getpixel((x, 0)) for x in (0, 1)] == [WHITE, GREEN]


def test_a_transparent_colour_without_an_alpha_channel_is_white() -> None:
    opened = image.open(encoded(Image.new("RGB", (1, 1), RED), transparency=RED))
    assert opened.getpixel((0, 0)) == WHITE


@pytest.mark.parametrize(("mode", "form"), [
    ("1", "PNG"), ("L", "JPEG"), ("P", "PNG"), ("CMYK", "JPEG"), ("CMYK", "TIFF"), ("YCbCr", "JPEG"), ("RGB", "BMP"),
    ("RGB", "WEBP"), ("RGB", "TIFF"), ("RGB", "JPEG2000"), ("RGB", "PPM"), ("RGB", "ICO"), ("RGB", "AVIF"),
])  # fmt: skip
def test_every_mode_and_format_opens_as_pillow_converts_it(mode: str, form: str) -> None:
    if form == "AVIF" and "AVIF" not in Image.OPEN:
        pytest.skip("this Pillow has no AVIF")
    data = encoded(picture(32, 32).convert(mode), form)
    assert same(image.open(data), Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "TIFF"])
def test_an_animation_opens_at_its_first_frame(form: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN)]
    options = {"lossless": True} if form == "WEBP" else {}
    data = encoded(frames[0], form, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 2  # pyright: ignore
    assert image.open(data).getpixel((4, 4)) == RED


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_stands_upright(form: str, orientation: int) -> None:
    upright = Image.new("RGB", (32, 16), RED)
    upright.paste(GREEN, (0, 0, 16, 8))  # the corner tells the eight apart together with the sides
    undo = image._ORIENTATIONS.get(orientation)  # pyright: ignore
    swapped = {
        Image.Transpose.ROTATE_90: Image.Transpose.ROTATE_270,
        Image.Transpose.ROTATE_270: Image.Transpose.ROTATE_90,
    }
    stored = upright if undo is None else upright.transpose(swapped.get(undo, undo))
    exif = Image.Exif()
    exif[274] = orientation
    options: dict[str, object] = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(form, {})
    opened = image.open(encoded(stored, form, exif=exif, **options))
    assert opened.size == (32, 16)
    assert np.abs(np.asarray(opened).astype(int) - np.asarray(upright)).max() <= 8  # JPEG's loss at an edge


def test_opening_twice_turns_once() -> None:
    exif = Image.Exif()
    exif[274] = 6
    once = image.open(encoded(picture(), "JPEG", exif=exif))
    assert same(image.open(once), once)


def test_a_damaged_exif_block_does_not_hide_a_sound_picture() -> None:
    data = encoded(picture(), "JPEG", exif=b"Exif\0\0MM\0\x2a\xff\xff\xff\xff nonsense")
    assert image.open(data).size == (40, 30)


def test_the_source_image_is_left_alone() -> None:
    source = picture()
    source.info["dpi"] = (72, 72)
    image.open(source).putpixel((0, 0), (1, 2, 3))
    assert same(source, picture())
    assert source.info == {"dpi": (72, 72)}


def test_heic_opens_upright_with_its_extra() -> None:
    pillow_heif = pytest.importorskip("pillow_heif", reason='needs pip install "blip2[heic]"')
    source = Image.new("RGB", (64, 32), RED)
    exif = Image.Exif()
    exif[274] = 6
    buffer = io.BytesIO()
    pillow_heif.from_pillow(source).save(buffer, exif=exif.tobytes())
    opened = image.open(buffer.getvalue())
    assert opened.size == (32, 64)
    assert np.abs(np.asarray(opened).astype(int) - RED).max() <= 8  # pyright: ignore
    with pytest.raises(ImageError, match="max_pixels"):
        image.open(buffer.getvalue(), max_pixels=100)


def test_heic_without_its_extra_names_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pillow_heif", None)
    photo = tmp_path / "IMG_0001.HEIC"
    for brands in (b"heic\0\0\0\0mif1heic", b"mif1\0\0\0\0mif1heic"):
        photo.write_bytes(b"\0\0\0\x18ftyp" + brands + bytes(100))
        with pytest.raises(MissingExtraError, match=r"IMG_0001\.HEIC.*blip2\[heic\]"):
            image.open(photo)


# -- what does not open -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("content", "problem"), [
    (b"", "empty"),
    (b"these are words, not a picture", "not an image"),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
    (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
    (encoded(picture(), "JPEG")[:20], "not an image"),
    (encoded(picture(), "JPEG")[:-200], "cut short"),
    (encoded(picture(), "PNG")[:-200], "cut short"),
    (encoded(picture(), "WEBP")[:-200], "cut short"),
])  # fmt: skip
def test_a_file_that_holds_no_whole_picture_is_named(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "broken.jpg"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=rf"broken\.jpg: .*{problem}"):
        image.open(path)


def test_a_path_that_is_no_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"absent\.png: does not exist"):
        image.open(tmp_path / "absent.png")
    with pytest.raises(ImageError, match="is a folder"):
        image.open(tmp_path)
    with pytest.raises(ImageError, match="no regular file"):
        image.open("/dev/zero")
    with pytest.raises(ImageError, match="cannot be"):
        image.open("A" * 10_000)
    with pytest.raises(ImageError, match="cannot be"):
        image.open("nul\0byte.png")


@pytest.mark.parametrize(("source", "problem"), [
    (np.zeros((2, 2, 2), np.uint8), "shape"),
    (np.zeros((1, 2, 2, 3), np.uint8), "shape"),
    (torch.zeros(2, 3, 4, 4), "shape"),
    (np.zeros((0, 4, 3), np.uint8), "no pixels"),
    (Image.new("RGB", (0, 3)), "no pixels"),
    (np.full((2, 2), 1.01), r"floats must lie in 0\.\.1"),
    (np.full((2, 2), -0.01), r"floats must lie in 0\.\.1"),
    (np.full((2, 2), np.nan), r"floats must lie in 0\.\.1"),
    (np.full((2, 2), 256), r"0\.\.255"),
    (np.zeros((2, 2), complex), "complex128"),
    (Image.fromarray(np.full((1, 1), 70000, np.int32)), "32-bit"),
    (io.StringIO("text"), "mode 'rb'"),
    (42, "is not an image"),
    (None, "is not an image"),
])  # fmt: skip
def test_values_that_are_no_picture_are_refused(source: object, problem: str) -> None:
    with pytest.raises(ImageError, match=problem):
        image.open(source)  # pyright: ignore


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_damaged_bytes_open_or_give_an_image_error_and_nothing_else(data: st.DataObject) -> None:
    form = data.draw(st.sampled_from(["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "ICO"]))
    damaged = bytearray(encoded(picture(16, 16), form))
    for _ in range(data.draw(st.integers(1, 8))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        opened = image.open(bytes(damaged), max_pixels=1 << 20)
    except ImageError:
        return
    assert opened.mode == "RGB"


def test_too_many_pixels_are_refused_before_they_are_decoded(tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(encoded(Image.new("1", (9000, 9000))))
    with pytest.raises(ImageError, match=r"bomb\.png: has 9000 x 9000 pixels, more than max_pixels = 80,000,000"):
        image.open(path, max_pixels=80_000_000)
    path.write_bytes(encoded(Image.new("1", (16_000, 16_000))))
    with pytest.raises(ImageError, match=r"bomb\.png"):  # Pillow's own limit
        image.open(path, max_pixels=1 << 40)


def test_a_stream_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image, "MAX_BYTES", 1 << 20)
    with Path("/dev/zero").open("rb") as endless, pytest.raises(ImageError, match="/dev/zero: is larger than 1 MiB"):
        image.open(endless)


def test_threads_open_without_disturbing_each_other() -> None:
    kinds = [encoded(picture(60, 50, seed), form) for seed in range(8) for form in ("PNG", "GIF", "BMP", "WEBP")]
    expected = [image.open(kind) for kind in kinds]
    limit = Image.MAX_IMAGE_PIXELS
    with ThreadPoolExecutor(8) as pool:
        for opened, alone in zip(pool.map(image.open, kinds * 4), expected * 4, strict=True):
            assert same(opened, alone)
    assert limit == Image.MAX_IMAGE_PIXELS


# -- pixels ---------------------------------------------------------------------------------------------------------


def test_pixels_equal_those_of_transformers_bit_by_bit() -> None:
    transformers = pytest.importorskip("transformers", reason='needs pip install "blip2[mini]"')
    transparent = picture(50, 70, 9).convert("RGBA")
    transparent.putalpha(Image.linear_gradient("L").resize((50, 70)))
    photos = [picture(640, 480), picture(99, 301, 1), picture(7, 5, 2), picture(224, 224, 3), transparent]
    photos += [picture(30, 40, 4).convert(mode) for mode in ("L", "CMYK", "P", "1")]
    for size in (30, 224):
        theirs = transformers.BlipImageProcessorPil(size={"height": size, "width": size})
        expected = theirs(photos, return_tensors="pt")["pixel_values"]
        pixels = image.Transform(size, CLIP_MEAN, CLIP_STD)([image.open(photo) for photo in photos])
        assert pixels.dtype == torch.float32
        assert pixels.is_contiguous()
        assert torch.equal(pixels, expected)


def test_one_image_is_a_batch_of_one_and_none_an_empty_batch() -> None:
    transform = image.Transform(8, CLIP_MEAN, CLIP_STD)
    assert torch.equal(transform(picture()), transform([picture()]))
    assert transform([]).shape == (0, 3, 8, 8)


def test_an_image_that_was_not_opened_is_refused() -> None:
    for view in (image.Transform(8, CLIP_MEAN, CLIP_STD), lambda x: image.RandomView(8, CLIP_MEAN, CLIP_STD)(x, 0)):
        with pytest.raises(ImageError, match=r"mode L, not RGB; .*image\.open"):
            view(Image.new("L", (4, 4)))


def test_a_random_view_comes_from_its_seed_alone() -> None:
    view, source = image.RandomView(16, CLIP_MEAN, CLIP_STD), picture(80, 60)
    first = view(source, 7)
    np.random.seed(0)
    torch.manual_seed(0)
    assert torch.equal(view(source, 7), first)
    assert first.shape == (3, 16, 16)
    assert first.is_contiguous()
    assert len({view(source, seed).numpy().tobytes() for seed in range(50)}) == 50


def test_a_view_of_everything_without_a_flip_is_the_plain_transform() -> None:
    source = picture(48, 48)
    views = (image.RandomView(16, CLIP_MEAN, CLIP_STD, scale=(1.0, 1.0), flip=False)(source, s) for s in range(300))
    plain = image.Transform(16, CLIP_MEAN, CLIP_STD)(source)[0]
    # only crops of ratio 1 hold the whole area of a square; when ten draws miss it the middle crop is all of it
    assert all(torch.equal(view, plain) for view in views)


def test_about_half_of_the_views_are_mirrored() -> None:
    ramp = Image.linear_gradient("L").rotate(90).convert("RGB")  # brightness grows from side to side
    view = image.RandomView(8, CLIP_MEAN, CLIP_STD)
    plain = image.RandomView(8, CLIP_MEAN, CLIP_STD, flip=False)
    slopes = [float((v[0, :, -1] - v[0, :, 0]).mean()) for v in (view(ramp, seed) for seed in range(400))]
    still = [float((v[0, :, -1] - v[0, :, 0]).mean()) for v in (plain(ramp, seed) for seed in range(50))]
    assert len({slope > 0 for slope in still}) == 1
    assert 140 < sum(slope > 0 for slope in slopes) < 260  # six standard deviations around 200


@settings(max_examples=300, deadline=None)
@given(
    width=st.integers(1, 3000), height=st.integers(1, 3000), low=st.floats(0.05, 1), seed=st.integers(0, 2**63)
)  # fmt: skip
def test_crops_lie_within_the_image_and_keep_area_and_shape(width: int, height: int, low: float, seed: int) -> None:
    view = image.RandomView(8, CLIP_MEAN, CLIP_STD, scale=(low, 1.0))
    left, top, right, bottom = view._box(width, height, np.random.default_rng(seed))  # pyright: ignore
    w, h = right - left, bottom - top
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    assert (w - 0.5) / (h + 0.5) <= 4 / 3 + 1e-9  # half a pixel of rounding on each side
    assert (w + 0.5) / (h - 0.5) >= 3 / 4 - 1e-9
    fallback = w in (width, width - 1) or h in (height, height - 1)
    assert fallback or (w + 0.5) * (h + 0.5) >= low * width * height


# -- finding files --------------------------------------------------------------------------------------------------


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def test_a_folder_is_searched_to_the_bottom_in_order_without_what_is_hidden(tmp_path: Path) -> None:
    touch(tmp_path, "b.JPG", "a.png", "notes.txt", ".hidden.png", ".git/x.png", "sub/c.webp", "sub/deep/d.heic")
    found = image.find_images([tmp_path])
    assert [path.relative_to(tmp_path).as_posix() for path in found] == [
        "a.png",
        "b.JPG",
        "sub/c.webp",
        "sub/deep/d.heic",
    ]


def test_patterns_and_files_mix_and_repeat_nothing(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "b.jpg", "c.txt", "sub/d.png", "odd[1].png", "no-extension")
    names = lambda *args: [p.relative_to(tmp_path).as_posix() for p in image.find_images([tmp_path / a for a in args])]  # noqa: E731
    assert names("*.png") == ["a.png", "odd[1].png"]
    assert names("**/*.png") == ["a.png", "odd[1].png", "sub/d.png"]
    assert names("*") == ["a.png", "b.jpg", "odd[1].png", "sub/d.png"]
    assert names("b.jpg", "*", "sub/../a.png") == ["b.jpg", "a.png", "odd[1].png", "sub/d.png"]
    assert names("odd[1].png") == ["odd[1].png"]
    assert names("no-extension", "c.txt") == ["no-extension", "c.txt"]


def test_paths_without_images_are_named(tmp_path: Path) -> None:
    touch(tmp_path, "notes.txt")
    for paths in ([tmp_path], [tmp_path / "*.png"]):
        with pytest.raises(ImageError, match="no images found"):
            image.find_images(paths)
    with pytest.raises(ImageError, match="no images found"):
        image.find_images([])
    with pytest.raises(ImageError, match=r"absent: does not exist"):
        image.find_images([tmp_path / "absent"])


def test_a_ring_of_links_is_no_endless_search(tmp_path: Path) -> None:
    touch(tmp_path, "a.png")
    (tmp_path / "ring").symlink_to(tmp_path)
    assert image.find_images([tmp_path]) == [tmp_path / "a.png"]
