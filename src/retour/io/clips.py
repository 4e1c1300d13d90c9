"""Clips: the frames of a short video, from an animated picture or a folder of pictures.

An animated GIF, PNG or WebP needs no codec beyond Pillow; of a film, extract the frames first.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy
from PIL import Image, ImageSequence

from ..errors import RetourError
from .decoding import (
    MAX_PIXELS,
    MAX_SIDE,
    Limits,
    Pathlike,
    available_formats,
    check_readable,
    check_size,
    decoding,
)
from .fitting import Placement, fit
from .reading import read_image
from .writing import PNG, WRITABLE, atomic_write, check_writable, png_text

# Pixels of all frames together; a clip for a model has far fewer.
MAX_CLIP_PIXELS = 4 * MAX_PIXELS

# Milliseconds a frame, where a source does not say: 16 frames a second, as Wan draws.
DURATION = 62.5
ANIMATED = {suffix: kind for suffix, kind in WRITABLE.items() if kind != "JPEG"} | {".gif": "GIF"}


@dataclass(frozen=True)
class Clip:
    """Frames of one size, upright and 8-bit RGB.

    Attributes:
        frames: the pictures, at least one.
        duration: milliseconds that each is shown.
    """

    frames: tuple[Image.Image, ...]
    duration: float = DURATION

    def __post_init__(self) -> None:
        sizes = sorted({frame.size for frame in self.frames})
        if len(sizes) != 1:
            listed = ", ".join(f"{w} x {h}" for w, h in sizes) or "none"
            raise RetourError(f"the frames of a clip must have one size, got {listed}")

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.frames[0].size

    @property
    def still(self) -> Image.Image:
        """The middle frame."""
        return self.frames[len(self.frames) // 2]

    def __len__(self) -> int:
        return len(self.frames)

    def __iter__(self) -> Iterator[Image.Image]:
        return iter(self.frames)

    def map(self, change: Callable[[Image.Image], Image.Image]) -> Clip:
        """Change every frame."""
        return replace(self, frames=tuple(change(frame) for frame in self.frames))


def read_clip(source: Any) -> Clip:
    """Read a clip from whatever holds it.

    Args:
        source: a clip; the path of an animated (or still) picture, or of a folder of pictures,
            which are taken in the order of their names; a list of pictures of any kind; a NumPy
            array (F, H, W, 3) or a tensor (F, 3, H, W), uint8 or floats in [0, 1]; one picture.

    Raises:
        RetourError: for anything that is not such a clip.
    """
    if isinstance(source, Clip):
        return source
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        return _read_folder(path) if path.is_dir() else _read_file(path)
    return Clip(_read_all(source if _is_many(source) else [source], "the clip"))


def is_clip(path: Pathlike) -> bool:
    """Whether a path is a folder, or a picture of several frames."""
    file = Path(path)
    if file.is_dir():
        return True
    check_readable(file)
    with decoding(f"'{file}'"), Image.open(file, formats=available_formats()) as image:
        # The further pictures in a camera's MPO file are previews.
        return bool(getattr(image, "is_animated", False)) and image.format != "MPO"


def _is_many(source: Any) -> bool:
    if isinstance(source, (list, tuple)):
        return True
    torch = sys.modules.get("torch")
    array = isinstance(source, numpy.ndarray) or (
        torch is not None and isinstance(source, torch.Tensor)
    )
    return array and source.ndim == 4


def _read_all(sources: Sequence[Any], label: str) -> tuple[Image.Image, ...]:
    frames: list[Image.Image] = []
    for source in sources:
        frames.append(read_image(source))
        _check_length(len(frames), frames[0].size, label)
    return tuple(frames)


def _read_folder(path: Path) -> Clip:
    files = sorted(f for f in path.iterdir() if f.is_file() and not f.name.startswith("."))
    if not files:
        raise RetourError(f"the folder '{path}' holds no frames: put pictures in it")
    return Clip(_read_all(files, f"'{path}'"))


def _read_file(path: Path) -> Clip:
    check_readable(path)
    label = f"'{path}'"
    with decoding(label):
        image = Image.open(path, formats=available_formats())
    with image, decoding(label):
        check_size(image.size, label, Limits(MAX_PIXELS, MAX_SIDE))
        image.load()  # WebP tells a frame's duration only with its pixels
        duration = image.info.get("duration") or DURATION
        frames: list[Image.Image] = []
        for frame in ImageSequence.Iterator(image):
            _check_length(len(frames) + 1, image.size, label)
            frames.append(read_image(_still(frame)))
    return Clip(tuple(frames), float(duration))


def _still(frame: Image.Image) -> Image.Image:
    # A copy without the file behind it, so that it counts as one picture and not as its film.
    return frame.convert("RGBA") if frame.has_transparency_data else frame.convert("RGB")


def _check_length(frames: int, size: tuple[int, int], label: str) -> None:
    if frames * size[0] * size[1] > MAX_CLIP_PIXELS:
        raise RetourError(
            f"{label} has more than {frames - 1} frames of {size[0]:,} x {size[1]:,} pixels: "
            f"shorten it or make it smaller, at most {MAX_CLIP_PIXELS:,} pixels in all"
        )


def fit_clip(clip: Clip, *, native: int, multiple: int = 1) -> tuple[Clip, Placement]:
    """Resize every frame alike; see :func:`retour.io.fit`."""
    _, placement = fit(clip.frames[0], native=native, multiple=multiple)
    return clip.map(placement.place), replace(placement, duration=clip.duration)


def save_clip(clip: Clip, path: Pathlike, record: dict[str, Any] | None = None) -> None:
    """Save a clip as an animated PNG, WebP (both without loss) or GIF, by the path's suffix.

    Args:
        clip: the clip.
        path: where to; see `check_writable`.
        record: facts of the run, kept as JSON in a PNG's text; other formats do not hold it.
    """
    check_writable(path, ANIMATED)
    kind = ANIMATED[Path(path).suffix.lower()]
    options: dict[str, Any] = {"pnginfo": png_text(record)} if kind == PNG else {}
    if kind == "WEBP":
        options["lossless"] = True
    with atomic_write(path) as temporary:
        clip.frames[0].save(
            temporary,
            kind,
            save_all=True,
            append_images=list(clip.frames[1:]),
            duration=clip.duration,
            loop=0,
            **options,
        )
