r"""How far an image strays from another, pixel by pixel, outside of what an edit may change.

Images are (3, H, W) floats in [0, 1], masks (H, W) bool. `edited` marks the pixels that an edit may
change; the background is the rest, :math:`n` of the image's :math:`N` pixels. Two conventions:

- ``strict``: the mean over the background alone, :math:`\frac{1}{3n}\sum_{bg}(a-b)^2`. SSIM takes
  its local moments from the background pixels of each window, renormalised, and averages over the
  windows whose centre is background.
- ``pie_compat``: as PIE-Bench's evaluator, the product of both images with :math:`1-m`, averaged
  over *all* pixels: for the mean square error :math:`\frac{n}{N}` times the strict one, so an image
  with a small background looks better.

Where there is no background the answer is NaN, which averages leave out.

SSIM is that of Wang et al.: Gaussian windows of 11 x 11 (:math:`\sigma = 1.5`), constants 0.01 and
0.03. ``strict`` leaves out the windows that leave the image; ``pie_compat`` mirrors the image at
its edges, as the evaluator's library does.

Reference: Ju et al., 2023, arXiv 2310.01506; Wang et al., "Image quality assessment: from error
visibility to structural similarity", 2004.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ...errors import RetourError, check_range, unknown
from ...io import to_tensor

Convention = Literal["strict", "pie_compat"]
CONVENTIONS = ("strict", "pie_compat")
Mask = np.ndarray | Tensor

WINDOW, DEVIATION = 11, 1.5
LUMINANCE, CONTRAST = 0.01**2, 0.03**2
LEVELS = 255


def pixels(image: Any) -> Tensor:
    """A picture of any kind as float64 (3, H, W) in [0, 1]."""
    return to_tensor(image).double() / 2 + 0.5


def check_convention(convention: str) -> None:
    """Refuse what is not a convention."""
    if convention not in CONVENTIONS:
        raise unknown("convention", convention, CONVENTIONS)


def background(a: Tensor, b: Tensor, edited: Mask | None) -> Tensor:
    """Background (H, W) bool of two images of one shape; all of them without a mask."""
    if a.shape != b.shape:
        raise RetourError(f"cannot compare images of shapes {tuple(a.shape)} and {tuple(b.shape)}")
    if edited is None:
        return torch.ones(a.shape[-2:], dtype=torch.bool, device=a.device)
    return ~as_mask(edited, a)


def as_mask(edited: Mask, image: Tensor) -> Tensor:
    """A mask as (H, W) bool beside its image (3, H, W); one of another size is refused."""
    mask = torch.as_tensor(edited).bool()
    if mask.shape != image.shape[-2:]:
        raise RetourError(
            f"a mask of shape {tuple(mask.shape)} does not fit an image of {tuple(image.shape)}"
        )
    return mask.to(image.device)


def mse(
    a: Tensor, b: Tensor, edited: Mask | None = None, convention: Convention = "strict"
) -> float:
    """Mean square error over the background.

    Args:
        a: image (3, H, W) in [0, 1].
        b: image of the same shape.
        edited: (H, W) bool, true where pixels do not count; None counts all.
        convention: what the sum is divided by, see the module.

    Returns:
        The error, or NaN where there is no background.
    """
    counts = background(a, b, edited)
    check_convention(convention)
    square = (a.double() - b.double()).square()[:, counts]
    if not square.numel():
        return math.nan
    return float(square.mean() if convention == "strict" else square.sum() / a.numel())


def mse_inside(a: Tensor, b: Tensor, edited: Mask) -> float:
    """Mean square error over the edited pixels alone; NaN where there are none."""
    return mse(a, b, ~as_mask(edited, a))


def psnr(
    a: Tensor, b: Tensor, edited: Mask | None = None, convention: Convention = "strict"
) -> float:
    """Peak signal-to-noise ratio in dB over the background; infinite for equal ones. See `mse`."""
    return decibels(mse(a, b, edited, convention))


def decibels(error: float) -> float:
    """PSNR in dB of a mean square error on the scale [0, 1]."""
    return math.inf if error == 0 else -10 * math.log10(error)


def ssim(
    a: Tensor, b: Tensor, edited: Mask | None = None, convention: Convention = "strict"
) -> float:
    """Structural similarity over the background, at most 1.

    Arguments as `mse`'s. NaN for images below 11 pixels a side, and where (strict) no whole window
    has its centre in the background.
    """
    keep = background(a, b, edited)
    check_convention(convention)
    if min(a.shape[-2:]) < WINDOW or not keep.any():
        return math.nan
    weight, margin = keep.to(torch.float64), WINDOW // 2
    if convention == "pie_compat":
        a, b = (F.pad((x * weight)[None], (margin,) * 4, mode="reflect")[0] for x in (a, b))
        return float(_ssim_map(a, b, torch.ones_like(a[0])).mean())
    centres = keep[margin:-margin, margin:-margin]
    return float(_ssim_map(a, b, weight)[:, centres].mean())


def _ssim_map(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """SSIM of each whole window, (3, H - 10, W - 10), of pixels weighted by (H, W)."""
    a, b = a.double(), b.double()
    mass = _blur(weight[None])
    # A window without any background pixel is never read: its centre is not background.
    mean_a, mean_b, aa, bb, ab = (
        _blur(x * weight) / mass.clamp(min=1e-12) for x in (a, b, a * a, b * b, a * b)
    )
    var_a, var_b = (aa - mean_a**2).clamp(min=0), (bb - mean_b**2).clamp(min=0)
    covariance = ab - mean_a * mean_b
    above = (2 * mean_a * mean_b + LUMINANCE) * (2 * covariance + CONTRAST)
    below = (mean_a**2 + mean_b**2 + LUMINANCE) * (var_a + var_b + CONTRAST)
    return above / below


def _blur(x: Tensor) -> Tensor:
    """Gaussian means (C, H - 10, W - 10) of the whole windows of (C, H, W)."""
    offsets = torch.arange(WINDOW, dtype=x.dtype, device=x.device) - WINDOW // 2
    bell = torch.exp(-0.5 * (offsets / DEVIATION) ** 2)
    bell = bell / bell.sum()
    down = F.conv2d(x[:, None], bell[None, None, :, None])
    return F.conv2d(down, bell[None, None, None, :])[:, 0]


def exactness(
    a: Tensor,
    b: Tensor,
    edited: Mask | None = None,
    *,
    levels: int = 0,
    ceiling: Tensor | None = None,
) -> float:
    """Share of background pixels that are the same in 8 bits.

    Args:
        a: image (3, H, W) in [0, 1].
        b: image of the same shape.
        edited: (H, W) bool, true where pixels do not count; None counts all.
        levels: by how many of 255 levels a channel may differ.
        ceiling: image of the same shape, the best that could have been made of `a`: where it
            strays from `a`, `b` may stray as far and `levels` more.

    Returns:
        A number from 0 to 1, or NaN where there is no background.
    """
    check_range("levels", levels, 0, LEVELS)
    counts = background(a, b, edited)
    whole = [(x.double() * LEVELS).round() for x in (a, b, a if ceiling is None else ceiling)]
    gap, allowed = (whole[0] - whole[1]).abs(), (whole[0] - whole[2]).abs() + levels
    same = (gap <= allowed).all(0)[counts]
    return float(same.double().mean()) if same.numel() else math.nan
