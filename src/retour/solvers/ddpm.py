r"""DDIM with noise: from DDIM (eta = 0) to DDPM's ancestral sampling (eta = 1).

.. math:: x_s = \alpha_s X + \sqrt{\sigma_s^2 - v^2}\,E + v\,n, \qquad n \sim N(0, I)

Any :math:`0\le v\le\sigma_s` keeps the marginals where the prediction is right. With :math:`q^2 =
\sigma_h^2 - (\alpha_h/\alpha_l)^2\sigma_l^2` the variance that the forward process adds between the
cleaner end l and the noisier end h of the interval,

* ``spread="posterior"`` takes :math:`v = \eta\,\sigma_l q/\sigma_h` downwards, DDPM's posterior
  deviation, and :math:`v = \eta\,q` upwards, with which eta = 1 *is* the forward process;
* ``spread="full"`` takes :math:`v = \eta\,\sigma_s`: at eta = 1 nothing of the predicted noise is
  left, which is multistep consistency sampling.

On the variance-preserving path this is the published formula; written so, it holds on every path.

The solver draws nothing: it uses the unit noise that it finds in ``state.memory["noise"]``, put
there for this step by whoever runs it, and takes it away. Absent noise is none.

Cost: 1 evaluation a step.

References: Ho, Jain, Abbeel, "Denoising Diffusion Probabilistic Models", NeurIPS 2020, arXiv
2006.11239; Song, Meng, Ermon, arXiv 2010.02502, equation 16; Song et al., "Consistency Models",
ICML 2023, arXiv 2303.01469, Algorithm 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ..core.grid import Step
from ..core.path import Path, levels
from ..core.registry import Paper, register
from ..core.solver import Denoise, Plain
from ..core.state import State
from ..errors import check_range

DDPM_PAPER = Paper(
    "Denoising Diffusion Probabilistic Models",
    "Ho, Jonathan and Jain, Ajay and Abbeel, Pieter",
    2020,
    "2006.11239",
    "NeurIPS 2020",
)


@dataclass(frozen=True)
class DDPMOptions:
    """Options of the stochastic DDIM step.

    Attributes:
        eta: how much noise, from none (0) to all that `spread` allows (1).
        spread: deviation at eta = 1: that of DDPM's posterior, or all of the level's.
    """

    eta: float = 1.0
    spread: Literal["posterior", "full"] = "posterior"

    def __post_init__(self) -> None:
        check_range("eta", self.eta, 0, 1)


def added(path: Path, clean: float, noisy: float) -> float:
    """Deviation `q` of what the forward process adds between two times."""
    kept = float(path.alpha(noisy)) / float(path.alpha(clean)) * float(path.sigma(clean))
    return math.sqrt(max(float(path.sigma(noisy)) ** 2 - kept**2, 0.0))


def posterior(path: Path, clean: float, noisy: float) -> float:
    """Deviation of DDPM's posterior at the cleaner of two times, given latents at the noisier."""
    return float(path.sigma(clean)) * added(path, clean, noisy) / float(path.sigma(noisy))


def with_noise(state: State, x: Tensor, std: float) -> Tensor:
    """`x` plus the state's noise for this step, if there is any."""
    noise = state.memory.get("noise")
    return x if noise is None else x + std * noise.to(x)


@register(
    "ddpm",
    task="solver",
    summary="DDIM with noise of weight eta; eta = 1 is ancestral sampling",
    paper=DDPM_PAPER,
    options=DDPMOptions,
    nfe="N",
    stochastic=True,
    facts={"nfe_per_step": 1, "weak_order": 1},
)
class DDPM(Plain):
    """Stochastic DDIM; memory: `noise`, for the next step only."""

    def __init__(self, options: DDPMOptions):
        self.options = options

    def std(self, path: Path, step: Step) -> float:
        """Factor of the unit noise in this step."""
        eta = self.options.eta
        if self.options.spread == "full":
            return eta * float(path.sigma(step.s))
        rule = posterior if step.down else added
        return eta * rule(path, step.clean, step.noisy)

    def step(self, denoise: Denoise, state: State, step: Step, path: Path) -> State:
        """Cross one interval."""
        found = denoise(state.x, step.t)
        alpha, sigma = levels(path, step.s, state.x)
        std, level = self.std(path, step), float(path.sigma(step.s))
        part = math.sqrt(max(1 - (std / level) ** 2, 0.0)) if level else 1.0
        x = with_noise(state, alpha * found.x0 + part * sigma * found.eps, std)
        return State(x, {k: v for k, v in state.memory.items() if k != "noise"})
