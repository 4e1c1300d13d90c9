r"""DPM-Solver++(2M): two-step exponential integrator on the data prediction, in both directions.

With :math:`\lambda = \log(\alpha/\sigma)`, :math:`h = \lambda_s - \lambda_t`, :math:`h_p =
\lambda_t - \lambda_p` (p: the previous point of the walk, whichever way it goes):

.. math:: D = X_t + \frac{h}{2 h_p}(X_t - X_p), \qquad
          x_s = \frac{\sigma_s}{\sigma_t} x_t - \alpha_s (e^{-h} - 1) D

Written as the DDIM step plus a correction it has no infinities to guard by small numbers:

.. math:: x_s = \alpha_s X_t + \sigma_s E_t + c\,(X_t - X_p), \qquad
          c = \Big(\alpha_s - \alpha_t\frac{\sigma_s}{\sigma_t}\Big) \frac{h}{2 h_p}

and c = 0 in the first step, after an infinite :math:`h_p` (its limit), and over an infinite h: a
line in :math:`\lambda` cannot be followed to :math:`\pm\infty`. Those are the steps that touch
exactly clean data (:math:`\sigma=0`) or pure noise (:math:`\alpha=0`); their plain DDIM error is
one of second order on any grid that is smooth in :math:`\sigma/(\alpha+\sigma)`. On such a grid
steps near an infinite :math:`\lambda` stay long in it, so the error of the whole is
:math:`\ln N / N^2`; on grids that are smooth in :math:`\lambda` it is :math:`1/N^2`.

Upwards the history is that of the upward walk. (A widely used inverse scheduler keeps the time
levels of the downward one and so falls back to first order.)

Cost: 1 evaluation a step.

Reference: Lu et al., "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic
Models", 2022, arXiv 2211.01095, Algorithm 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..core.grid import Step
from ..core.path import Path
from ..core.registry import Paper, register
from ..core.solver import Denoise, Plain
from ..core.state import State

DPM_PAPER = Paper(
    "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models",
    "Lu, Cheng and Zhou, Yuhao and Bao, Fan and Chen, Jianfei and Li, Chongxuan and Zhu, Jun",
    2022,
    "2211.01095",
)
FEW = 15


@dataclass(frozen=True)
class DPMOptions:
    """Options of DPM-Solver++(2M).

    Attributes:
        lower_order_final: make the last step of a walk of fewer than 15 steps first order, which
            the paper's code does for stability.
    """

    lower_order_final: bool = True


@register(
    "dpm",
    task="solver",
    summary="DPM-Solver++(2M): second order, one evaluation a step",
    paper=DPM_PAPER,
    options=DPMOptions,
    order=2,
    nfe="N",
    facts={"nfe_per_step": 1},
)
class DPMSolver(Plain):
    """DPM-Solver++(2M); memory: `x0` and `lam`, prediction and clock of the previous point."""

    def __init__(self, options: DPMOptions):
        self.options = options

    def step(self, denoise: Denoise, state: State, step: Step, path: Path) -> State:
        """Cross one interval."""
        here = denoise(state.x, step.t)
        alpha, sigma = float(path.alpha(step.s)), float(path.sigma(step.s))
        x = alpha * here.x0 + sigma * here.eps
        lam = float(path.lam(step.t))
        if "x0" in state.memory and not self._plain(step):
            earlier = float(state.memory["lam"].flatten()[0])
            weight = _weight(path, step, lam - earlier)
            if weight != 0:
                x = x + weight * (here.x0 - state.memory["x0"])
        clock = torch.full_like(here.x0[(slice(None), *[slice(1)] * (x.ndim - 1))], lam)
        return State(x, {"x0": here.x0, "lam": clock})

    def _plain(self, step: Step) -> bool:
        last = step.position if not step.down else step.index
        return self.options.lower_order_final and step.count < FEW and last == 0


def _weight(path: Path, step: Step, gone: float) -> float:
    """Weight `c` of the previous prediction's difference; `gone` is the previous step in lambda."""
    ahead = float(path.lam(step.s)) - float(path.lam(step.t))
    if math.isinf(ahead) or math.isinf(gone):
        return 0.0
    carried = float(path.alpha(step.t)) * float(path.sigma(step.s)) / float(path.sigma(step.t))
    return (float(path.alpha(step.s)) - carried) * ahead / (2 * gone)
