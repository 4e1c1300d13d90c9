r"""FlowChef's editing: sample the target from noise while the background is steered to the source.

Every step's clean estimate descends on :math:`\tfrac12 \sum (1 - m)(\hat x_0 - z_{src})^2`, with
the velocity held (see :mod:`retour.restorers.steering`); :math:`m` is 1 where editing is allowed.
In the first steps, a fraction `source_until` of them, the whole picture counts, which gives the
edit its layout. Inside the mask alone the velocity is pushed away from the source prompt's,

.. math:: v = v_e + m\,w\,(v_e - v_b),

which is classifier-free guidance of scale :math:`1 + w` with the source prompt as the negative one,
and none outside; the negative prompt of the inversion is not used.

The run starts from fresh noise and steps by Euler's rule: of the inversion only its clean latents
and its grid are used, so any inverter serves, and the cheapest is `noise` with ``strength=1``.
``start="inversion"`` keeps the inverted noise instead.

Where we deviate: sizes of steps are parts of the error that a step removes, and not the published
learning rates, which belong to one latent size (0.6 on a loss of 1000 x mean over FLUX's latents at
1024 px is 0.0046; the InstaFlow script's Adam, with its loss weighted 1e-5, comes to about 0.05).
There is one size for both regions, as published, unless `hold` gives that outside of the mask: 1
returns the background, and with it whatever of the object the mask's cells leave out. Without a
mask everything may change and only the first steps hold the source. How many differs by kind of
edit in the published settings, 0 to 10 of 30 steps on FLUX and 0 to 30 of 50 with InstaFlow. Here
0.6 of the steps with 0.03 in each of 28 were the best of fourteen settings of both on 20 pictures
of emoji-mmdit, by the score of the target prompt and the background's distance: with fewer and
stronger steps both were worse, and more or stronger ones kept colours and backgrounds that were to
change. As the same size in more steps holds more, the default is what those 17 steps remove
together, a `share` of 0.4, and `kappa` follows from it and from the number of steps.

Cost: 2N evaluations per target (N at `push` 0), beside the inversion.

Reference: Patel et al., "Steering Rectified Flow Models in the Vector Field for Controlled Image
Generation", 2024, arXiv 2412.00100 (ICCV 2025 as "FlowChef").
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ..core.branches import Branch, Denoiser
from ..core.grid import Step
from ..core.guidance import CFG, Guidance
from ..core.path import Prediction
from ..core.registry import get, register
from ..core.solver import Solver
from ..core.state import State
from ..errors import RetourError, check_range
from ..inverters.base import Replay
from ..restorers.flowchef import FLOWCHEF_PAPER, check_steering
from ..restorers.steering import Cost, Distance, Steer
from .base import EditJob, Editor, Start


@dataclass(frozen=True)
class FlowChefEditOptions:
    """Options of FlowChef's editing.

    Attributes:
        kappa: part of the distance to the source that one inner step removes; 2 and more diverges.
            None: as much as makes the `share`.
        share: part of that distance that the steps up to `source_until` (where there are none, all
            that are steered) would remove together, were it not for the network; below 1.
        hold: the same outside of the mask; None: `kappa`.
        inner: steps of descent for each answer of the network.
        until: fraction of the steps, from the noisy end, that are steered.
        source_until: fraction of the steps in which the edited region is held to the source too.
        push: w above; None takes the guidance scale of the edit less 1.
        start: fresh noise, or the inversion's.
        seed: of the fresh noise.
    """

    kappa: float | None = None
    share: float = 0.4
    hold: float | None = None
    inner: int = 1
    until: float = 1.0
    source_until: float = 0.6
    push: float | None = None
    start: Literal["noise", "inversion"] = "noise"
    seed: int = 0

    def __post_init__(self) -> None:
        check_steering(0.0 if self.kappa is None else self.kappa, self.inner, 0)
        if not 0 <= self.share < 1:
            raise RetourError(f"share must be at least 0 and below 1, got {self.share}")
        if self.hold is not None:
            check_range("hold", self.hold, 0)
        check_range("until", self.until, 0, 1)
        check_range("source_until", self.source_until, 0, 1)
        if self.push is not None:
            check_range("push", self.push, 0)

    def size(self, steps: int) -> float:
        """Part of the distance that one inner step removes on a grid of so many steps."""
        if self.kappa is not None:
            return self.kappa
        held = math.ceil(round((self.source_until or self.until) * steps, 9))
        return 1 - (1 - self.share) ** (1 / max(1, held * self.inner))


@register(
    "flowchef",
    task="edit",
    summary="the target sampled from noise, its background steered to the source",
    paper=FLOWCHEF_PAPER,
    options=FlowChefEditOptions,
    nfe="2N",
    stochastic=True,
    mate="euler",
)
class FlowChefEditor(Editor):
    """Steer the background, push the rest."""

    masks = True

    def __init__(self, options: FlowChefEditOptions | None = None):
        self.options = FlowChefEditOptions() if options is None else options

    def control(self, job: EditJob) -> _Edit:
        """Steering, guidance by the source prompt.

        Raises:
            RetourError: nothing would hold the source.
        """
        if job.mask is None and self.options.source_until == 0:
            raise RetourError(
                "without a mask and with source_until 0 nothing holds the source: give a mask "
                "(--mask) or a source_until above 0"
            )
        return _Edit(job, self.options)

    def replay(self, replay: Replay) -> Replay:
        """Plain Euler: what a coupled or noisy sampler makes of a moved prediction is no move."""
        solver: Solver = get("solver", "ddim").make()
        return Replay(solver, State(replay.state.x))

    def prepare(self, job: EditJob, denoiser: Denoiser, replay: Replay) -> Start:
        """Fresh noise, or the inversion's."""
        if self.options.start == "inversion":
            return super().prepare(job, denoiser, replay)
        z = replay.state.x
        generator = torch.Generator().manual_seed(self.options.seed)
        noise = torch.randn(1, *z.shape[1:], generator=generator, dtype=z.dtype).to(z.device)
        clean = job.inversion.latents.to(z)
        x = job.model.path.add_noise(clean, noise.expand_as(z), job.grid.times[-1])
        return Start(State(x).tile(len(denoiser.branches)), job.grid.steps)


class _Edit(Steer):
    """Steering with the costs of each step, and the source prompt as the negative one."""

    def __init__(self, job: EditJob, options: FlowChefEditOptions):
        super().__init__(self.held, 1.0, inner=options.inner)
        self.options, self.targets = options, job.layout.targets()
        z = job.inversion.latents
        mask = torch.ones_like(z[:, :1]) if job.mask is None else job.mask.to(z)
        self.mask, self.source = mask, job.inversion.condition
        kappa = options.size(job.grid.steps)
        outside = (kappa if options.hold is None else options.hold) * (1 - mask)
        self.background = Distance(z, outside)
        self.everything = Distance(z, outside + kappa * mask)

    def held(self, step: Step) -> Mapping[str, Cost]:
        """What holds the targets in this step."""
        if step.passed >= self.options.until:
            return {}
        cost = self.everything if step.passed < self.options.source_until else self.background
        return dict.fromkeys(self.targets, cost)

    def branches(self, step: Step, branches: tuple[Branch, ...]) -> tuple[Branch, ...]:
        """Targets are guided away from the source prompt."""
        push = self.options.push
        return tuple(
            replace(b, uncond=self.source, scale=b.scale if push is None else 1 + push)
            if b.name in self.targets
            else b
            for b in branches
        )

    def guidance(self, step: Step, rule: Guidance) -> Guidance:
        """The push, inside the mask."""
        return _Push(self.mask, rule)


@dataclass(frozen=True)
class _Push:
    """Guidance inside a mask, none outside."""

    mask: Tensor
    inner: Guidance = CFG()

    def active(self, t: float) -> bool:
        """As the wrapped guidance."""
        return self.inner.active(t)

    def __call__(self, cond: Prediction, uncond: Prediction, scale: Tensor) -> Prediction:
        """Between the conditional prediction and the guided one."""
        guided = self.inner(cond, uncond, scale)
        mask = self.mask.to(cond.x0)
        return Prediction(
            cond.x0 + mask * (guided.x0 - cond.x0), cond.eps + mask * (guided.eps - cond.eps)
        )
