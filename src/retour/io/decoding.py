"""What may be opened at all, and one sentence for whatever a decoder makes of it."""

from __future__ import annotations

import contextlib
import os
import stat
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from PIL import Image, UnidentifiedImageError

from ..errors import RetourError

Size: TypeAlias = tuple[int, int]
Pathlike: TypeAlias = str | os.PathLike[str]

MAX_PIXELS = 64_000_000
MAX_SIDE = 20_000

# Raster formats only: for PostScript, PIL would start an outside interpreter.
READABLE = {"AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP"}


class PictureWarning(UserWarning):
    """A picture was read, but not everything in its file was used."""


@dataclass(frozen=True)
class Limits:
    """What a picture may measure, in pixels of its area and of its longer side, and in bytes."""

    pixels: int = MAX_PIXELS
    side: int = MAX_SIDE
    bytes: int | None = None


def check_readable(path: Path) -> None:
    """Refuse a path that is not a regular file with something in it."""
    try:
        status = path.stat()
    except FileNotFoundError:
        raise RetourError(f"there is no file '{path}': check the path.") from None
    except (OSError, ValueError) as error:
        raise RetourError(f"cannot read '{path}' ({reason(error)}): check the path.") from error
    if stat.S_ISDIR(status.st_mode):
        raise RetourError(f"'{path}' is a folder: name one picture in it.")
    if not stat.S_ISREG(status.st_mode):
        raise RetourError(f"'{path}' is not a regular file: save the picture to a file first.")
    if status.st_size == 0:
        raise RetourError(f"'{path}' is empty (0 bytes): save or download it again.")
    if not os.access(path, os.R_OK):
        raise RetourError(f"you may not read '{path}': change its permissions.")


def available_formats() -> list[str]:
    """Formats that are both allowed and known to this Pillow."""
    Image.init()
    return sorted(READABLE & Image.OPEN.keys())


@contextlib.contextmanager
def decoding(label: str, most: int = MAX_PIXELS) -> Iterator[None]:
    """Make one sentence of whatever a decoder raises, and let only our own warnings out.

    `most` is how many pixels a picture may have, to say so where Pillow itself refuses it.
    """
    with _translating(label, most), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        if issubclass(warning.category, PictureWarning):
            warnings.warn(warning.message, stacklevel=2)


@contextlib.contextmanager
def _translating(label: str, most: int) -> Iterator[None]:
    try:
        yield
    except RetourError:
        raise
    except Image.DecompressionBombError as error:
        raise RetourError(
            f"{label} has far too many pixels: make it smaller first, at most {most:,}."
        ) from error
    except UnidentifiedImageError as error:
        raise RetourError(
            f"{label} is not a picture of a known format: convert it to PNG, JPEG or WebP."
        ) from error
    except Exception as error:  # damaged files make decoders raise nearly any type
        raise RetourError(
            f"{label} is damaged or cannot be decoded ({reason(error)}): save it again as PNG."
        ) from error


def reason(error: BaseException) -> str:
    """What an exception says, as the end of a sentence."""
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return said.rstrip(".").replace("\n", " ") or type(error).__name__


def check_size(size: Size, label: str, limits: Limits) -> None:
    """Refuse a size beyond the limits, before anything is decoded."""
    width, height = size
    if width < 1 or height < 1:
        raise RetourError(f"{label} has no pixels ({width} x {height}): pass a picture with some.")
    if max(size) > limits.side or width * height > limits.pixels:
        raise RetourError(
            f"{label} is {width:,} x {height:,} pixels: make it smaller first, at most "
            f"{limits.side:,} a side and {limits.pixels:,} in all."
        )
