r"""Flow inversion by plain ODE solvers: Euler, midpoint (RF-Solver), Heun.

The rectified-flow ODE :math:`dx = v\,ds` integrated from data (:math:`s=0`) to noise (:math:`s=1`)
on the reversed sampling grid; the way back is the same solver on the same grid. One Euler step is
the DDIM step with the network asked where the latents are, so ``euler`` is ``ddim`` with
``query="departure"``, under the name that the flow literature uses. RF-Solver's published code is
algebraically the explicit midpoint rule; its paper probes the derivative at a fixed distance 0.01
(``probe=0.01``).

All three also run on VP models, in flow coordinates (see :mod:`retour.core.path`).

Cost: N evaluations for Euler, 2N for the second-order ones.

References: Liu et al., "Flow Straight and Fast", ICLR 2023, arXiv 2209.03003; Wang et al., "Taming
Rectified Flow for Inversion and Editing", ICML 2025, arXiv 2411.04746; Karras et al., arXiv
2206.00364.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..core.registry import get, register
from ..core.solver import Solver
from ..solvers.ddim import FLOW_PAPER
from ..solvers.runge_kutta import HEUN_PAPER, RF_SOLVER_PAPER
from .base import ClimbOptions, SolverInverter


@register(
    "euler",
    task="invert",
    summary="the flow ODE by Euler steps; first order",
    paper=FLOW_PAPER,
    options=ClimbOptions,
    order=1,
    nfe="N",
    provides={"trajectory"},
)
class EulerInversion(SolverInverter):
    """Euler walked up and down."""

    name = "euler"

    def solver(self) -> Solver:
        """DDIM's step asked at the departure: Euler on the flow."""
        return get("solver", "ddim").make(query="departure")


@dataclass(frozen=True)
class RFSolverOptions(ClimbOptions):
    """Options of RF-Solver.

    Attributes:
        probe: distance at which the velocity's derivative is measured; None: half a step, as in the
            published code (the midpoint rule).
    """

    probe: float | None = None


@register(
    "rf-solver",
    task="invert",
    summary="second-order Taylor step on the flow (midpoint rule)",
    paper=RF_SOLVER_PAPER,
    options=RFSolverOptions,
    order=2,
    nfe="2N",
    provides={"trajectory"},
)
class RFSolverInversion(SolverInverter):
    """RF-Solver walked up and down."""

    name = "rf-solver"
    options: RFSolverOptions

    def solver(self) -> Solver:
        """Midpoint with the chosen probe."""
        return get("solver", "midpoint").make(probe=self.options.probe)


@register(
    "heun",
    task="invert",
    summary="Heun's trapezoidal steps on the flow; second order",
    paper=HEUN_PAPER,
    options=ClimbOptions,
    order=2,
    nfe="2N",
    provides={"trajectory"},
)
class HeunInversion(SolverInverter):
    """Heun walked up and down."""

    name = "heun"

    def solver(self) -> Solver:
        """Heun."""
        return get("solver", "heun").make()
