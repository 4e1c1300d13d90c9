r"""Metrics of an edit: pure functions of images and masks.

Images are (3, H, W) floats in [0, 1], masks (H, W) bool. `edited` marks the pixels that an edit may
change; the background is the rest, :math:`n` of the image's :math:`N` pixels. Two conventions:

- ``strict``: the mean over the background alone, :math:`\frac{1}{3n}\sum_{bg}(a-b)^2`.
- ``pie_compat``: as PIE-Bench's evaluator, the product of both images with :math:`1-m`,
  averaged over *all* pixels: :math:`\frac{n}{N}` times the strict error, so an image with a
  small background looks better.

Where there is no background the answer is NaN, which averages leave out.

Structure distance: the mean square difference of two self-similarity matrices of patch
features, :math:`S_{ij} = \cos(f_i, f_j)`. The published metric takes the keys of DINO ViT-B/8;
:class:`EmojiClip` is a substitute that needs no download, and its figures compare only with
each other.

Reference: Ju et al., 2023, arXiv 2310.01506; structure distance: Tumanyan et al., 2022, arXiv
2201.00424.
"""

from __future__ import annotations

import math
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..errors import RetourError, unknown
from ..io import to_tensor

Convention = Literal["strict", "pie_compat"]
CONVENTIONS = ("strict", "pie_compat")
NORM_FLOOR = 1e-8
CLIP = Path(__file__).parent.parent / "weights" / "clip"


def pixels(image: Any) -> Tensor:
    """A picture of any kind as float64 (3, H, W) in [0, 1]."""
    return to_tensor(image).double() / 2 + 0.5


def mse(
    a: Tensor,
    b: Tensor,
    edited: np.ndarray | Tensor | None = None,
    convention: Convention = "strict",
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
    if a.shape != b.shape:
        raise RetourError(f"cannot compare images of shapes {tuple(a.shape)} and {tuple(b.shape)}")
    if convention not in CONVENTIONS:
        raise unknown("convention", convention, CONVENTIONS)
    counts = torch.ones(a.shape[-2:], dtype=torch.bool) if edited is None else ~_mask(edited, a)
    square = (a.double() - b.double()).square()[:, counts.to(a.device)]
    if not square.numel():
        return math.nan
    return float(square.mean() if convention == "strict" else square.sum() / a.numel())


def mse_inside(a: Tensor, b: Tensor, edited: np.ndarray | Tensor) -> float:
    """Mean square error over the edited pixels alone; NaN where there are none."""
    return mse(a, b, ~_mask(edited, a))


def psnr(
    a: Tensor,
    b: Tensor,
    edited: np.ndarray | Tensor | None = None,
    convention: Convention = "strict",
) -> float:
    """Peak signal-to-noise ratio in dB over the background; infinite for equal ones. See `mse`."""
    return decibels(mse(a, b, edited, convention))


def decibels(error: float) -> float:
    """PSNR in dB of a mean square error on the scale [0, 1]."""
    return math.inf if error == 0 else -10 * math.log10(error)


def _mask(edited: np.ndarray | Tensor, image: Tensor) -> Tensor:
    mask = torch.as_tensor(edited).bool()
    if mask.shape != image.shape[-2:]:
        raise RetourError(
            f"a mask of shape {tuple(mask.shape)} does not fit an image of {tuple(image.shape)}"
        )
    return mask


def self_similarity(features: Tensor) -> Tensor:
    """Cosines between all pairs of features (..., N, D): (..., N, N)."""
    norms = features.norm(dim=-1)
    products = (norms[..., :, None] * norms[..., None, :]).clamp(min=NORM_FLOOR)
    return features @ features.transpose(-1, -2) / products


def structure_distance(features_a: Tensor, features_b: Tensor) -> Tensor:
    """Mean square difference of the self-similarities of features (..., N, D): (...)."""
    gap = self_similarity(features_a) - self_similarity(features_b)
    return gap.square().mean((-2, -1))


class EmojiClip:
    """Substitute backbone of the structure distance: the embedded CLIP's vision tower.

    Features are the last layer's patch tokens, without the class token.

    Args:
        folder: a transformers CLIPModel.

    Raises:
        RetourError: on first use, if the weights are not there.
    """

    name = "emoji-clip structure distance"

    def __init__(self, folder: Path = CLIP):
        self.folder = Path(folder)

    @property
    def available(self) -> bool:
        """Whether the weights are there."""
        return (self.folder / "config.json").is_file()

    @cached_property
    def _tower(self) -> Any:
        if not self.available:
            raise RetourError(f"there is no CLIP in '{self.folder}': give a CLIPModel's folder")
        from transformers import CLIPModel

        model = CLIPModel.from_pretrained(self.folder, local_files_only=True, dtype=torch.float32)
        return model.vision_model.eval()

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> patch tokens (B, N, D)."""
        side = self._tower.config.image_size
        if images.shape[-2:] != (side, side):
            images = torch.nn.functional.interpolate(
                images, (side, side), mode="bicubic", antialias=True
            )
        # Trained on images in [-1, 1].
        hidden = self._tower(pixel_values=images.float() * 2 - 1).last_hidden_state
        return hidden[:, 1:]

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """Structure distance of images (B, 3, H, W) in [0, 1], pair by pair: (B,)."""
        return structure_distance(self.features(a), self.features(b))
