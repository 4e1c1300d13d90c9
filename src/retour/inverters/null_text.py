r"""Null-text inversion: the null embedding is optimised, so that guided sampling finds the image.

The pivot is DDIM inversion at guidance 1 with the source prompt :math:`c`. On the way back at
guidance :math:`w` an embedding :math:`n_k` of the null prompt is learned for each interval k,

.. math::
    n_k = \arg\min_n \lVert S_k(\bar z_{k+1};\, \epsilon_u + w(\epsilon_c - \epsilon_u))
    - z^*_k \rVert^2, \qquad \epsilon_u = \epsilon(\bar z_{k+1}, n), \quad
    \epsilon_c = \epsilon(\bar z_{k+1}, c),

(see :mod:`._pivotal`) while the prompt's own embedding stays, so that editors that work through
attention still do. Both branches of an edit return with :math:`n_k`: what of the source it carries
leaks into the target, a trade-off of the method. ``variant="single-branch"`` gives it to the source
only; Direct Inversion's "null-latent" ablation, the same track for the source and the plain null
prompt for the target, is that too for every control that reads conditional rows alone.
``variant="global"`` learns one embedding for all intervals, in N n Adam steps (the paper's
ablation; it does not fix how, we take the intervals in turns from the pivot's own states).

With i the intervals done: n = 10 Adam steps at :math:`0.01\,(1 - i/2N)`, until the mean squared
error is below :math:`10^{-5} + 2\cdot10^{-5} i`. Published code writes :math:`1 - i/100` for its N
= 50; taken literally that rate is negative beyond 100 steps.

Embeddings belong to the guidance they were learned at. At guidance 1 they do not matter, and stay
the null prompt's.

Cost: N evaluations for the pivot, then up to 12N, 10N of them with a backward pass. Memory: one
graph of the network, and N L D floats an image for what is stored.

Reference: Mokady, Hertz, Aberman, Pritch, Cohen-Or, "Null-text Inversion for Editing Real Images
using Guided Diffusion Models", CVPR 2023, arXiv 2211.09794.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from ..core.branches import Branch
from ..core.grid import Step
from ..core.registry import Paper, get, register
from ..core.solver import Solver
from ..core.state import Inversion
from ._pivotal import PerStep, Plan, Tuning, check_differentiable
from .base import Job, Replay
from .ddim import DDIMOptions

Variant = Literal["per-step", "single-branch", "global"]


@dataclass(frozen=True)
class NullTextOptions(DDIMOptions):
    """Options of null-text inversion.

    Attributes:
        inner_steps: most Adam steps in an interval.
        lr: Adam's learning rate in the noisiest interval; it falls to half at the clean end.
        stop: mean squared error at which the noisiest interval is done,
        slack: which grows by that much with every interval.
        variant: an embedding for each interval, the same but for the source branch alone, or one
            for all intervals.
    """

    inner_steps: int = 10
    lr: float = 0.01
    stop: float = 1e-5
    slack: float = 2e-5
    variant: Variant = "per-step"


@register(
    "null-text",
    task="invert",
    summary="null embeddings optimised step by step: guided sampling returns to the image",
    paper=Paper(
        "Null-text Inversion for Editing Real Images using Guided Diffusion Models",
        "Mokady, Ron and Hertz, Amir and Aberman, Kfir and Pritch, Yael and Cohen-Or, Daniel",
        2023,
        "2211.09794",
        "CVPR 2023",
    ),
    options=NullTextOptions,
    order=1,
    nfe="up to 13N",
    needs={"gradients"},
    provides={"trajectory"},
)
class NullTextInversion:
    """DDIM up; DDIM down with learned null embeddings."""

    def __init__(self, options: NullTextOptions):
        self.options = options
        self.plan = Plan(options.inner_steps, options.lr, stop=options.stop, slack=options.slack)

    def solver(self) -> Solver:
        """DDIM, both ways."""
        return get("solver", "ddim").make(query=self.options.query)

    def invert(self, job: Job) -> Inversion:
        """Walk up at guidance 1, then learn on the way down."""
        check_differentiable(job.model)
        options, grid = self.options, job.grid.truncate(self.options.strength)
        scale, told = options.inversion_guidance, options.inversion_embedded
        states = job.climb(self.solver(), grid, scale, told=told)
        tuning = Tuning(job, grid, states["x"], "uncond", self.plan)
        found = tuning.all_steps() if options.variant == "global" else tuning.each_step()
        extras = {"uncond": found.embeds, "losses": found.losses}
        return job.pack("null-text", options, grid, states, **extras)

    def replay(self, inversion: Inversion) -> Replay:
        """Walk down with the learned embeddings."""
        return Replay(self.solver(), inversion.end(), _Nulls(inversion, self.options.variant))


class _Nulls(PerStep):
    """Unconditional rows read the learned embeddings."""

    def __init__(self, inversion: Inversion, variant: Variant):
        super().__init__(inversion)
        self.embeds, self.variant = inversion.extras["uncond"], variant

    def embed(self, step: Step, branch: Branch) -> Branch:
        """With that interval's null embedding."""
        if branch.uncond is None or self.variant == "single-branch" and branch.name != "source":
            return branch
        embeds = self.embeds[step.index].to(branch.uncond.tensors["embeds"].device)
        return replace(branch, uncond=branch.uncond.with_tensors(embeds=embeds))
