r"""Two-stage Runge-Kutta rules on the flow: midpoint (RF-Solver) and Heun.

In flow coordinates (see :mod:`retour.solvers._flow`), from :math:`a` to :math:`b` with
:math:`h=b-a` of either sign and :math:`k_1 = V(y_a, a)`:

.. math::
   \text{RF-Solver:}\quad & d = \frac{V(y_a + D k_1,\, a + D) - k_1}{D}, \qquad
                            y_b = y_a + h k_1 + \tfrac{h^2}{2} d \\
   \text{Heun:}\quad & y_b = y_a + \tfrac{h}{2}\big(k_1 + V(y_a + h k_1,\, b)\big)

With :math:`D = h/2`, as in the authors' code, RF-Solver's step is :math:`y_a + h\,V(y_a +
\tfrac{h}{2}k_1, a+\tfrac{h}{2})`: the explicit midpoint rule, so that is what it is called here.
The paper's text probes at a fixed distance :math:`|D| = 0.01` (``probe=0.01``), whose derivative
error :math:`O(D)` leaves first order once :math:`h \ll D`; we never probe beyond the interval,
which makes it Heun's rule there.

Where we deviate: the rules run on every path, in flow coordinates. EDM runs Heun in
:math:`x/\alpha` against :math:`\sigma/\alpha` and skips the correction at :math:`\sigma = 0`;
here both ends are ordinary points. A network that predicts clean data still cannot be asked
there.

Cost: 2 evaluations a step.

References: Wang et al., "Taming Rectified Flow for Inversion and Editing", ICML 2025, arXiv
2411.04746; Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models",
NeurIPS 2022, arXiv 2206.00364.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..core.grid import Step
from ..core.path import Path
from ..core.registry import NoOptions, Paper, register
from ..core.solver import Denoise, Plain
from ..core.state import State
from ..errors import RetourError
from ._flow import clock, enter, leave, velocity

RF_SOLVER_PAPER = Paper(
    "Taming Rectified Flow for Inversion and Editing",
    "Wang, Jiangshan and Pu, Junfu and Qi, Zhongang and Guo, Jiayi and Ma, Yue and "
    "Huang, Nisha and Chen, Yuxin and Li, Xiu and Shan, Ying",
    2025,
    "2411.04746",
    "ICML 2025",
)
HEUN_PAPER = Paper(
    "Elucidating the Design Space of Diffusion-Based Generative Models",
    "Karras, Tero and Aittala, Miika and Aila, Timo and Laine, Samuli",
    2022,
    "2206.00364",
    "NeurIPS 2022",
)


@dataclass(frozen=True)
class MidpointOptions:
    """Options of the midpoint rule.

    Attributes:
        probe: flow-time distance, in (0, 1), at which the velocity's derivative is measured (0.01
            in the RF-Solver paper); None: half a step, as in its code.
    """

    probe: float | None = None

    def __post_init__(self) -> None:
        if self.probe is not None and not 0 < self.probe < 1:
            raise RetourError(f"probe must be above 0 and below 1, got {self.probe}")


@register(
    "midpoint",
    task="solver",
    summary="midpoint rule on the flow (RF-Solver): second order, two evaluations a step",
    paper=RF_SOLVER_PAPER,
    options=MidpointOptions,
    order=2,
    nfe="2N",
    facts={"nfe_per_step": 2},
)
class Midpoint(Plain):
    """Explicit midpoint rule, or RF-Solver's second-order Taylor step with a fixed probe."""

    def __init__(self, options: MidpointOptions):
        self.options = options

    def step(self, denoise: Denoise, state: State, step: Step, path: Path) -> State:
        """Cross one interval."""
        a, b = clock(path, step.t), clock(path, step.s)
        h = b - a
        reach = self._reach(h)
        y = enter(path, state.x, step.t)
        k1 = velocity(denoise, path, y, step.t)
        between = step.s if reach == h else float(path.from_flow_time(a + reach))
        k2 = velocity(denoise, path, y + reach * k1, between)
        y = y + h * (k1 + h / (2 * reach) * (k2 - k1))
        return state.with_x(leave(path, y, step.s))

    def _reach(self, h: float) -> float:
        if self.options.probe is None:
            return h / 2
        return math.copysign(min(self.options.probe, abs(h)), h)


@register(
    "heun",
    task="solver",
    summary="Heun's rule on the flow: second order, two evaluations a step",
    paper=HEUN_PAPER,
    options=NoOptions,
    order=2,
    nfe="2N",
    facts={"nfe_per_step": 2},
)
class Heun(Plain):
    """Heun's trapezoidal rule."""

    def __init__(self, options: NoOptions):
        self.options = options

    def step(self, denoise: Denoise, state: State, step: Step, path: Path) -> State:
        """Cross one interval."""
        h = clock(path, step.s) - clock(path, step.t)
        y = enter(path, state.x, step.t)
        k1 = velocity(denoise, path, y, step.t)
        k2 = velocity(denoise, path, y + h * k1, step.s)
        return state.with_x(leave(path, y + h / 2 * (k1 + k2), step.s))
