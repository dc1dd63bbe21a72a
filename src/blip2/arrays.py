"""Images that are arrays or tensors of whatever numbers."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from blip2.errors import ImageError

Array: TypeAlias = npt.NDArray[Any]


def channels_last(array: Array | Tensor) -> Array:
    """An image's array as (H, W) or (H, W, C) in the machine's memory.

    Args:
        array: those shapes, or as a tensor also (C, H, W), on any device.
    """
    if isinstance(array, np.ndarray):
        return array
    tensor = array.detach().cpu()
    if tensor.dtype == torch.bfloat16:  # numpy has none
        tensor = tensor.float()
    if tensor.ndim == 3 and tensor.shape[0] in (1, 3, 4):
        tensor = tensor.permute(1, 2, 0)
    return tensor.numpy()


def from_array(array: Array) -> Image.Image:
    """An 8-bit image of an array (H, W) or (H, W, 1|3|4).

    Raises:
        ImageError: another shape, no pixels, or values that are no colours.
    """
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise ImageError("has the wrong shape: one image is (H, W) or (H, W, 1|3|4); as a tensor also (1|3|4, H, W)")
    if array.size == 0:
        raise ImageError("has no pixels")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    return Image.fromarray(np.ascontiguousarray(_to_uint8(array)))


def _to_uint8(array: Array) -> npt.NDArray[np.uint8]:
    """Values on 0..255, rounded; nothing is clipped: what lies outside is an error."""
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * np.uint8(255)
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:  # either byte order
        return ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)
    low, high = array.min(), array.max()
    if np.issubdtype(array.dtype, np.integer):
        if low < 0 or high > 255:
            raise ImageError(f"has values from {low} to {high}; integers must lie in 0..255 (uint16: 0..65535)")
        return array.astype(np.uint8)
    if np.issubdtype(array.dtype, np.floating):
        scaled = np.rint(array.astype(np.float64) * 255)
        if not (scaled.min() >= 0 and scaled.max() <= 255):  # NaN as well
            raise ImageError(f"has values from {low} to {high}; floats must lie in 0..1")
        return scaled.astype(np.uint8)
    raise ImageError(f"has the type {array.dtype}; use uint8, uint16 or floats in 0..1")
