r"""DDIM inversion: the deterministic sampler's step with start and stop swapped.

.. math:: x_s = \alpha_s X + \sigma_s E, \qquad (X, E) = \text{prediction at } (x_t, \cdot)

The step from a cleaner to a noisier level has no closed inverse, so the network's answer at one end
stands in for its answer at the other: a first-order approximation whose error is amplified by
guidance. Paper and code differ in *when* the network is asked: the ODE reading asks at the level
that the latents are at (``query="departure"``), all published editing code at the noisier end of
the interval (``query="noisy"``, the default here, so that results compare).

Cost: N evaluations (2N with `inversion_guidance` other than 1).

Reference: Song, Meng, Ermon, "Denoising Diffusion Implicit Models", ICLR 2021, arXiv 2010.02502.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..core.registry import get, register
from ..core.solver import Solver
from ..solvers.ddim import DDIM_PAPER
from .base import ClimbOptions, SolverInverter


@dataclass(frozen=True)
class DDIMOptions(ClimbOptions):
    """Options of DDIM inversion.

    Attributes:
        query: at which end of an interval the network is asked on the way up.
    """

    query: Literal["noisy", "departure"] = "noisy"


@register(
    "ddim",
    task="invert",
    summary="the sampler walked backwards; first order, drifts under guidance",
    paper=DDIM_PAPER,
    options=DDIMOptions,
    order=1,
    nfe="N",
    provides={"trajectory"},
)
class DDIMInversion(SolverInverter):
    """DDIM walked up and down."""

    name = "ddim"
    options: DDIMOptions

    def solver(self) -> Solver:
        """DDIM with the chosen query."""
        return get("solver", "ddim").make(query=self.options.query)
