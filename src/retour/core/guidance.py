r"""Guidance: how a conditional and an unconditional prediction become one.

A guidance is a function of `(cond, uncond, scale, t)`. Linear guidance is the same in every
parameterisation, so it acts on both faces of a :class:`~retour.core.path.Prediction` at once.
``scale`` is the field's guidance scale: :math:`Z = Z_u + w (Z_c - Z_u)`, so 1 is the conditional
model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from .path import Prediction


class Guidance(Protocol):
    """Combine two predictions; `active` says whether the unconditional one is needed at all."""

    def active(self, t: float) -> bool:
        """Whether guidance acts at time `t` (if not, no unconditional evaluation is made)."""

    def __call__(self, cond: Prediction, uncond: Prediction, scale: Tensor) -> Prediction:
        """Guided prediction; `scale` broadcasts over rows, (B, 1, 1, 1)."""


@dataclass(frozen=True)
class CFG:
    """Classifier-free guidance (Ho and Salimans, 2022, arXiv 2207.12598)."""

    def active(self, t: float) -> bool:
        """Always."""
        return True

    def __call__(self, cond: Prediction, uncond: Prediction, scale: Tensor) -> Prediction:
        """`uncond + scale (cond - uncond)`."""
        return Prediction(
            uncond.x0 + scale * (cond.x0 - uncond.x0),
            uncond.eps + scale * (cond.eps - uncond.eps),
        )


@dataclass(frozen=True)
class Rescaled:
    """Rescaled guidance: the guided noise brought back to the conditional's spread.

    `phi` mixes it with the plain one (Lin et al., 2023, arXiv 2305.08891). Not linear: it acts on
    eps and recovers x0 from the same latents, so nothing else about the state changes.
    """

    inner: Guidance = CFG()
    phi: float = 0.7

    def active(self, t: float) -> bool:
        """As the wrapped guidance."""
        return self.inner.active(t)

    def __call__(self, cond: Prediction, uncond: Prediction, scale: Tensor) -> Prediction:
        """Guided prediction with its standard deviation pulled to the conditional's."""
        plain = self.inner(cond, uncond, scale)
        axes = tuple(range(1, cond.eps.ndim))
        ratio = cond.eps.std(axes, keepdim=True) / plain.eps.std(axes, keepdim=True)
        eps = plain.eps * (self.phi * ratio + (1 - self.phi))
        # alpha x0 + sigma eps = x on both faces: move x0 by -(sigma/alpha) (eps' - eps), with the
        # ratio read off two predictions of the same x.
        gap_eps, gap_x0 = cond.eps - uncond.eps, cond.x0 - uncond.x0
        slope = (gap_x0 * gap_eps).sum(axes, keepdim=True) / (gap_eps**2).sum(axes, keepdim=True)
        return Prediction(plain.x0 + slope.nan_to_num() * (eps - plain.eps), eps)


@dataclass(frozen=True)
class Interval:
    """Guidance only for `low <= t <= high` (Kynkäänniemi et al., 2024, arXiv 2404.07724)."""

    low: float
    high: float
    inner: Guidance = CFG()

    def active(self, t: float) -> bool:
        """Inside the interval, where the wrapped guidance is active too."""
        return self.low <= t <= self.high and self.inner.active(t)

    def __call__(self, cond: Prediction, uncond: Prediction, scale: Tensor) -> Prediction:
        """As the wrapped guidance."""
        return self.inner(cond, uncond, scale)
