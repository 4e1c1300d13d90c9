"""Reading: whatever a user has becomes an upright 8-bit RGB image, or a `RetourError`."""

from __future__ import annotations

import io
import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
from PIL import Image, ImageOps

from ..errors import RetourError, check_finite
from .decoding import (
    MAX_PIXELS,
    MAX_SIDE,
    Limits,
    PictureWarning,
    Size,
    available_formats,
    check_readable,
    check_size,
    decoding,
    reason,
)

if TYPE_CHECKING:
    import torch

# Half a grey level: what resizing or half precision may overshoot without changing a picture.
FLOAT_SLACK = 0.5 / 255
_DEFAULT_LIMITS = Limits()


@dataclass(frozen=True)
class Picture:
    """An upright picture and what its source said beside the colours.

    Attributes:
        image: 8-bit RGB, transparent parts composited on white.
        name: the file's name, or the kind of object that it came from.
        alpha: opacity as an 8-bit "L" image of the same size; None where the source had none.
    """

    image: Image.Image
    name: str
    alpha: Image.Image | None = None

    @property
    def size(self) -> Size:
        """Width and height in pixels, the camera's rotation applied."""
        return self.image.size


def read_image(
    source: Any, *, max_pixels: int = MAX_PIXELS, max_side: int = MAX_SIDE
) -> Image.Image:
    """Read a picture as an upright 8-bit RGB image; see `read_picture`."""
    return read_picture(source, max_pixels=max_pixels, max_side=max_side).image


def read_picture(source: Any, *, max_pixels: int = MAX_PIXELS, max_side: int = MAX_SIDE) -> Picture:
    """Read a picture from whatever holds it.

    Args:
        source: a path; a PIL image; a NumPy array (H, W), (H, W, 3) or (H, W, 4) of uint8, uint16,
            bool or floats in [0, 1]; a torch tensor (C, H, W) of 1, 3 or 4 channels, uint8, bool or
            floats in [0, 1].
        max_pixels: refuse a larger area, before anything is decoded.
        max_side: refuse a larger width or height, before anything is decoded.

    Raises:
        RetourError: for anything that is not such a picture, whatever its decoder made of it.
    """
    limits = Limits(max_pixels, max_side)
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        return _flatten(_decode_file(path, limits), path.name, f"'{path}'")
    if isinstance(source, Image.Image):
        label = "the PIL image"
        return _flatten(_decode_pil(source, label, limits), "PIL image", label)
    if isinstance(source, numpy.ndarray):
        label = "the array"
        return _flatten(_decode_array(source, label, limits), "array", label)
    if _is_tensor(source):
        return _flatten(_decode_tensor(source, limits), "tensor", "the tensor")
    raise RetourError(
        f"cannot read a picture from an object of type {type(source).__name__}: "
        "pass a path, a PIL image, a NumPy array or a torch tensor."
    )


def read_upload(content: bytes, name: str, limits: Limits = _DEFAULT_LIMITS) -> Picture:
    """Read a picture from a file's bytes, which came from a stranger under some name.

    Args:
        content: the file's bytes.
        name: what the file is called, for messages; nothing is opened by it.
        limits: what it may measure.

    Raises:
        RetourError: for anything that is not such a picture.
    """
    label = f"'{name}'"
    if not content:
        raise RetourError(f"{label} is empty (0 bytes): save or download it again.")
    if limits.bytes is not None and len(content) > limits.bytes:
        raise RetourError(
            f"{label} has {len(content):,} bytes: make it smaller first, at most {limits.bytes:,}."
        )
    with decoding(label, limits.pixels):
        image = Image.open(io.BytesIO(content), formats=available_formats())
    with image:
        return _flatten(_decode_pil(image, label, limits), name, label)


def _decode_file(path: Path, limits: Limits) -> Image.Image:
    check_readable(path)
    label = f"'{path}'"
    with decoding(label, limits.pixels):
        image = Image.open(path, formats=available_formats())
    with image:
        return _decode_pil(image, label, limits)


def _decode_pil(image: Image.Image, label: str, limits: Limits) -> Image.Image:
    check_size(image.size, label, limits)
    with decoding(label):
        image.load()
        _warn_if_animated(image, label)
        upright = _upright(image, label)
    if upright.mode.startswith("I") or upright.mode == "F":
        return _decode_array(_deep_pixels(upright, label), label, limits)
    return upright


def _warn_if_animated(image: Image.Image, label: str) -> None:
    # The further pictures in a camera's MPO file are previews, which nobody means.
    if getattr(image, "is_animated", False) and image.format != "MPO":
        frames = getattr(image, "n_frames", "several")
        warnings.warn(
            PictureWarning(f"{label} has {frames} frames: only one is used"), stacklevel=2
        )


def _upright(image: Image.Image, label: str) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception as error:  # damaged EXIF raises nearly any type; the pixels are sound
        text = f"{label} has damaged EXIF data ({reason(error)}): it is used without rotation"
        warnings.warn(PictureWarning(text), stacklevel=2)
        return image.copy()


def _deep_pixels(image: Image.Image, label: str) -> numpy.ndarray:
    """Give the pixels of a deep grey image as uint16 or float (H, W).

    PIL has 16-bit files in 32 bits at times, so 32-bit values are on the scale of 16.
    """
    pixels = numpy.asarray(image)
    if image.mode == "F":
        return pixels
    top = numpy.iinfo(numpy.uint16).max
    if pixels.min() < 0 or pixels.max() > top:
        raise RetourError(
            f"{label} has grey values from {pixels.min()} to {pixels.max()}: "
            f"scale them to 16 bit (0 to {top}) first."
        )
    return pixels.astype(numpy.uint16)


def _decode_array(array: numpy.ndarray, label: str, limits: Limits) -> Image.Image:
    if array.ndim != 2 and not (array.ndim == 3 and array.shape[2] in (1, 3, 4)):
        raise RetourError(
            f"{label} has shape {tuple(array.shape)}: pass (H, W), (H, W, 3) or (H, W, 4)."
        )
    check_size((array.shape[1], array.shape[0]), label, limits)
    pixels = _to_8_bit(array, label)
    return Image.fromarray(pixels[..., 0] if pixels.shape[2:] == (1,) else pixels)


def _to_8_bit(array: numpy.ndarray, label: str) -> numpy.ndarray:
    if array.dtype == numpy.bool_:
        return array * numpy.uint8(255)
    if array.dtype == numpy.uint8:
        return numpy.ascontiguousarray(array)
    if array.dtype == numpy.uint16:
        # 65535 / 255 = 257; adding half of it first rounds to the nearest.
        return ((array.astype(numpy.uint32) + 128) // 257).astype(numpy.uint8)
    if not numpy.issubdtype(array.dtype, numpy.floating):
        raise RetourError(
            f"{label} holds {array.dtype} values: pass uint8, uint16, bool or floats in [0, 1]."
        )
    check_finite(array, f"the pixels of {label}", "replace them by numbers in [0, 1]")
    low, high = float(array.min()), float(array.max())
    if low < -FLOAT_SLACK or high > 1 + FLOAT_SLACK:
        raise RetourError(
            f"{label} has float values from {low:g} to {high:g}: scale them to [0, 1]."
        )
    return numpy.rint(array.clip(0, 1).astype(numpy.float64) * 255).astype(numpy.uint8)


def _is_tensor(source: Any) -> bool:
    # Whoever holds a tensor has imported torch already.
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(source, torch.Tensor)


def _decode_tensor(tensor: torch.Tensor, limits: Limits) -> Image.Image:
    label = "the tensor"
    if tensor.ndim != 3 or tensor.shape[0] not in (1, 3, 4):
        raise RetourError(
            f"{label} has shape {tuple(tensor.shape)}: pass one picture (C, H, W) "
            "with 1, 3 or 4 channels."
        )
    check_size((tensor.shape[2], tensor.shape[1]), label, limits)
    # NumPy has no bfloat16.
    values = tensor.detach().cpu()
    pixels = (values.float() if values.is_floating_point() else values).numpy()
    return _decode_array(numpy.moveaxis(pixels, 0, -1), label, limits)


def _flatten(image: Image.Image, name: str, label: str) -> Picture:
    with decoding(label):
        if not image.has_transparency_data:
            return Picture(image.convert("RGB"), name)
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        opaque = Image.alpha_composite(white, layer).convert("RGB")
        return Picture(opaque, name, layer.getchannel("A"))
