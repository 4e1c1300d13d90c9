"""What comes from the browser as text (uploads, painted masks, points), and what goes back."""

from __future__ import annotations

import base64
import binascii
import io
import json
import math
from typing import Any

from PIL import Image

from ..errors import RetourError
from ..io import Limits, Picture, Size, png_bytes, read_upload
from .recipe import MAX_DRAGS

MAX_BYTES = 16 * 2**20
MAX_PIXELS = 24_000_000
MAX_SIDE = 12_000
KEPT = 2048  # No model works at more; a photo of a camera is reduced when it comes.
SHOWN = 512  # Smaller pictures are enlarged for the eye, larger ones reduced for the wire.

Drags = tuple[tuple[int, int, int, int], ...]


def limits(megabytes: float | None = None) -> Limits:
    """What an upload may measure."""
    size = MAX_BYTES if megabytes is None else int(megabytes * 2**20)
    return Limits(MAX_PIXELS, MAX_SIDE, size)


def read_file(text: str, allowed: Limits) -> Picture:
    """An uploaded picture: JSON of its `name` and its `data` URL.

    Raises:
        RetourError: it is too large, damaged, or no picture.
    """
    try:
        given = json.loads(text)
        name, data = str(given["name"])[-80:], str(given["data"])
    except (ValueError, KeyError, TypeError):
        raise RetourError("no file arrived: choose it once more") from None
    return read_upload(_content(data, name, allowed), name, allowed)


def reduced(image: Image.Image, side: int = KEPT) -> Image.Image:
    """A picture no longer than `side`, for every look at it costs its size."""
    if max(image.size) <= side:
        return image
    small = image.copy()
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    return small


def _content(data: str, name: str, allowed: Limits) -> bytes:
    head, comma, body = data.partition(",")
    if not head.startswith("data:") or not comma:
        raise RetourError(f"'{name}' did not arrive whole: choose it once more")
    if allowed.bytes is not None and len(body) > 4 * (allowed.bytes // 3 + 2):
        raise RetourError(
            f"'{name}' has about {len(body) * 3 // 4:,} bytes: make it smaller first, at most "
            f"{allowed.bytes:,}."
        )
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError):
        raise RetourError(f"'{name}' did not arrive whole: choose it once more") from None


def read_mask(text: str, size: Size, allowed: Limits) -> Image.Image | None:
    """A painted mask, as black and white "L" of the picture's size; None where nothing is painted.

    The page paints on a transparent canvas: what is painted at all is white.
    """
    if not text:
        return None
    painted = read_upload(_content(text, "the mask", allowed), "the mask", allowed)
    layer = painted.image.convert("L") if painted.alpha is None else painted.alpha
    mask = layer.resize(size, Image.Resampling.BILINEAR).point(lambda v: 255 if v >= 128 else 0)
    return mask if mask.getbbox() is not None else None


def read_points(text: str, size: Size) -> Drags:
    """Clicked points, [[x, y], ...] as fractions of the picture, in pairs; pixels come back.

    A last point without its partner is left out.
    """
    try:
        points = json.loads(text) if text else []
        pairs = [(float(x), float(y)) for x, y in points]
    except (ValueError, TypeError):
        raise RetourError("the drag points cannot be read: clear them and click again") from None
    if len(pairs) > 2 * MAX_DRAGS:
        raise RetourError(f"{len(pairs) // 2} drags are too many: at most {MAX_DRAGS}")
    if not all(math.isfinite(v) and 0 <= v <= 1 for pair in pairs for v in pair):
        raise RetourError("a drag point lies outside of the picture: clear them and click again")
    pixels = [_pixel(p, size) for p in pairs]
    return tuple((*a, *b) for a, b in zip(pixels[::2], pixels[1::2], strict=False))


def fractions(drags: Drags, size: Size) -> list[tuple[float, float]]:
    """Points that `read_points` reads as these drags: the middles of their pixels."""
    width, height = size
    ends = [end for a, b, c, d in drags for end in ((a, b), (c, d))]
    return [((x + 0.5) / width, (y + 0.5) / height) for x, y in ends]


def painting(mask: Image.Image) -> Image.Image:
    """A mask as the page paints it: colour where the edit may act, nothing elsewhere."""
    layer = Image.new("RGBA", mask.size, (255, 255, 255, 0))
    layer.putalpha(mask.convert("L"))
    return layer


def _pixel(point: tuple[float, float], size: Size) -> tuple[int, int]:
    x, y = (min(int(part * side), side - 1) for part, side in zip(point, size, strict=True))
    return x, y


# --- Back to the browser --------------------------------------------------------------------------


def data_url(content: bytes, kind: str = "image/png") -> str:
    """Bytes as a URL that holds them."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def shown(image: Image.Image, side: int = SHOWN) -> str:
    """A picture as a data URL, its longer side brought to `side` if it is far off."""
    longest = max(image.size)
    if longest < side or longest > 2 * side:
        scale = side / longest
        size = tuple(max(1, round(v * scale)) for v in image.size)
        image = image.resize(size, Image.Resampling.LANCZOS)  # type: ignore[arg-type]
    return _webp(image)


def thumbnail(image: Image.Image, side: int = 112) -> str:
    """A small picture as a data URL."""
    small = image.copy()
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    return _webp(small)


def _webp(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "WEBP", quality=90)
    return data_url(buffer.getvalue(), "image/webp")


def png_url(image: Image.Image, record: dict[str, Any] | None = None) -> str:
    """A picture as a data URL, every pixel kept."""
    return data_url(png_bytes(image, record))
