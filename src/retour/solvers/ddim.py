r"""DDIM: hold the network's answer over the interval; on the flow this is Euler's rule.

.. math:: x_s = \alpha_s X + \sigma_s E, \qquad (X, E) = \text{prediction at } (x_t, \tau)

In flow coordinates :math:`y = x/(\alpha+\sigma)`, :math:`u = \sigma/(\alpha+\sigma)` the same
line reads :math:`y_s = y_t + (u_s - u_t)(E - X)`: so ``euler`` is a second name of this object,
not a second rule.

The network is asked at :math:`\tau = t`, where the latents are (``query="departure"``), or, as
all published inversion code does, at the noisier end of the interval (``query="noisy"``).
Downwards the two are one. Upwards, "noisy" asks at :math:`\tau = s` about latents of level
:math:`t`. The network's *own output* is then held and read at the level where the latents are:

- noise (and score): :math:`E = \epsilon(x_t, s)`, :math:`X = (x_t - \sigma_t E)/\alpha_t`; the
  usual code;
- v-prediction: :math:`X = \alpha_t x_t - \sigma_t v(x_t, s)`, as diffusers' inverse scheduler does;
- flow velocity: :math:`y_s = y_t + (u_s - u_t)\,V(x_t, s)`; converting at level `s` instead would
  lose the whole step at pure noise, where :math:`E = x`;
- clean data: :math:`E = (x_t - \alpha_t X)/\sigma_t`, but at :math:`\sigma_t = 0`, where X says
  nothing about the noise, the noise found at level `s` is taken.

Cost: 1 evaluation a step.

Reference: Song, Meng, Ermon, "Denoising Diffusion Implicit Models", ICLR 2021, arXiv 2010.02502.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ..core.grid import Step
from ..core.path import Path, Prediction, express, levels, predict
from ..core.registry import Paper, register
from ..core.solver import Denoise, Plain, kind_of
from ..core.state import State

DDIM_PAPER = Paper(
    "Denoising Diffusion Implicit Models",
    "Song, Jiaming and Meng, Chenlin and Ermon, Stefano",
    2021,
    "2010.02502",
    "ICLR 2021",
)
FLOW_PAPER = Paper(
    "Flow Straight and Fast: Learning to Generate and Transfer Data with Rectified Flow",
    "Liu, Xingchao and Gong, Chengyue and Liu, Qiang",
    2023,
    "2209.03003",
    "ICLR 2023",
)


@dataclass(frozen=True)
class DDIMOptions:
    """Options of the DDIM step.

    Attributes:
        query: where the network is asked on the way up: at the level of the latents, or at the
            noisier end of the interval as in published inversion code.
    """

    query: Literal["departure", "noisy"] = "departure"


@register(
    "euler",
    task="solver",
    summary="Euler's rule on the flow; another name of ddim",
    paper=FLOW_PAPER,
    options=DDIMOptions,
    order=1,
    nfe="N",
    facts={"nfe_per_step": 1},
)
@register(
    "ddim",
    task="solver",
    summary="deterministic DDIM, first order, one evaluation a step",
    paper=DDIM_PAPER,
    options=DDIMOptions,
    order=1,
    nfe="N",
    facts={"nfe_per_step": 1},
)
class DDIM(Plain):
    """Deterministic DDIM (eta = 0)."""

    def __init__(self, options: DDIMOptions):
        self.options = options

    def step(self, denoise: Denoise, state: State, step: Step, path: Path) -> State:
        """Cross one interval."""
        query = step.noisy if self.options.query == "noisy" else step.t
        prediction = denoise(state.x, query)
        if query != step.t:
            prediction = _reread(kind_of(denoise), prediction, state.x, path, query, step.t)
        alpha, sigma = levels(path, step.s, state.x)
        return state.with_x(alpha * prediction.x0 + sigma * prediction.eps)


def _reread(
    kind: str, prediction: Prediction, x: Tensor, path: Path, asked: float, at: float
) -> Prediction:
    """Read at level `at` the network's output of a call about `x` at level `asked`."""
    alpha, sigma = levels(path, at, x)
    if kind == "score" or (kind == "x0" and float(sigma) == 0):
        kind = "eps"
    return predict(kind, express(kind, prediction, *levels(path, asked, x)), x, alpha, sigma)
