r"""Fixed-point inversion: every DDIM or Euler step is inverted exactly, by solving its equation.

DDIM inversion asks the network about latents it has in place of those it looks for. Here each step
is iterated until the latents found are those from which the sampler arrives where it shall
(:mod:`retour.solvers.implicit`: plain or Anderson-accelerated, with a stop for each image). So the
way back, the plain sampler, returns to the image at *the guidance inverted at*, which by default is
the one of the way back, high or not: no correction of the source, no second latent, no learned
embedding, and any editor. The same rule serves noise, v and flow networks.

The price of inverting at a high guidance is the noise found there: it is the true one, but its
spread grows with the guidance (``inversion_guidance=1`` keeps it near 1 and gives up exactness at
others). Steps that cannot be solved to the tolerance are taken as near as they come, with one
warning; every step's residual is kept in ``extras["residual"]``, (N, B).

``acceleration="none"`` is plain fixed-point inversion, damped where it diverges.

Cost, measured on the embedded models at the default tolerance, 50 steps: 4 to 7 evaluations a step
and image, twice that with guidance.

References: Pan, Gherardi, Xie, Huang, "Effective Real Image Editing with Accelerated Iterative
Diffusion Inversion", ICCV 2023, arXiv 2309.04907; Meiri et al., "Fixed-point Inversion for
Text-to-image diffusion models", 2023, arXiv 2312.12540v1.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..core.registry import register
from ..core.solver import Solver
from ..core.state import Inversion, State
from ..solvers.implicit import AIDI_PAPER, EXACT_TO, FixedPoint
from ..solvers.implicit import FixedPointOptions as StepOptions
from ._implicit import climb
from .base import Job, Replay


@dataclass(frozen=True)
class FixedPointOptions(StepOptions):
    """Options of fixed-point inversion.

    Attributes:
        inversion_guidance: guidance on the way up; None takes that of the way back, which is what
            makes the round trip exact.
        inversion_embedded: the same for what a guidance-distilled model is told.
        strength: part of the grid that is walked, from the clean end; 1 goes all the way to noise.
    """

    inversion_guidance: float | None = None
    inversion_embedded: float | None = None
    strength: float = 1.0


@register(
    "fixed-point",
    task="invert",
    summary="each step solved for its exact inverse, at the guidance of the way back",
    paper=AIDI_PAPER,
    options=FixedPointOptions,
    exact=True,
    order=1,
    nfe="kN, k about 6 (12 guided)",
    provides={"trajectory", "exact"},
    facts={"exact_to": EXACT_TO},
)
class FixedPointInversion:
    """The implicit step up, DDIM down."""

    def __init__(self, options: FixedPointOptions):
        self.options = options

    def solver(self) -> Solver:
        """The implicit step."""
        return FixedPoint(self.options)

    def invert(self, job: Job) -> Inversion:
        """Walk up."""
        scale = job.scale(self.options.inversion_guidance)
        return climb(job, "fixed-point", self.options, self.solver(), scale, "residual")

    def replay(self, inversion: Inversion) -> Replay:
        """Walk down."""
        return Replay(self.solver(), State(inversion.noise))
