r"""DPM-Solver++(2M) inversion: the multistep data-prediction solver walked backwards.

Second order for real: the two-step formula is applied on the reversed grid with its own history,
where a widely used inverse scheduler falls back to first order (see :mod:`retour.solvers.dpm`).

Cost: N evaluations.

Reference: Lu et al., "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic
Models", 2022, arXiv 2211.01095.
"""

from __future__ import annotations

from ..core.registry import get, register
from ..core.solver import Solver
from ..solvers.dpm import DPM_PAPER
from .base import ClimbOptions, SolverInverter


@register(
    "dpm",
    task="invert",
    summary="DPM-Solver++(2M) walked backwards; second order at one evaluation a step",
    paper=DPM_PAPER,
    options=ClimbOptions,
    order=2,
    nfe="N",
    provides={"trajectory"},
)
class DPMInversion(SolverInverter):
    """DPM-Solver++(2M) walked up and down."""

    name = "dpm"

    def solver(self) -> Solver:
        """The multistep solver."""
        return get("solver", "dpm").make()
