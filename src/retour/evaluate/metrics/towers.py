"""Opening backbones that the user has: one sentence when they are not there, never a download."""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...errors import RetourError
from ...models.quiet import quietly

Source = str | PathLike[str]


def source_name(source: Source) -> str:
    """Last part of a hub id or of a folder's path: how tables call a backbone."""
    return Path(source).name or str(source)


def pretrained(make: Callable[..., Any], source: Source, what: str, **options: Any) -> Any:
    """What a transformers class makes of a local folder, or of a hub id in the local cache.

    Args:
        make: a class's `from_pretrained`.
        source: folder or hub id.
        what: what it should be, for the message.
        options: further ones of `make`.

    Raises:
        RetourError: it is not there, or it is something else.
    """
    try:
        with quietly():
            return make(str(source), local_files_only=True, **options)
    except Exception as error:  # foreign folders make transformers raise nearly any type
        reason = " ".join(str(error).split())[:200]
        raise RetourError(
            f"cannot load {what} from '{source}' ({reason}): give its folder, or a hub id that "
            "was downloaded before."
        ) from error


def resized(images: Tensor, side: int, longest: int | None = None, mode: str = "bicubic") -> Tensor:
    """Images (B, 3, H, W) with their shorter side at `side`, the longer at most `longest`."""
    height, width = images.shape[-2:]
    factor = side / min(height, width)
    if longest is not None:
        factor = min(factor, longest / max(height, width))
    size = (max(1, round(height * factor)), max(1, round(width * factor)))
    if size == (height, width):
        return images
    return F.interpolate(images, size, mode=mode, antialias=True)


def constants(values: tuple[float, ...], like: Tensor) -> Tensor:
    """One number for each channel, as (C, 1, 1)."""
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None, None]
