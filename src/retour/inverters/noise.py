r"""SDEdit: no inversion at all, the data is simply noised.

.. math:: x_t = \alpha_t x_0 + \sigma_t n

The sampler returns from the noisiest of these states under another prompt; what survives is what
the noise did not cover, so `strength` (SDEdit's :math:`t_0`) trades the picture for the prompt. The
source does not come back by itself.

The whole noised trajectory is kept, and with it the editor ``mask-blend`` is Blended Diffusion in
latents: after every step the outside of the mask is the data noised to that level.
``independent=True`` draws a noise for every level, as Blended Latent Diffusion does; one noise for
all (the default) makes the trajectory a straight line that fits a deterministic sampler's.
`eta` above 0 adds fresh noise on the way back (1: ancestral sampling, SDEdit's own), the same to
every branch.

Cost: none.

References: Meng et al., "SDEdit: Guided Image Synthesis and Editing with Stochastic Differential
Equations", ICLR 2022, arXiv 2108.01073; Avrahami, Fried, Lischinski, "Blended Latent Diffusion",
SIGGRAPH 2023, arXiv 2206.02779.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..core.registry import Paper, get, register
from ..core.solver import Solver
from ..core.state import Inversion, State
from ..errors import check_range
from ._noise_maps import GivenNoise, scattered
from .base import Job, Replay


@dataclass(frozen=True)
class NoiseOptions:
    """Options of SDEdit.

    Attributes:
        strength: part of the grid that is walked, from the clean end.
        eta: weight of fresh noise on the way back, in [0, 1].
        independent: another noise for every level, instead of one for all.
    """

    strength: float = 0.6
    eta: float = 0.0
    independent: bool = False

    def __post_init__(self) -> None:
        check_range("eta", self.eta, 0, 1)


@register(
    "noise",
    task="invert",
    summary="no inversion: the data plus noise (SDEdit); with mask-blend, Blended Diffusion",
    paper=Paper(
        "SDEdit: Guided Image Synthesis and Editing with Stochastic Differential Equations",
        "Meng, Chenlin and He, Yutong and Song, Yang and Song, Jiaming and Wu, Jiajun and "
        "Zhu, Jun-Yan and Ermon, Stefano",
        2021,
        "2108.01073",
        "ICLR 2022",
    ),
    options=NoiseOptions,
    nfe="0",
    stochastic=True,
    provides={"trajectory"},
)
class Noising:
    """Noise up; DDIM, stochastic if asked, down."""

    def __init__(self, options: NoiseOptions):
        self.options = options

    def solver(self) -> Solver:
        """DDIM with `eta`."""
        solver: Solver = get("solver", "ddpm").make(eta=self.options.eta)
        return solver

    def invert(self, job: Job) -> Inversion:
        """Noise the data to every level."""
        grid, options = job.grid.truncate(self.options.strength), self.options
        x = scattered(job, grid, alike=not options.independent)
        extras = {"noise": job.noise(grid.steps)} if options.eta > 0 else {}
        return job.pack("noise", options, grid, {"x": x}, **extras)

    def replay(self, inversion: Inversion) -> Replay:
        """Walk down from the noisiest state."""
        return Replay(self.solver(), State(inversion.noise), GivenNoise(inversion))
