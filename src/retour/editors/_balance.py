"""Predictions that an energy pulls down, balanced against the guidance of the same prediction."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..core.branches import Branch, Denoiser, Layout, Wrapped
from ..core.guidance import Guidance
from ..core.path import Prediction, express, levels, predict
from ..core.rows import along

# (denoiser, target branches, their latents, time) -> the rows' energies and gradients
Slope = Callable[[Denoiser | Wrapped, list[Branch], Tensor, float], tuple[Tensor, Tensor]]

ZERO = 1e-8


class Halves:
    """A guidance that remembers what it was given and made of it, call by call."""

    def __init__(self, inner: Guidance):
        self.inner = inner
        self.seen: list[tuple[Prediction, Prediction]] = []

    def active(self, t: float) -> bool:
        """As the one it wraps."""
        return self.inner.active(t)

    def __call__(self, cond: Prediction, uncond: Prediction, scale: Tensor) -> Prediction:
        """As the one it wraps."""
        guided = self.inner(cond, uncond, scale)
        self.seen.append((uncond, guided))
        return guided


class Pulled(Wrapped):
    """A denoiser whose targets go down an energy.

    Args:
        inner: the denoiser, guided by `halves`.
        halves: the guidance in use.
        layout: of the state.
        slope: the energy and its gradient.
        low: smallest ratio of the gradient's norm to the guidance's.
        high: largest ratio.
    """

    def __init__(
        self,
        inner: Denoiser | Wrapped,
        halves: Halves,
        layout: Layout,
        slope: Slope,
        low: float,
        high: float,
    ):
        super().__init__(inner, self._pulled)
        self.halves, self.layout, self.slope = halves, layout, slope
        self.low, self.high = low, high

    def _pulled(self, prediction: Prediction, x: Tensor, t: float) -> Prediction:
        guided = [b.name for b in self.branches if b.guided]
        pairs = dict(zip(guided, self.halves.seen[-len(guided) :], strict=False))
        self.halves.seen.clear()
        targets = [b for b in self.branches if b.name in self.layout.targets() and b.name in pairs]
        kind = "velocity" if self.kind == "velocity" else "eps"
        alpha, sigma = levels(self.model.path, t, x)
        if not targets or (kind == "eps" and float(alpha) == 0):
            return prediction
        rows = torch.cat([x[self.layout[b.name]] for b in targets])
        push = torch.cat(
            [
                express(kind, with_guidance, alpha, sigma) - express(kind, uncond, alpha, sigma)
                for uncond, with_guidance in (pairs[b.name] for b in targets)
            ]
        )
        values, slope = self.slope(self.inner, targets, rows, t)
        slope = torch.where(along(values > ZERO, slope), slope, 0.0)
        change = rescaled(slope, push, self.low, self.high)
        whole = torch.zeros_like(x)
        for branch, part in zip(targets, change.chunk(len(targets)), strict=True):
            whole[self.layout[branch.name]] = part
        # What a change of the output changes in both faces, x being what it is.
        moved = predict(kind, whole, torch.zeros_like(x), alpha, sigma)
        return Prediction(prediction.x0 + moved.x0, prediction.eps + moved.eps)


def rescaled(slope: Tensor, push: Tensor, low: float, high: float) -> Tensor:
    """Scale each row's `slope` so that its norm over that of `push` lies in [low, high].

    A slope of 0 stays 0; where the push is 0 the ratio counts as 1.
    """
    size, other = (v.flatten(1).norm(dim=1) for v in (slope, push))
    ratio = torch.where(other > 0, size / other.where(other > 0, 1.0), 1.0)
    gamma = torch.where(size > 0, ratio.clamp(low, high) / ratio.where(size > 0, 1.0), 1.0)
    return along(gamma, slope) * slope
