r"""SDE-DPM-Solver++(2M): two-step data-prediction integrator of the reverse *stochastic* equation.

With :math:`\lambda = \log(\alpha/\sigma)`, :math:`h = \lambda_s - \lambda_t`, :math:`h_p =
\lambda_t - \lambda_p` (p: the point before) and unit noise n,

.. math::
   x_s = \frac{\sigma_s}{\sigma_t} e^{-h} x_t + \alpha_s(1 - e^{-2h})
         \Big(X_t + \frac{h}{2 h_p}(X_t - X_p)\Big) + \sigma_s\sqrt{1 - e^{-2h}}\;n

(the "midpoint" form). Its first-order part is exactly DDPM's ancestral step, and is written as such
here, :math:`\alpha_s X + \sigma_s e^{-h} E`, so that pure noise (:math:`\alpha_t = 0`) and clean
data (:math:`\sigma_s = 0`) are ordinary points. As in :mod:`retour.solvers.dpm` there is no
second-order part in the first step nor over an infinite h or :math:`h_p`.

`lower_order_final` leaves it out in the last of fewer than 15 steps too. It is off by default: an
inversion that records this solver's noise must follow the very rule of the sampler, which a
published one does not, whose reconstruction is therefore off.

Upwards the equation is the forward process: :math:`x_s = (\alpha_s/\alpha_t) x_t + q\,n`, see
:mod:`retour.solvers.ddpm`, and no network is asked. Noise comes from ``state.memory["noise"]``, as
there.

Cost: 1 evaluation a step downwards.

Reference: Lu et al., "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic
Models", 2022, arXiv 2211.01095, appendix; used for inversion by Brack et al., "LEDITS++", CVPR
2024, arXiv 2311.16711.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..core.grid import Step
from ..core.path import Path, levels
from ..core.registry import register
from ..core.solver import Denoise, Plain
from ..core.state import State
from .ddpm import added, posterior, with_noise
from .dpm import DPM_PAPER, FEW


@dataclass(frozen=True)
class SDEDPMOptions:
    """Options of SDE-DPM-Solver++(2M).

    Attributes:
        lower_order_final: make the last of fewer than 15 steps first order.
    """

    lower_order_final: bool = False


@register(
    "sde-dpm",
    task="solver",
    summary="SDE-DPM-Solver++(2M): stochastic, two-step, one evaluation a step",
    paper=DPM_PAPER,
    options=SDEDPMOptions,
    nfe="N",
    stochastic=True,
    facts={"nfe_per_step": 1, "inversion_nfe_per_step": 0, "weak_order": 2},
)
class SDEDPM(Plain):
    """SDE-DPM-Solver++(2M); memory: `x0`, `lam` of the point before, `noise` for the next step."""

    def __init__(self, options: SDEDPMOptions):
        self.options = options

    def std(self, path: Path, step: Step) -> float:
        """Factor of the unit noise in this step."""
        return (posterior if step.down else added)(path, step.clean, step.noisy)

    def step(self, denoise: Denoise, state: State, step: Step, path: Path) -> State:
        """Cross one interval."""
        std = self.std(path, step)
        alpha, sigma = levels(path, step.s, state.x)
        if not step.down:
            return State(with_noise(state, alpha / levels(path, step.t, state.x)[0] * state.x, std))
        found = denoise(state.x, step.t)
        lam = float(path.lam(step.t))
        decay = math.exp(lam - float(path.lam(step.s)))
        x = alpha * found.x0 + decay * sigma * found.eps
        weight = self._weight(path, step, state, decay)
        if weight != 0:
            x = x + weight * (found.x0 - state.memory["x0"])
        clock = torch.full_like(x[(slice(None), *[slice(1)] * (x.ndim - 1))], lam)
        return State(with_noise(state, x, std), {"x0": found.x0, "lam": clock})

    def _weight(self, path: Path, step: Step, state: State, decay: float) -> float:
        """Weight of the difference from the prediction before, 0 where the step is first order."""
        last = self.options.lower_order_final and step.count < FEW and step.index == 0
        if last or "x0" not in state.memory:
            return 0.0
        lam = float(path.lam(step.t))
        ahead, gone = float(path.lam(step.s)) - lam, lam - float(state.memory["lam"].flatten()[0])
        if math.isinf(ahead) or math.isinf(gone):
            return 0.0
        return float(path.alpha(step.s)) * (1 - decay**2) * ahead / (2 * gone)
