r"""Second-order flow solvers that reuse a velocity: FireFlow and Adams-Bashforth.

In flow coordinates (see :mod:`retour.solvers._flow`), from :math:`a` to :math:`b`, :math:`h=b-a`:

.. math::
   \text{FireFlow:}\quad & p \leftarrow V\!\big(y_a + \tfrac{h}{2} p,\ a+\tfrac{h}{2}\big), \qquad
                           y_b = y_a + h\,p \\
   \text{AB2:}\quad & k = V(y_a, a), \qquad
                      y_b = y_a + h k + \tfrac{h^2}{2}\,\frac{k - k_p}{a - a_p}

FireFlow is the midpoint rule with the previous step's mid velocity in place of :math:`V(y_a, a)`;
only the first step asks for that. AB2's first step is Euler's.

Cost: 1 evaluation a step, and one more in all for FireFlow.

References: Deng et al., "FireFlow: Fast Inversion of Rectified Flow for Image Semantic Editing",
ICML 2025, arXiv 2412.07517; Hairer, Norsett, Wanner, "Solving Ordinary Differential Equations I",
1993, III.1.
"""

from __future__ import annotations

import torch

from ..core.grid import Step
from ..core.path import Path
from ..core.registry import NoOptions, Paper, register
from ..core.solver import Denoise, Plain
from ..core.state import State
from ._flow import clock, enter, leave, velocity

FIREFLOW_PAPER = Paper(
    "FireFlow: Fast Inversion of Rectified Flow for Image Semantic Editing",
    "Deng, Yingying and He, Xiangyu and Mei, Changwang and Wang, Peisong and Tang, Fan",
    2025,
    "2412.07517",
    "ICML 2025",
)
AB_PAPER = Paper(
    "Solving Ordinary Differential Equations I: Nonstiff Problems",
    "Hairer, Ernst and N{\\o}rsett, Syvert P. and Wanner, Gerhard",
    1993,
    venue="Springer",
)


@register(
    "fireflow",
    task="solver",
    summary="midpoint rule with a reused velocity: second order, one evaluation a step",
    paper=FIREFLOW_PAPER,
    options=NoOptions,
    order=2,
    nfe="N+1",
    facts={"nfe_per_step": 1, "nfe_extra": 1},
)
class FireFlow(Plain):
    """FireFlow; memory: `velocity`, the last mid-interval velocity."""

    def __init__(self, options: NoOptions):
        self.options = options

    def step(self, denoise: Denoise, state: State, step: Step, path: Path) -> State:
        """Cross one interval."""
        a, b = clock(path, step.t), clock(path, step.s)
        h = b - a
        y = enter(path, state.x, step.t)
        known = state.memory.get("velocity")
        v = velocity(denoise, path, y, step.t) if known is None else known
        middle = float(path.from_flow_time(a + h / 2))
        v = velocity(denoise, path, y + h / 2 * v, middle)
        return State(leave(path, y + h * v, step.s), {"velocity": v})


@register(
    "ab2",
    task="solver",
    summary="two-step Adams-Bashforth on the flow: second order, one evaluation a step",
    paper=AB_PAPER,
    options=NoOptions,
    order=2,
    nfe="N",
    facts={"nfe_per_step": 1},
)
class AdamsBashforth(Plain):
    """Two-step Adams-Bashforth; memory: `velocity` and `clock`, those of the previous point."""

    def __init__(self, options: NoOptions):
        self.options = options

    def step(self, denoise: Denoise, state: State, step: Step, path: Path) -> State:
        """Cross one interval."""
        a, b = clock(path, step.t), clock(path, step.s)
        h = b - a
        y = enter(path, state.x, step.t)
        v = velocity(denoise, path, y, step.t)
        ahead = y + h * v
        if "velocity" in state.memory:
            gone = a - float(state.memory["clock"].flatten()[0])
            ahead = ahead + h**2 / (2 * gone) * (v - state.memory["velocity"])
        rows = torch.full_like(v[(slice(None), *[slice(1)] * (v.ndim - 1))], a)
        return State(leave(path, ahead, step.s), {"velocity": v, "clock": rows})
