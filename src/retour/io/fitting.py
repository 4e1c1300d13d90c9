"""Fitting pictures to a model's size and back.

The canvas W x H, in cells of `multiple` pixels, lies nearest to the picture's own aspect ratio
a = w / h and to the model's native area n^2: the least

    |log(W / H) - log(a)| + |log(W H / n^2)| / 4
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy
from PIL import Image

from ..errors import RetourError, check_range, unknown
from .decoding import Size

Box: TypeAlias = tuple[int, int, int, int]

AREA_WEIGHT = 0.25
MAX_AREA_GROWTH = 1.5


@dataclass(frozen=True)
class Placement:
    """Where a picture lies on a model's canvas; takes pictures there and back.

    Attributes:
        original: the picture's size.
        canvas: the model's size.
        source: the part of the picture that is shown, (left, top, right, bottom).
        target: the part of the canvas that shows it, (left, top, right, bottom).
        duration: milliseconds that a frame of a clip is shown; None for a picture.
    """

    original: Size
    canvas: Size
    source: Box
    target: Box
    duration: float | None = None

    @classmethod
    def plan(cls, original: Size, canvas: Size, mode: str = "stretch") -> Placement:
        """Plan the way from a size to a canvas.

        Args:
            original: size of the pictures to place.
            canvas: the size that they shall have.
            mode: "stretch" fills the canvas with the whole picture; "pad" keeps the aspect ratio
                and repeats the picture's edges around it; "crop" keeps it and cuts the edges off.
        """
        if mode not in PLANS:
            raise unknown("fitting mode", mode, PLANS)
        source, target = PLANS[mode](original, canvas)
        return cls(original, canvas, source, target)

    def told(self) -> dict[str, Any]:
        """As plain values, for a record."""
        return {key: value for key, value in vars(self).items() if value is not None}

    @classmethod
    def read(cls, told: Mapping[str, Any]) -> Placement:
        """Take it from a record."""
        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in told.items()}
        return cls(**plain)

    def place(self, image: Image.Image) -> Image.Image:
        """Bring a picture (or its mask) of the original size to the canvas."""
        _check_same_size("the picture", image.size, self.original)
        size = _box_size(self.target)
        shown = image.resize(size, Image.Resampling.LANCZOS, box=self.source)
        return shown if size == self.canvas else self._surround(shown)

    def restore(self, image: Image.Image, base: Image.Image | None = None) -> Image.Image:
        """Bring a canvas, of any resolution, back to the original size.

        Args:
            image: the canvas, or the same at another scale.
            base: the original picture; it gives what a crop had cut off.
        """
        # Multiplied before it is divided: a box that fills the canvas fills the image exactly.
        (left, top, right, bottom), (width, height) = self.target, self.canvas
        across, down = image.size
        start = (left * across / width, top * down / height)
        stop = (right * across / width, bottom * down / height)
        size = _box_size(self.source)
        shown = image.resize(size, Image.Resampling.LANCZOS, box=start + stop)
        return shown if shown.size == self.original else self._paste(shown, base)

    def _surround(self, shown: Image.Image) -> Image.Image:
        left, top, right, bottom = self.target
        pixels = numpy.asarray(shown)
        around = [(top, self.canvas[1] - bottom), (left, self.canvas[0] - right)]
        around += [(0, 0)] * (pixels.ndim - 2)
        return Image.fromarray(numpy.pad(pixels, around, mode="edge"))

    def _paste(self, shown: Image.Image, base: Image.Image | None) -> Image.Image:
        if base is None:
            raise RetourError(
                f"the picture of {_times(self.original)} was cropped to {_times(shown.size)}: "
                "pass the original as base to fill in what was cut off."
            )
        _check_same_size("base", base.size, self.original)
        whole = base.convert(shown.mode)
        whole.paste(shown, self.source[:2])
        return whole


def fit(
    image: Image.Image, *, native: int, multiple: int = 1, mode: str = "stretch"
) -> tuple[Image.Image, Placement]:
    """Resize a picture to a size that a model takes, its aspect ratio kept as nearly as that goes.

    Args:
        image: a picture of any size.
        native: the side of the square that the model was made for, in pixels.
        multiple: what both sides must be multiples of, in pixels.
        mode: what to do about the rest of the aspect ratio; see `Placement.plan`.

    Returns:
        The fitted picture, and the placement that brings a result back to the original size.
    """
    placement = Placement.plan(image.size, canvas_size(image.size, native, multiple), mode)
    return placement.place(image), placement


def canvas_size(size: Size, native: int, multiple: int = 1) -> Size:
    """Choose the canvas for a picture; the formula is in the module's docstring.

    Its area stays below 1.5 native^2 (or one row of cells), also for the longest strip.
    """
    check_range("multiple", multiple, 1)
    check_range("native size", native, multiple)
    side = native / multiple
    ratio = max(size) / min(size)

    def cost(cells: Size) -> float:
        long, short = cells
        return abs(math.log(long / short / ratio)) + AREA_WEIGHT * abs(
            math.log(long * short / side**2)
        )

    long, short = min(_canvas_candidates(side, ratio), key=cost)
    width, height = (long, short) if size[0] >= size[1] else (short, long)
    return width * multiple, height * multiple


def _canvas_candidates(side: float, ratio: float) -> Iterator[Size]:
    """List (long, short) sides in cells, for areas of about `side`^2."""
    for short in range(1, math.ceil(side) + 1):
        largest = int(MAX_AREA_GROWTH * side**2 / short)
        yield max(short, min(round(short * ratio), largest)), short


def _plan_stretch(original: Size, canvas: Size) -> tuple[Box, Box]:
    return (0, 0, *original), (0, 0, *canvas)


def _plan_pad(original: Size, canvas: Size) -> tuple[Box, Box]:
    return (0, 0, *original), _centred(original, canvas)


def _plan_crop(original: Size, canvas: Size) -> tuple[Box, Box]:
    return _centred(canvas, original), (0, 0, *canvas)


PLANS = {"stretch": _plan_stretch, "pad": _plan_pad, "crop": _plan_crop}


def _centred(shape: Size, inside: Size) -> Box:
    """Give the largest centred box with the aspect ratio of `shape` that lies within `inside`."""
    scale = min(inside[0] / shape[0], inside[1] / shape[1])
    width, height = (max(1, round(side * scale)) for side in shape)
    left, top = (inside[0] - width) // 2, (inside[1] - height) // 2
    return left, top, left + width, top + height


def _box_size(box: Box) -> Size:
    left, top, right, bottom = box
    return right - left, bottom - top


def _times(size: Size) -> str:
    return f"{size[0]:,} x {size[1]:,} pixels"


def _check_same_size(what: str, size: Size, wanted: Size) -> None:
    if size != wanted:
        raise RetourError(f"{what} has {_times(size)}: pass one of {_times(wanted)}.")
