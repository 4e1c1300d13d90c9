"""Pictures as tensors and back; torch is imported only when they are asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy
from PIL import Image

from ..errors import RetourError, check_finite
from .clips import Clip
from .reading import read_image

if TYPE_CHECKING:
    import torch


def to_tensor(source: Any) -> torch.Tensor:
    """Give a picture, of any kind that `read_picture` takes, as float32 (3, H, W) in [-1, 1].

    A clip becomes (3, F, H, W).
    """
    import torch

    if isinstance(source, Clip):
        return torch.stack([to_tensor(frame) for frame in source], dim=1)
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


def to_clip(tensor: torch.Tensor) -> Clip:
    """Give a tensor (3, F, H, W) in [-1, 1] as a clip; see :func:`to_image`."""
    if tensor.ndim != 4:
        raise RetourError(f"the tensor has shape {tuple(tensor.shape)}: pass (3, F, H, W).")
    return Clip(tuple(to_image(frame) for frame in tensor.unbind(1)))
