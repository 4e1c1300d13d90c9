r"""How far inverted latents are from white Gaussian noise, image by image.

Generation starts from :math:`\mathcal N(0, I)`; an inversion that ends elsewhere leaves structure
in the noise, and edits of it suffer. Four moments tell most of it, each 0 (or 1) for white noise
of :math:`n` values up to about :math:`1/\sqrt n`:

- mean, and standard deviation (1);
- excess kurtosis :math:`\overline{z^4} - 3`, for :math:`z` standardised;
- neighbour correlation: the mean product of horizontal and of vertical neighbours of z.
"""

from __future__ import annotations

from torch import Tensor

from ..errors import RetourError


def gaussianity(noise: Tensor) -> dict[str, Tensor]:
    """Moments of each image's noise.

    Args:
        noise: (B, C, h, w) latents at the noisy end, at least 2 x 2.

    Returns:
        `mean`, `std`, `kurtosis` (excess) and `neighbours`, (B,) each.
    """
    if noise.ndim != 4 or min(noise.shape[-2:]) < 2:
        raise RetourError(f"noise must be (B, C, h, w), 2 x 2 or larger, got {tuple(noise.shape)}")
    axes = (1, 2, 3)
    mean, std = noise.mean(axes), noise.std(axes, correction=0)
    z = (noise - mean.view(-1, 1, 1, 1)) / std.view(-1, 1, 1, 1)
    across = (z[..., 1:] * z[..., :-1]).mean(axes)
    down = (z[..., 1:, :] * z[..., :-1, :]).mean(axes)
    return {
        "mean": mean,
        "std": std,
        "kurtosis": z.pow(4).mean(axes) - 3,
        "neighbours": (across + down) / 2,
    }
