r"""FlowOpt: find the noise that the whole sampler turns into the picture, without gradients.

From Uni-Inv's noise, :math:`z \leftarrow z - \eta (F(z) - y)` with :math:`F` the Euler sampler
under the source prompt (see :mod:`._flowopt` for what it is and when it converges). Every iterate
is usable: a `monitor` sees it and may stop the search.

Where we deviate: the published step sizes (0.0025 for FLUX, 0.01 for SD3) belong to those models,
and take hundreds of iterations on others. Here :math:`\eta` is a `fraction` of the largest step
that brings pairs of perturbed latents closer, estimated for each image; ``eta=...`` gives the
number itself. The record tells how far from typical the noise found is (`mean_square`,
`kurtosis`). It belongs to the guidance of the search, 1 by default as in the paper;
for a guided way back, search with that guidance (`inversion_guidance`), if it converges.

Cost: N+1 to start, (iterations + 1) N, and `probes` x `rounds` x N for the estimate: 321 at the
paper's 10 steps and 30 iterations with `eta` given, 60 more with the estimate.

Reference: Ronai, Kulikov, Michaeli, "FlowOpt: Fast Optimization Through Whole Flow Processes for
Training-Free Editing", 2025, arXiv 2510.22010.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..core.branches import Branch
from ..core.registry import Paper, get, register
from ..core.rows import rms
from ..core.state import Inversion, State, stack
from ._flowopt import Sampler, SearchOptions, normality, search
from .base import ClimbOptions, Job, Replay
from .uniinv import UniInvStep

FLOWOPT_PAPER = Paper(
    "FlowOpt: Fast Optimization Through Whole Flow Processes for Training-Free Editing",
    "Ronai, Or and Kulikov, Vladimir and Michaeli, Tomer",
    2025,
    "2510.22010",
)


@dataclass(frozen=True)
class FlowOptOptions(SearchOptions, ClimbOptions):
    """Options of FlowOpt's inversion; a `monitor` is not kept with the inversion."""


@register(
    "flowopt",
    task="invert",
    summary="the noise fitted through the whole sampler by zero-order updates",
    paper=FLOWOPT_PAPER,
    options=FlowOptOptions,
    nfe="38N+1",
    provides={"trajectory"},
)
class FlowOptInversion:
    """Uni-Inv, then FlowOpt's iteration; Euler down."""

    def __init__(self, options: FlowOptOptions):
        self.options = options

    def invert(self, job: Job) -> Inversion:
        """Search, then keep the trajectory of the last iterate."""
        options, y = self.options, job.latents
        grid, scale = job.grid.truncate(options.strength), options.inversion_guidance
        told = options.inversion_embedded
        z = job.climb(UniInvStep(), grid, scale, told=told)["x"][-1]
        branch = Branch("source", job.condition.told(told), job.negative.told(told), scale)
        flow = Sampler(job.model, branch, grid, grid.steps, rule=job.rule, ledger=job.ledger)
        found = search(flow, z, y, options, job.noise(options.probes))
        states = [State(found.z)]
        end = flow(found.z, [lambda event: states.append(event.state)])
        # The data itself, not what the sampler makes of its noise, is the clean end.
        states[-1] = State(y)
        inversion = job.pack("flowopt", replace(options, monitor=None), grid, stack(states[::-1]))
        inversion.record = {
            "eta": found.eta.tolist(),
            "residuals": [*found.residuals.tolist(), rms(end - y).tolist()],
            **normality(found.z),
        }
        return inversion

    def replay(self, inversion: Inversion) -> Replay:
        """Walk down by Euler's rule."""
        return Replay(get("solver", "ddim").make(), inversion.end())
