"""Writing without halves: to a temporary name, then renamed; and the record inside a PNG."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import secrets
from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..errors import RetourError
from .decoding import Pathlike, available_formats, check_readable, decoding, reason

PNG = "PNG"
WRITABLE = {".png": PNG, ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
RECORD_KEY = "retour"


def check_writable(
    path: Pathlike,
    suffixes: Collection[str] | None = None,
    reads: Iterable[Pathlike | None] = (),
) -> Path:
    """Refuse an output path that cannot be written, before any work for it starts.

    Args:
        path: the output path.
        suffixes: lower-case file suffixes to choose from, such as `WRITABLE` for pictures; None
            allows all.
        reads: files that the work is made from, which it must not replace; None stands for none.

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
        if any(file is not None and Path(file).resolve() == target for file in reads):
            raise RetourError(f"'{given}' is what is read here: name another file to write.")
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, RetourError):
            raise
        raise RetourError(f"cannot write '{given}' ({reason(error)}): check the path.") from error
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
            f"cannot write '{path}' ({reason(error)}): choose another place."
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
        if kind == PNG:
            image.save(temporary, kind, pnginfo=png_text(record))
        else:
            image.convert("RGB").save(temporary, kind, quality=95)


def png_bytes(image: Image.Image, record: dict[str, Any] | None = None) -> bytes:
    """Give what `save_image` would write into a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, PNG, pnginfo=png_text(record))
    return buffer.getvalue()


def png_text(record: dict[str, Any] | None) -> PngInfo:
    """A record as the text that `read_record` finds in a PNG."""
    info = PngInfo()
    if record is not None:
        # Escaped ASCII: every PNG reader shows it, and any file name or prompt survives.
        info.add_text(RECORD_KEY, json.dumps(plain(record), allow_nan=False))
    return info


def read_record(path: Pathlike) -> dict[str, Any]:
    """Read the facts of the run that `save_image` kept in a PNG."""
    file = Path(path)
    check_readable(file)
    label = f"'{file}'"
    with decoding(label), Image.open(file, formats=available_formats()) as image:
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
