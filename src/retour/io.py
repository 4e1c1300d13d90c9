"""Pictures in and out: reading, fitting to a model's size and back, and writing without halves.

Reading takes whatever a user has (a file, a PIL image, a NumPy array, a tensor) and gives an
upright 8-bit RGB image, or a `RetourError`. Sizes are (width, height) in pixels throughout, as in
PIL; tensors are (channels, height, width).

Fitting picks the canvas W x H, in cells of `multiple` pixels, that lies nearest to the picture's
own aspect ratio a = w / h and to the model's native area n^2: the least

    |log(W / H) - log(a)| + |log(W H / n^2)| / 4

Torch is imported only by the functions that give tensors.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import secrets
import stat
import sys
import warnings
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from retour.errors import RetourError, check_finite, check_range, unknown

if TYPE_CHECKING:
    import torch

Size: TypeAlias = tuple[int, int]
Box: TypeAlias = tuple[int, int, int, int]
Pathlike: TypeAlias = str | os.PathLike[str]

MAX_PIXELS = 64_000_000
MAX_SIDE = 20_000

# Raster formats only: for PostScript, PIL would start an outside interpreter.
READABLE = {"AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP"}
WRITABLE = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
RECORD_KEY = "retour"

# Half a grey level: what resizing or half precision may overshoot without changing a picture.
FLOAT_SLACK = 0.5 / 255
AREA_WEIGHT = 0.25
MAX_AREA_GROWTH = 1.5


class PictureWarning(UserWarning):
    """A picture was read, but not everything in its file was used."""


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


@dataclass(frozen=True)
class Limits:
    """What a picture may measure, in pixels of its area and of its longer side, and in bytes."""

    pixels: int = MAX_PIXELS
    side: int = MAX_SIDE
    bytes: int | None = None


_DEFAULT_LIMITS = Limits()


# --- Reading ------------------------------------------------------------------------------------


def read_image(
    source: Any, *, max_pixels: int = MAX_PIXELS, max_side: int = MAX_SIDE
) -> Image.Image:
    """Read a picture as an upright 8-bit RGB image; see `read_picture`."""
    return read_picture(source, max_pixels=max_pixels, max_side=max_side).image


def read_picture(source: Any, *, max_pixels: int = MAX_PIXELS, max_side: int = MAX_SIDE) -> Picture:
    """Read a picture from whatever holds it.

    Args:
        source: a path; a PIL image; a NumPy array (H, W), (H, W, 3) or (H, W, 4) of uint8, uint16
            or floats in [0, 1]; a torch tensor (C, H, W) of 1, 3 or 4 channels, uint8 or floats in
            [0, 1].
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
    with _decoding(label):
        image = Image.open(io.BytesIO(content), formats=_available_formats())
    with image:
        return _flatten(_decode_pil(image, label, limits), name, label)


def _decode_file(path: Path, limits: Limits) -> Image.Image:
    _check_readable(path)
    label = f"'{path}'"
    with _decoding(label):
        image = Image.open(path, formats=_available_formats())
    with image:
        return _decode_pil(image, label, limits)


def _check_readable(path: Path) -> None:
    try:
        status = path.stat()
    except FileNotFoundError:
        raise RetourError(f"there is no file '{path}': check the path.") from None
    except (OSError, ValueError) as error:
        raise RetourError(f"cannot read '{path}' ({_reason(error)}): check the path.") from error
    if stat.S_ISDIR(status.st_mode):
        raise RetourError(f"'{path}' is a folder: name one picture in it.")
    if not stat.S_ISREG(status.st_mode):
        raise RetourError(f"'{path}' is not a regular file: save the picture to a file first.")
    if status.st_size == 0:
        raise RetourError(f"'{path}' is empty (0 bytes): save or download it again.")
    if not os.access(path, os.R_OK):
        raise RetourError(f"you may not read '{path}': change its permissions.")


def _available_formats() -> list[str]:
    Image.init()
    return sorted(READABLE & Image.OPEN.keys())


@contextlib.contextmanager
def _decoding(label: str) -> Iterator[None]:
    """Make one sentence of whatever a decoder raises, and let only our own warnings out."""
    with _translating(label), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        if issubclass(warning.category, PictureWarning):
            warnings.warn(warning.message, stacklevel=2)


@contextlib.contextmanager
def _translating(label: str) -> Iterator[None]:
    try:
        yield
    except RetourError:
        raise
    except Image.DecompressionBombError as error:
        raise RetourError(
            f"{label} has far too many pixels: make it smaller first, at most {MAX_PIXELS:,}."
        ) from error
    except UnidentifiedImageError as error:
        raise RetourError(
            f"{label} is not a picture of a known format: convert it to PNG, JPEG or WebP."
        ) from error
    except Exception as error:  # damaged files make decoders raise nearly any type
        raise RetourError(
            f"{label} is damaged or cannot be decoded ({_reason(error)}): save it again as PNG."
        ) from error


def _reason(error: BaseException) -> str:
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return said.rstrip(".").replace("\n", " ") or type(error).__name__


def _decode_pil(image: Image.Image, label: str, limits: Limits) -> Image.Image:
    _check_size(image.size, label, limits)
    with _decoding(label):
        image.load()
        _warn_if_animated(image, label)
        upright = _upright(image, label)
    if upright.mode.startswith("I") or upright.mode == "F":
        return _decode_array(_deep_pixels(upright, label), label, limits)
    return upright


def _check_size(size: Size, label: str, limits: Limits) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise RetourError(f"{label} has no pixels ({width} x {height}): pass a picture with some.")
    if max(size) > limits.side or width * height > limits.pixels:
        raise RetourError(
            f"{label} is {width:,} x {height:,} pixels: make it smaller first, at most "
            f"{limits.side:,} a side and {limits.pixels:,} in all."
        )


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
        text = f"{label} has damaged EXIF data ({_reason(error)}): it is used without rotation"
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
    _check_size((array.shape[1], array.shape[0]), label, limits)
    pixels = _to_8_bit(array, label)
    return Image.fromarray(pixels[..., 0] if pixels.shape[2:] == (1,) else pixels)


def _to_8_bit(array: numpy.ndarray, label: str) -> numpy.ndarray:
    if array.dtype == numpy.uint8:
        return numpy.ascontiguousarray(array)
    if array.dtype == numpy.uint16:
        # 65535 / 255 = 257; adding half of it first rounds to the nearest.
        return ((array.astype(numpy.uint32) + 128) // 257).astype(numpy.uint8)
    if not numpy.issubdtype(array.dtype, numpy.floating):
        raise RetourError(
            f"{label} holds {array.dtype} values: pass uint8, uint16 or floats in [0, 1]."
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
    _check_size((tensor.shape[2], tensor.shape[1]), label, limits)
    # NumPy has no bfloat16.
    values = tensor.detach().cpu()
    pixels = (values.float() if values.is_floating_point() else values).numpy()
    return _decode_array(numpy.moveaxis(pixels, 0, -1), label, limits)


def _flatten(image: Image.Image, name: str, label: str) -> Picture:
    with _decoding(label):
        if not image.has_transparency_data:
            return Picture(image.convert("RGB"), name)
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        opaque = Image.alpha_composite(white, layer).convert("RGB")
        return Picture(opaque, name, layer.getchannel("A"))


# --- Fitting ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Placement:
    """Where a picture lies on a model's canvas; takes pictures there and back.

    Attributes:
        original: the picture's size.
        canvas: the model's size.
        source: the part of the picture that is shown, (left, top, right, bottom).
        target: the part of the canvas that shows it, (left, top, right, bottom).
    """

    original: Size
    canvas: Size
    source: Box
    target: Box

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


# --- Tensors ------------------------------------------------------------------------------------


def to_tensor(source: Any) -> torch.Tensor:
    """Give a picture, of any kind that `read_picture` takes, as float32 (3, H, W) in [-1, 1]."""
    import torch

    pixels = torch.from_numpy(numpy.array(read_image(source)))
    return pixels.permute(2, 0, 1).float() / 127.5 - 1


def to_image(tensor: torch.Tensor) -> Image.Image:
    """Give a tensor (3, H, W) in [-1, 1] as an RGB image, rounded; what lies outside is clamped."""
    import torch

    if tensor.ndim != 3 or tensor.shape[0] != 3:
        raise RetourError(f"the tensor has shape {tuple(tensor.shape)}: pass (3, H, W) in [-1, 1].")
    check_finite(tensor, "the pixels of the tensor", "use float32 weights or a smaller guidance")
    levels = tensor.detach().float().clamp(-1, 1) * 127.5 + 127.5
    pixels = levels.round().to(torch.uint8).permute(1, 2, 0)
    return Image.fromarray(pixels.cpu().numpy())


# --- Writing ------------------------------------------------------------------------------------


def check_writable(path: Pathlike, suffixes: Collection[str] | None = None) -> Path:
    """Refuse an output path that cannot be written, before any work for it starts.

    Args:
        path: the output path.
        suffixes: lower-case file suffixes to choose from, such as `WRITABLE` for pictures; None
            allows all.

    Returns:
        The path with symbolic links followed, so that a link is written through, not replaced.
    """
    given = Path(path)
    if suffixes is not None and given.suffix.lower() not in suffixes:
        raise RetourError(
            f"cannot tell the format of '{given}': end its name in {' or '.join(suffixes)}."
        )
    try:
        target = given.resolve()
        _check_target(given, target)
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, RetourError):
            raise
        raise RetourError(f"cannot write '{given}' ({_reason(error)}): check the path.") from error
    return target


def _check_target(given: Path, target: Path) -> None:
    if target.is_dir():
        raise RetourError(f"'{given}' is a folder: name a file in it.")
    if target.exists() and not target.is_file():
        raise RetourError(f"'{given}' is not a regular file: choose another name.")
    if not target.parent.is_dir():
        raise RetourError(f"there is no folder '{given.parent}': create it first.")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise RetourError(f"you may not write to the folder '{given.parent}': choose another one.")
    if target.exists() and not os.access(target, os.W_OK):
        raise RetourError(f"'{given}' is write-protected: choose another name.")


@contextlib.contextmanager
def atomic_write(path: Pathlike) -> Iterator[Path]:
    """Give a temporary path to write to, and rename it to `path` if all went well.

    The temporary file lies in the same folder and has the same suffix. Whatever interrupts the
    block, Ctrl-C included, removes it and leaves an older file at `path` as it was.
    """
    target = check_writable(path)
    temporary = target.with_name(f".{secrets.token_hex(8)}{target.suffix}")
    try:
        yield temporary
        os.replace(temporary, target)
    except OSError as error:
        raise RetourError(
            f"cannot write '{path}' ({_reason(error)}): choose another place."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def save_image(image: Image.Image, path: Pathlike, record: dict[str, Any] | None = None) -> None:
    """Save a picture as PNG, JPEG or WebP, by the suffix of its path.

    Args:
        image: the picture.
        path: where to; see `check_writable`.
        record: facts of the run, kept as JSON in a PNG's text; other formats do not hold it.
    """
    check_writable(path, WRITABLE)
    kind = WRITABLE[Path(path).suffix.lower()]
    with atomic_write(path) as temporary:
        if kind == "PNG":
            image.save(temporary, kind, pnginfo=_png_text(record))
        else:
            image.convert("RGB").save(temporary, kind, quality=95)


def png_bytes(image: Image.Image, record: dict[str, Any] | None = None) -> bytes:
    """Give what `save_image` would write into a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=_png_text(record))
    return buffer.getvalue()


def _png_text(record: dict[str, Any] | None) -> PngInfo:
    info = PngInfo()
    if record is not None:
        # Escaped ASCII: every PNG reader shows it, and any file name or prompt survives.
        info.add_text(RECORD_KEY, json.dumps(plain(record), allow_nan=False))
    return info


def read_record(path: Pathlike) -> dict[str, Any]:
    """Read the facts of the run that `save_image` kept in a PNG."""
    file = Path(path)
    _check_readable(file)
    label = f"'{file}'"
    with _decoding(label), Image.open(file, formats=_available_formats()) as image:
        text = image.info.get(RECORD_KEY)
        if text is None:
            raise RetourError(f"{label} holds no record of a run: only PNG files of retour do.")
        return dict(json.loads(text))


def save_json(values: Any, path: Pathlike) -> None:
    """Save plain values (see `plain`) as indented JSON in UTF-8."""
    text = json.dumps(plain(values), indent=2, ensure_ascii=False, allow_nan=False)
    with atomic_write(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")


def plain(values: Any) -> Any:
    """Turn values into what JSON can hold.

    Paths become text; tuples, sets, arrays and tensors lists; dataclasses dictionaries; and floats
    that are not finite the text "nan", "inf" or "-inf", which JSON has no number for and `float`
    reads back.
    """
    if values is None or isinstance(values, (str, bool, int)):
        return values
    if isinstance(values, float):
        return values if math.isfinite(values) else str(values)
    if isinstance(values, dict):
        return {str(key): plain(value) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [plain(value) for value in values]
    if isinstance(values, (set, frozenset)):
        return sorted((plain(value) for value in values), key=str)
    if is_dataclass(values) and not isinstance(values, type):
        return plain(asdict(values))
    if hasattr(values, "tolist"):
        return plain(values.tolist())
    return str(values)
