"""Drags as users give them, in pixels of the picture, and as the model sees them, in tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import RetourError
from ..io import Placement

Mode = Literal["drag", "move"]
Point = tuple[float, float]
Drags = str | Sequence[Any]

_NUMBER = r"\s*(-?(?:\d+\.?\d*|\.\d+))\s*"
_DRAG = re.compile(rf"{_NUMBER},{_NUMBER}>{_NUMBER},{_NUMBER}(?:\*{_NUMBER}(?:,{_NUMBER})?)?")


@dataclass(frozen=True)
class Drag:
    """One drag, in pixels of the picture from its top left corner.

    Attributes:
        start: (x, y) of the handle.
        end: (x, y) of where it shall go.
        scale: (across, down) magnification of what goes along; for mode ``move``.
    """

    start: Point
    end: Point
    scale: tuple[float, float] = (1.0, 1.0)

    def __str__(self) -> str:
        numbers = ",".join(f"{v:g}" for v in self.start), ",".join(f"{v:g}" for v in self.end)
        scale = "" if self.scale == (1.0, 1.0) else "*" + ",".join(f"{v:g}" for v in self.scale)
        return ">".join(numbers) + scale


def parse_drags(text: str) -> tuple[Drag, ...]:
    """Read "x,y>x,y; x,y>x,y*scale": handles, where they go, and how much larger they become."""
    return tuple(_parse_drag(part) for part in text.split(";") if part.strip())


def _parse_drag(text: str) -> Drag:
    found = _DRAG.fullmatch(text)
    if found is None:
        raise RetourError(f"cannot read the drag {text.strip()!r}: write x,y>x,y in pixels")
    x0, y0, x1, y1, across, down = (None if v is None else float(v) for v in found.groups())
    assert None not in (x0, y0, x1, y1)
    across = 1.0 if across is None else across
    return Drag((x0, y0), (x1, y1), (across, across if down is None else down))  # type: ignore[arg-type]


def check_inside(point: Point, size: tuple[int, int]) -> None:
    """Refuse a point outside of a picture of (width, height) pixels."""
    if not (0 <= point[0] < size[0] and 0 <= point[1] < size[1]):
        raise RetourError(
            f"the point {point[0]:g},{point[1]:g} lies outside of the picture, which is {size[0]} "
            f"x {size[1]} pixels: x is counted from the left, y from the top, both from 0"
        )


def read_drags(drags: Drags, images: int) -> list[tuple[Drag, ...]]:
    """One tuple of drags for each image: the same for all, or given one by one."""
    if isinstance(drags, str):
        return [parse_drags(drags)] * images
    given = list(drags)
    if any(isinstance(d, Drag) for d in given) or not given:
        if not all(isinstance(d, Drag) for d in given):
            raise RetourError(f"drags mix single drags and lists of them: {drags!r}")
        return [tuple(given)] * images
    per_image = [read_drags(d, 1)[0] for d in given]
    if images > 1 and len(per_image) != images:
        raise RetourError(
            f"{len(per_image)} lists of drags for {images} images: give one for each image"
        )
    return per_image


def check_drags(drags: Sequence[Drag], mode: Mode) -> None:
    """Refuse scales that a mode does not know."""
    for drag in drags:
        if min(drag.scale) <= 0:
            raise RetourError(f"the drag {drag} has a scale of 0 or below: give a positive one")
        if mode == "drag" and drag.scale != (1.0, 1.0):
            raise RetourError(f"the drag {drag} has a scale, which only mode 'move' knows")


# --- In tokens ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pull:
    """A drag in token units, (row, column).

    Attributes:
        handle: s.
        shift: d.
        scale: r.
    """

    handle: Point
    shift: Point
    scale: Point = (1.0, 1.0)


def pull_of(drag: Drag, place: Placement, grid: tuple[int, int]) -> Pull:
    """A drag of a picture as its (h, w) tokens see it.

    Pixels' centres are at half-integers, tokens' at integers.

    Raises:
        RetourError: it begins or ends outside of the picture.
    """
    start, end = (_in_tokens(point, place, grid) for point in (drag.start, drag.end))
    shift = (end[0] - start[0], end[1] - start[1])
    return Pull(start, shift, (drag.scale[1], drag.scale[0]))


def _in_tokens(point: Point, place: Placement, grid: tuple[int, int]) -> Point:
    check_inside(point, place.original)
    across, down = point
    left, top, right, bottom = place.source
    to_left, to_top, to_right, to_bottom = place.target
    x = to_left + (across + 0.5 - left) * (to_right - to_left) / (right - left)
    y = to_top + (down + 0.5 - top) * (to_bottom - to_top) / (bottom - top)
    return y / place.canvas[1] * grid[0] - 0.5, x / place.canvas[0] * grid[1] - 0.5
