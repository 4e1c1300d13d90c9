"""Rows of a batch, whatever a row is: latents (C, h, w) of a picture, (C, f, h, w) of a clip."""

from __future__ import annotations

from torch import Tensor


def along(values: Tensor, like: Tensor) -> Tensor:
    """Give values for each row (R,), or for (P, R), the trailing axes to broadcast over `like`."""
    return values.reshape(*values.shape, *[1] * (like.ndim - values.ndim))


def copies(x: Tensor, count: int) -> Tensor:
    """All rows, `count` times one after the other."""
    return x.repeat(count, *[1] * (x.ndim - 1))


def mean_square(x: Tensor) -> Tensor:
    """Mean square of each row, (R,)."""
    return x.square().flatten(1).mean(1)


def rms(x: Tensor) -> Tensor:
    """Root mean square of each row, (R,)."""
    return mean_square(x).sqrt()
