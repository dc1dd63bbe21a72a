"""Images: opened safely, and turned into the exact pixels that an encoder was trained on.

```
path, bytes, file, array, tensor ─ open ─► RGB ─ Transform (or RandomView, in training) ─► pixels (B,3,S,S)
```
Letters: B images, H W pixels of the source, S side of the encoder's input, C channels.
"""

from __future__ import annotations

import contextlib
import glob
import io
import math
import os
import stat
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeAlias, cast

import numpy as np
import numpy.typing as npt
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from blip2 import web
from blip2.arrays import Array, channels_last, from_array
from blip2.errors import ImageError, MissingExtraError

Source: TypeAlias = str | os.PathLike[str] | bytes | bytearray | memoryview | IO[bytes] | Image.Image | Array | Tensor

MAX_PIXELS = 89_478_485  # a quarter of a GiB as RGB; Pillow warns above it and refuses twice as many
MAX_BYTES = 1 << 28  # of a stream or a download, which have no size to ask for beforehand

# Decoders that only parse: the others that Pillow knows start programs (EPS) or take any bytes for theirs (TGA).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "ICO")
_USUAL = (".jpg", ".jpeg", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic")
EXTENSIONS = frozenset((*_USUAL, ".heif", ".jp2", ".ppm", ".pgm", ".pbm", ".pnm", ".ico"))
_HEIC_BRANDS = frozenset((b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"hevm", b"hevs"))
_ORIENTATIONS = {  # Exif 2.3, tag 274: how to undo each
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def open(source: Source, *, max_pixels: int = MAX_PIXELS, allow_urls: bool = False) -> Image.Image:
    """Any image as upright RGB, transparency laid on white; the result shares nothing with the source.

    Args:
        source: a path, the bytes of a file, a binary file object, a PIL image (its current frame), a numpy array
            (H, W) or (H, W, 1|3|4), or a tensor, (C, H, W) or the array's shapes. Arrays and tensors hold uint8, bool,
            uint16 (65535 is white), other integers from 0 to 255, or floats from 0 to 1. Of an animation, the first
            frame. HEIC needs the extra `heic`.
        max_pixels: refuse larger ones before decoding; above twice `MAX_PIXELS` Pillow's own limit also holds.
        allow_urls: fetch a string that starts with http:// or https://.
    Raises:
        ImageError: the source is missing, empty, damaged, too large or no image; the message names it.
        MissingExtraError: it is HEIC, and the extra is not installed.
    """
    name = _name(source)
    with _explained(name):
        if isinstance(source, Image.Image):
            _check_size(source.size, max_pixels)
            return _upright_rgb(source)
        if isinstance(source, np.ndarray | Tensor):
            image = from_array(channels_last(source))
            _check_size(image.size, max_pixels)
            return _upright_rgb(image)
        if isinstance(source, str) and source.lower().startswith(web.SCHEMES):
            if not allow_urls:
                raise ImageError(f"{name}: is a URL, and fetching is off; download it, or pass allow_urls=True")
            return _decode(io.BytesIO(web.fetch(source, MAX_BYTES)), name, max_pixels)
        if isinstance(source, str | os.PathLike):
            with _regular_file(Path(source)) as file:
                return _decode(file, name, max_pixels)
        if isinstance(source, bytes | bytearray | memoryview):
            return _decode(io.BytesIO(source), name, max_pixels)
        if hasattr(source, "read"):
            return _decode(io.BytesIO(_bounded(source)), name, max_pixels)
        raise ImageError("is not an image; pass a path, bytes, a file object, a PIL image, an array or a tensor")


@dataclass(frozen=True)
class Transform:
    """The transform of evaluation: squeezed to a square, scaled to 0..1, normalised. Equal to transformers' bit by bit.

    Attributes:
        size: side of the square in pixels.
        mean, std: of each channel on 0..1.
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __call__(self, images: Image.Image | Sequence[Image.Image]) -> Tensor:
        """Pixels of images that `open` gave.

        Returns:
            float32[B, 3, S, S], contiguous; one image is a batch of one.
        Raises:
            ImageError: an image is not RGB.
        """
        batch = [images] if isinstance(images, Image.Image) else images
        squares = np.empty((len(batch), self.size, self.size, 3), np.uint8)
        for row, image in enumerate(batch):
            squares[row] = self.square(image)
        return self.normalised(torch.from_numpy(squares))  # (B, 3, S, S)

    def square(self, image: Image.Image) -> npt.NDArray[np.uint8]:
        """The image squeezed, uint8[S, S, 3]: a quarter of the bytes of its pixels, to be kept and moved.

        Raises:
            ImageError: the image is not RGB.
        """
        _check_rgb(image)
        return np.asarray(image.resize((self.size, self.size), Image.Resampling.BICUBIC))

    def fits(self, images: object) -> bool:
        """Whether these are squares already, one after another: what another squeeze would leave as it is."""
        if not isinstance(images, Tensor) or images.dtype != torch.uint8:
            return False
        return len(images) > 0 and tuple(images.shape[1:]) == (self.size, self.size, 3)

    def normalised(self, squares: Tensor) -> Tensor:
        """Pixels of squares, on whichever device they are: uint8[B, S, S, 3] to float32[B, 3, S, S], contiguous.

        By a table, as an 8-bit value has no more than 256 results: the same bits on every device.
        """
        table = torch.from_numpy(_table(self.mean, self.std)).to(squares.device)  # (3, 256)
        pixels = torch.empty(len(squares), 3, self.size, self.size, device=squares.device)
        for channel in range(3):
            pixels[:, channel] = table[channel][squares[..., channel].int()]
        return pixels


@dataclass(frozen=True)
class RandomView:
    """The transform of training: a random resized crop and a flip, drawn from a seed alone.

    Attributes:
        size, mean, std: as of `Transform`.
        scale: the share of the area that a crop keeps, at least and at most.
        flip: mirror every second view.

    Source: BLIP-2, section 3.4; Szegedy et al. 2014, section 6 (the crop).
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    scale: tuple[float, float] = (0.5, 1.0)
    flip: bool = True

    def __call__(self, image: Image.Image, seed: int) -> Tensor:
        """One view of an image that `open` gave: float32[3, S, S], the same for the same image and seed.

        Raises:
            ImageError: the image is not RGB.
        """
        _check_rgb(image)
        draw = np.random.default_rng(seed)
        view = image.crop(self._box(image.width, image.height, draw))
        view = view.resize((self.size, self.size), Image.Resampling.BICUBIC)
        if self.flip and draw.random() < 0.5:
            view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return torch.from_numpy(_normalise(view, self.mean, self.std))  # (3, S, S)

    def _box(self, width: int, height: int, draw: np.random.Generator) -> tuple[int, int, int, int]:
        """A crop of the wanted area with sides between 3:4 and 4:3; the largest such in the middle if none fits."""
        narrowest, widest = 3 / 4, 4 / 3
        for _ in range(10):  # tries, as in the recipe of Inception
            area = width * height * draw.uniform(*self.scale)
            ratio = math.exp(draw.uniform(math.log(narrowest), math.log(widest)))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                left, top = int(draw.integers(width - w + 1)), int(draw.integers(height - h + 1))
                return left, top, left + w, top + h
        w = min(width, max(1, round(height * widest)))
        h = min(height, max(1, round(width / narrowest)))
        left, top = (width - w) // 2, (height - h) // 2
        return left, top, left + w, top + h


def find_images(paths: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """The image files that some paths stand for, each once, in the order of the arguments.

    Args:
        paths: files, taken whatever they are called; folders, searched to the bottom for files with an image's
            extension (sorted; hidden files and folders left out; links to folders not followed); patterns such as
            `photos/**/*.jpg`, whose matches are searched likewise.
    Raises:
        ImageError: a path does not exist, or nothing is found.
    """
    given = [Path(path) for path in paths]
    found: dict[str, Path] = {}
    for path in given:
        for image in _expand(path):
            found.setdefault(os.path.abspath(image), image)  # noqa: PTH100  (resolve() would follow links)
    if not found:
        where = ", ".join(str(path) for path in given) or "an empty list of paths"
        raise ImageError(f"{where}: no images found; looked for {' '.join(sorted(EXTENSIONS))}")
    return list(found.values())


def _expand(path: Path) -> Iterator[Path]:
    if path.is_dir():
        for folder, folders, files in os.walk(path):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            yield from (Path(folder, name) for name in sorted(files) if _looks_like_image(name))
    elif os.path.lexists(path):
        yield path
    elif glob.has_magic(str(path)):
        for match in sorted(glob.glob(str(path), recursive=True)):  # noqa: PTH207  (Path.glob takes no absolute pattern)
            if Path(match).is_dir() or _looks_like_image(Path(match).name):
                yield from _expand(Path(match))
    else:
        raise ImageError(f"{path}: does not exist; give a file, a folder or a pattern such as 'photos/*.jpg'")


def _looks_like_image(name: str) -> bool:
    return not name.startswith(".") and Path(name).suffix.lower() in EXTENSIONS


def _name(source: object) -> str:
    """What a message calls the source."""
    if isinstance(source, str | os.PathLike):
        return os.fspath(cast("str | os.PathLike[str]", source))[:200]
    if isinstance(source, bytes | bytearray | memoryview):
        return f"<{len(source)} bytes>"
    if isinstance(source, np.ndarray | Tensor):
        return f"<{type(source).__name__} {tuple(source.shape)} {source.dtype}>"
    named = getattr(source, "name", None) or getattr(source, "filename", None)
    return named if isinstance(named, str) else f"<{type(source).__name__}>"


@contextlib.contextmanager
def _explained(name: str) -> Generator[None]:
    """Whatever goes wrong inside becomes an ImageError that begins with the name of the input."""
    try:
        yield
    except MissingExtraError:
        raise
    except ImageError as error:
        raise ImageError(f"{name}: {error}") from error.__cause__
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{name}: has too many pixels to be opened safely ({error}); make it smaller") from error
    except UnidentifiedImageError:
        raise ImageError(
            f"{name}: is not an image, or its beginning is damaged; readable are {', '.join(FORMATS)} and HEIC"
        ) from None
    except Exception as error:  # on damaged bytes decoders raise nearly anything
        raise ImageError(f"{name}: cannot be read, it may be damaged or cut short ({error})") from error


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width * height == 0:
        raise ImageError(f"has no pixels ({width} x {height})")
    if width * height > max_pixels:
        raise ImageError(f"has {width} x {height} pixels, more than max_pixels = {max_pixels:,}; make it smaller")


def _check_rgb(image: Image.Image) -> None:
    if image.mode != "RGB":
        raise ImageError(f"{_name(image)}: is in mode {image.mode}, not RGB; pass it through image.open first")


@contextlib.contextmanager
def _regular_file(path: Path) -> Generator[IO[bytes]]:
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise ImageError("is a folder, not a picture; name a file in it (in Python, image.find_images lists them)")
        if not stat.S_ISREG(mode):
            raise ImageError("is no regular file; pass a file, or its bytes")
        file = path.open("rb")
    except FileNotFoundError:
        raise ImageError("does not exist; check the path") from None
    except OSError as error:
        raise ImageError(f"cannot be opened: {error.strerror}") from None
    with file:
        yield file


def _bounded(stream: IO[bytes]) -> bytes:
    """All that is left in a stream."""
    data = stream.read(MAX_BYTES + 1)
    if not isinstance(data, bytes):  # pyright: ignore[reportUnnecessaryIsInstance]  (users open files as text)
        raise ImageError("gives text, not bytes; open the file in mode 'rb'")
    if len(data) > MAX_BYTES:
        raise ImageError(f"is larger than {MAX_BYTES >> 20} MiB; save it to a file first")
    return data


def _decode(file: IO[bytes], name: str, max_pixels: int) -> Image.Image:
    """The first picture in an encoded file."""
    head = file.read(64)
    if not head:
        raise ImageError("is empty (0 bytes); copy or download it again")
    file.seek(0)
    if _is_heic(head):
        return _decode_heic(file, name, max_pixels)
    Image.init()
    with Image.open(file, formats=[form for form in FORMATS if form in Image.OPEN]) as image:
        _check_size(image.size, max_pixels)
        return _upright_rgb(image)


def _is_heic(head: bytes) -> bool:
    """Whether a file's first box says HEIC: ISO/IEC 23008-12, annex B."""
    if head[4:8] != b"ftyp":
        return False
    brands = head[8 : int.from_bytes(head[:4], "big")]
    return any(brands[start : start + 4] in _HEIC_BRANDS for start in range(0, len(brands), 4))


def _decode_heic(file: IO[bytes], name: str, max_pixels: int) -> Image.Image:
    try:
        import pillow_heif
    except ImportError:
        raise MissingExtraError(f"{name}: reading HEIC", "heic") from None
    heic = pillow_heif.open_heif(file)
    _check_size(heic.size, max_pixels)
    return _upright_rgb(heic.to_pillow())


def _upright_rgb(image: Image.Image) -> Image.Image:
    """A new RGB image: turned as its EXIF says, transparency on white."""
    image.load()
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # a damaged EXIF block raises nearly anything, and is no reason to refuse a sound picture
        orientation = None
    flat = _flatten(image)
    if orientation in _ORIENTATIONS:
        flat = flat.transpose(_ORIENTATIONS[orientation])
    flat.info = {}  # or the orientation would be applied again by whoever opens the result
    return flat


def _flatten(image: Image.Image) -> Image.Image:
    transparency = image.info.get("transparency")
    if image.mode in ("F", "I") or image.mode.startswith("I;16"):
        return _flatten_deep(np.asarray(image), image.mode, transparency)
    if "A" in image.getbands() or "a" in image.getbands() or transparency is not None:
        if image.mode == "La":  # Pillow converts premultiplied grey to LA only
            image = image.convert("LA")
        colours = image.convert("RGBA")
        white = Image.new("RGBA", colours.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, colours).convert("RGB")
    return image.convert("RGB")


def _flatten_deep(values: Array, mode: str, transparent: object) -> Image.Image:
    """Grey of more than 8 bits, which Pillow itself would clip to 0..255."""
    if mode == "I":  # Pillow's PNG and PPM keep 16 bits in it
        if values.min() < 0 or values.max() > 65535:
            raise ImageError(f"has 32-bit values from {values.min()} to {values.max()}; save it with 8 or 16 bits")
        values = values.astype(np.uint16)
    if isinstance(transparent, int):
        values = np.where(values == transparent, np.asarray(65535, values.dtype), values)
    return from_array(values).convert("RGB")


def _normalise(image: Image.Image, mean: tuple[float, ...], std: tuple[float, ...]) -> npt.NDArray[np.float32]:
    """float32[3, H, W] of an RGB image."""
    table = _table(mean, std)
    values = np.asarray(image)  # (H, W, 3)
    return np.stack([table[channel][values[:, :, channel]] for channel in range(3)])


def _table(mean: tuple[float, ...], std: tuple[float, ...]) -> npt.NDArray[np.float32]:
    """What each 8-bit value becomes in each channel: float32[3, 256]."""
    scaled = np.arange(256, dtype=np.float32) / np.float32(255)
    offset, spread = np.asarray(mean, np.float32), np.asarray(std, np.float32)
    return (scaled - offset[:, None]) / spread[:, None]
