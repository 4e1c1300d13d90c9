r"""Prompt tuning inversion: the prompt's embedding is optimised; an edit mixes in the target's.

The pivot is DDIM inversion with the null prompt alone (guidance 0), which hardly drifts and knows
no prompt. On the way back at guidance :math:`w` it is the *conditional* embedding :math:`c_k` that
is learned for each interval k (see :mod:`._pivotal`),

.. math::
    c_k = \arg\min_c \lVert S_k(\bar z_{k+1};\, \epsilon_0 + w(\epsilon(\bar z_{k+1}, c) -
    \epsilon_0)) - z^*_k \rVert^2, \qquad \epsilon_0 = \epsilon(\bar z_{k+1}, \text{null}).

Then the source branch returns with :math:`c_k`, and a target of embedding :math:`c^*` with

.. math:: c = \eta\, c^* + (1 - \eta)\, c_k :

0 is the reconstruction, 1 plain sampling from the inverted noise. Pooled embeddings (SDXL, SD3) are
not learned but mixed likewise, from those of the prompt that learning began with.

No caption of the image is needed: learning begins at the embedding of the prompt given to
``invert``, which in the paper is the *target* prompt; a source prompt serves as well, and one
inversion serves many targets. ``eta`` matters on the way back only:
``inversion.with_options(eta=0.7)`` returns with another one.

What the paper leaves open: loss and rate. Here the mean squared error (Adam hardly sees the
difference to the sum), n = 5 Adam steps at :math:`0.01\,(1 - i/2N)` with i the intervals done, no
early stop; guidance is the caller's (independent code takes 5 and 7.5). ``inversion_guidance=1``
makes the pivot with the prompt instead, as another implementation does (it then needs a source
prompt).

All L tokens are free, padding included, so a large rate takes :math:`c_k` far from any prompt and
the mix jumps; the inversion keeps the distances :math:`\lVert c_k - c_{init}\rVert` as ``drift``.

Cost: N evaluations for the pivot (2N at other `inversion_guidance` than 0 and 1), then 7N, 5N of
them with a backward pass.

Reference: Dong, Xue, Duan, Han, "Prompt Tuning Inversion for Text-Driven Image Editing Using
Diffusion Models", ICCV 2023, arXiv 2305.04441.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..core.branches import Branch
from ..core.grid import Grid, Step
from ..core.model import Condition
from ..core.registry import Paper, get, register
from ..core.solver import Solver
from ..core.state import Inversion
from ..errors import check_range
from ._pivotal import PerStep, Plan, Tuning, check_differentiable
from .base import Job, Replay
from .ddim import DDIMOptions


@dataclass(frozen=True)
class PromptTuningOptions(DDIMOptions):
    """Options of prompt tuning inversion.

    Attributes:
        inversion_guidance: guidance of the pivot: 0 is the null prompt alone, 1 the prompt alone.
        inner_steps: Adam steps in an interval.
        lr: Adam's learning rate in the noisiest interval; it falls to half at the clean end.
        eta: share of the target's embedding on the way back.
    """

    inversion_guidance: float = 0.0
    inner_steps: int = 5
    lr: float = 0.01
    eta: float = 0.9


@register(
    "prompt-tuning",
    task="invert",
    summary="prompt embeddings optimised step by step; edits mix in those of the target",
    paper=Paper(
        "Prompt Tuning Inversion for Text-Driven Image Editing Using Diffusion Models",
        "Dong, Wenkai and Xue, Song and Duan, Xiaoyue and Han, Shumin",
        2023,
        "2305.04441",
        "ICCV 2023",
    ),
    options=PromptTuningOptions,
    order=1,
    nfe="8N",
    needs={"gradients"},
    provides={"trajectory"},
)
class PromptTuningInversion:
    """DDIM up without a prompt; DDIM down with learned embeddings."""

    def __init__(self, options: PromptTuningOptions):
        self.options = options
        self.plan = Plan(options.inner_steps, options.lr)
        check_range("eta", options.eta, 0, 1)

    def solver(self) -> Solver:
        """DDIM, both ways."""
        return get("solver", "ddim").make(query=self.options.query)

    def invert(self, job: Job) -> Inversion:
        """Walk up without a prompt, then learn one on the way down."""
        check_differentiable(job.model)
        grid = job.grid.truncate(self.options.strength)
        pivot = self._pivot(job, grid)
        found = Tuning(job, grid, pivot, "cond", self.plan).each_step()
        drift = (found.embeds - job.condition.tensors["embeds"]).flatten(2).norm(dim=-1)
        extras = {"cond": found.embeds, "losses": found.losses, "drift": drift}
        return job.pack("prompt-tuning", self.options, grid, {"x": pivot}, **extras)

    def _pivot(self, job: Job, grid: Grid) -> Tensor:
        """States of the way up; guidance 0 is the null prompt alone, at half the evaluations."""
        scale = self.options.inversion_guidance
        if scale == 0:
            job, scale = replace(job, condition=job.negative), 1.0
        told = self.options.inversion_embedded
        return job.climb(self.solver(), grid, scale, told=told)["x"]

    def replay(self, inversion: Inversion) -> Replay:
        """Walk down with the learned embeddings."""
        return Replay(self.solver(), inversion.end(), _Prompts(inversion, self.options.eta))


class _Prompts(PerStep):
    """The source reads the learned embeddings, targets a mix of theirs with them."""

    def __init__(self, inversion: Inversion, eta: float):
        super().__init__(inversion)
        self.embeds, self.prompt, self.eta = inversion.extras["cond"], inversion.condition, eta

    def embed(self, step: Step, branch: Branch) -> Branch:
        """With that interval's condition."""
        if branch.auxiliary:
            return branch
        learned = self.prompt.with_tensors(embeds=self.embeds[step.index])
        share = 0.0 if branch.name == "source" else self.eta
        return replace(branch, condition=mixed(learned, branch.condition, share))


def mixed(learned: Condition, target: Condition, share: float) -> Condition:
    """The condition a `share` of the way from `learned` to `target`, tensor by tensor."""

    def mix(name: str, own: Tensor) -> Tensor:
        start = learned.tensors[name].to(own.device)
        # Unlike the sum, lerp returns either end, and what both have in common, unchanged.
        return torch.lerp(start, own.to(start.dtype), share)

    return target.with_tensors(**{k: mix(k, v) for k, v in target.tensors.items()})
