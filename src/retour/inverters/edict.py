r"""EDICT: exact inversion with two coupled latents.

Two copies of the latents update each other by turns, each step affine in the copy it changes, so
every step can be undone algebraically; a mixing with :math:`p` keeps the pair together (see
:mod:`retour.solvers.edict` for the step). Inverting at the guidance of the way back makes
reconstruction exact up to rounding; editing swaps the prompt.

The paper edits in 50 steps at strength 0.8 and guidance 3, less than half of what its model is
sampled with, with p = 0.93; p from about 0.9 to 0.97 works there. Larger ones drift apart on the
way back, smaller ones magnify more on the way up. Guidance acts both ways here, and a large one
oversaturates: on `emoji-unet`, with `p2p` and 10 steps, guidance 2 in place of its usual 3 keeps
the background 2.8 dB nearer at the same success (56 edits).

Where we deviate: the paper samples the VAE posterior, we take its mode; state is float64 as in the
paper, but the network may run in any precision, since the same evaluations recur in both
directions.

Cost: 2N evaluations at guidance 1, 4N with guidance. The pair's difference, rounding included,
grows by :math:`p^{-2N}` on the way up, which is warned of.

Reference: Wallace, Gokul, Naik, "EDICT: Exact Diffusion Inversion via Coupled Transformations",
CVPR 2023, arXiv 2211.12446.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..core.registry import get, register
from ..core.solver import Solver
from ..core.state import Inversion
from ..solvers.edict import EDICT_PAPER
from .base import Job, Replay


@dataclass(frozen=True)
class EDICTOptions:
    """Options of EDICT.

    Attributes:
        mixing: the weight :math:`p` that keeps the pair together, above 0 and at most 1.
        inversion_guidance: guidance on the way up; None takes that of the way back, which is what
            makes the round trip exact.
        strength: part of the grid that is walked, from the clean end (the paper edits with 0.8).
    """

    mixing: float = 0.93
    inversion_guidance: float | None = None
    strength: float = 0.8


@register(
    "edict",
    task="invert",
    summary="two coupled latents; the round trip is exact up to rounding",
    paper=EDICT_PAPER,
    options=EDICTOptions,
    exact=True,
    nfe="2N (4N guided)",
    provides={"trajectory", "exact"},
)
class EDICTInversion:
    """The coupled pair walked up and down."""

    def __init__(self, options: EDICTOptions):
        self.options = options
        self.solver()  # Refuses a wrong mixing before any work.

    def solver(self) -> Solver:
        """The coupled step."""
        return get("solver", "edict").make(mixing=self.options.mixing)

    def invert(self, job: Job) -> Inversion:
        """Walk the pair up."""
        grid = job.grid.truncate(self.options.strength)
        states = job.climb(self.solver(), grid, job.scale(self.options.inversion_guidance))
        return job.pack("edict", self.options, grid, states)

    def replay(self, inversion: Inversion) -> Replay:
        """Walk the pair down."""
        return Replay(self.solver(), inversion.end())
