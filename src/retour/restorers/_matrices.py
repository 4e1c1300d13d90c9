"""Matrices and kernels that linear degradations are made of, in float64."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Boundary = Literal["reflect", "zero", "circular"]


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # kept matrices must be ordinary tensors, whoever asks first
def average_matrix(length: int, scale: int) -> Tensor:
    """(length / scale, length): means of `scale` neighbours."""
    return torch.eye(length // scale, dtype=torch.float64).repeat_interleave(scale, 1) / scale


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # kept matrices must be ordinary tensors, whoever asks first
def bicubic_matrix(length: int, scale: int) -> Tensor:
    """(length / scale, length): cubic weights (a = -1/2) widened by `scale`, rows summing to 1.

    Near the border the weights that fall outside are left out and the rest renormalised.
    """
    centres = (torch.arange(length // scale, dtype=torch.float64) + 0.5) * scale - 0.5
    gap = (torch.arange(length, dtype=torch.float64) - centres[:, None]).abs() / scale
    near = 1.5 * gap**3 - 2.5 * gap**2 + 1
    far = -0.5 * gap**3 + 2.5 * gap**2 - 4 * gap + 2
    weights = torch.where(gap < 1, near, torch.where(gap < 2, far, 0.0))
    return weights / weights.sum(1, keepdim=True)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # kept matrices must be ordinary tensors, whoever asks first
def gaussian_matrix(length: int, sigma: float, width: int, boundary: Boundary) -> Tensor:
    """(length, length): convolution with a Gaussian of `width` taps that sum to 1."""
    radius = width // 2
    taps = torch.arange(-radius, radius + 1, dtype=torch.float64)
    weights = torch.exp(-(taps**2) / (2 * sigma**2))
    band = torch.zeros(length, length + 2 * radius, dtype=torch.float64)
    for k, weight in enumerate(weights / weights.sum()):
        band += weight * torch.eye(length, length + 2 * radius, dtype=torch.float64).roll(k, 1)
    return band @ border_matrix(length, radius, boundary)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # kept matrices must be ordinary tensors, whoever asks first
def border_matrix(length: int, radius: int, boundary: Boundary) -> Tensor:
    """(length + 2 radius, length): a signal continued beyond both ends.

    `reflect` mirrors about the border itself, so that the outermost pixel appears twice.
    """
    place = torch.arange(-radius, length + radius)
    inside = {
        "zero": place.clamp(0, length - 1),
        "circular": place % length,
        "reflect": torch.minimum(place % (2 * length), (-1 - place) % (2 * length)),
    }[boundary]
    matrix = F.one_hot(inside, length).double()
    if boundary == "zero":
        matrix[(place < 0) | (place >= length)] = 0
    return matrix


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # kept matrices must be ordinary tensors, whoever asks first
def line_kernel(length: float, angle: float) -> Tensor:
    """Odd square kernel of a line through its centre, drawn with linear weights; sums to 1."""
    radius = math.ceil((length - 1) / 2)
    along = torch.linspace(-(length - 1) / 2, (length - 1) / 2, 16 * radius + 1).double()
    turn = math.radians(angle)
    columns, rows = along * math.cos(turn), -along * math.sin(turn)
    axis = torch.arange(-radius, radius + 1, dtype=torch.float64)[:, None]
    across, down = ((1 - (axis - place).abs()).clamp(min=0) for place in (columns, rows))
    kernel = down @ across.mT
    return kernel / kernel.sum()


def filled(x: Tensor, known: Tensor) -> Tensor:
    """Fill what is not known with means of what is, over cells as small as hold any.

    Args:
        x: (B, C, H, W), zero where it is not known.
        known: (B, 1, H, W), ones and zeros; each has a one.
    """
    if bool(known.all()):
        return x
    share = F.avg_pool2d(known, 2, ceil_mode=True)
    mean = F.avg_pool2d(x, 2, ceil_mode=True) / share.where(share > 0, 1.0)
    around = filled(mean, (share > 0).to(known))
    larger = F.interpolate(around, x.shape[-2:], mode="bilinear", align_corners=False)
    return torch.where(known > 0, x, larger)
