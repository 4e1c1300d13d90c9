r"""FlowEdit: a path from the source to the target that never visits noise.

In flow coordinates (see :mod:`retour.core.path`), with :math:`y_0` the data, :math:`z = y_0` at
first, and in every step from :math:`u` to :math:`u' < u` a fresh noise :math:`e`:

.. math:: a = (1-u)\,y_0 + u\,e, \qquad b = a + (z - y_0), \qquad
          z \leftarrow z + (u' - u)\,\big[V(b, u; \text{target}) - V(a, u; \text{source})\big]

the bracket averaged over `n_avg` noises. The noisiest steps are skipped, so that the source's
structure stays: only the `n_max` cleanest of the grid's steps are taken. In the last `n_min` there
is no difference any more: from :math:`z + a - y_0`, noised once, the target alone is sampled.

Nothing is inverted. Of an inversion FlowEdit reads the data, the prompts and the grid, so it goes
with every inverter, best with one that costs nothing (``virtual``); its sampler is Euler's rule,
whatever the inverter's. Source and target run as the two branches of one batch; what they carry
from step to step is their difference, :math:`b - a = z - y_0`. Runs on every path.

With equal prompts and scales the data returns exactly, and between two Gaussians of equal spread
the result is exactly the data moved by the difference of their means.

Where we deviate: the published counts, 33 of 50 steps with SD3 and 24 of 28 with FLUX, begin at the
flow times 0.85 and 0.95 of those models' shifted grids. An unshifted grid would begin at 0.66 with
the same count, too late to change a background; so without `n_max` the steps up to SD3's *time* are
taken, on any grid. The published guidance scales (source and target: 3.5 and 13.5 with SD3, 1.5 and
5.5 told to FLUX) are no defaults: both sides take the edit's scale unless told otherwise. Noises
are drawn for the intervals of the whole grid, so that another `n_max` sees the same ones. A user's
mask multiplies :math:`z - y_0`.

Cost: the source's and the target's rows in `n_max` N steps, `n_avg` times.

Reference: Kulikov et al., "FlowEdit: Inversion-Free Text-Based Editing Using Pre-Trained Flow
Models", ICCV 2025, arXiv 2412.08629.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from ..core.branches import Branch, Denoiser, Layout, Wrapped
from ..core.control import Control
from ..core.grid import Step, part_of, shift
from ..core.path import Prediction, levels, predict
from ..core.registry import Paper, get, register
from ..core.state import State
from ..errors import RetourError, check_range
from ..inverters.base import Replay
from ..solvers._flow import clock, enter, leave
from .base import EditJob, Editor, Start

Asked: TypeAlias = Denoiser | Wrapped

START = shift(33 / 50, 3.0)  # SD3's count on SD3's grid.


@dataclass(frozen=True)
class FlowEditOptions:
    """Options of FlowEdit.

    Attributes:
        n_max: part of the grid's steps that is taken, from the clean end; None: as many as begin
            nearest to flow time 0.85.
        n_min: part of them, the last, in which the target is sampled alone.
        n_avg: noises per step.
        source_guidance: guidance scale of the source: classifier-free, or what a
            guidance-distilled model is told. None: that of the edit.
        target_guidance: the same of the target.
        seed: of the noises.
    """

    n_max: float | None = None
    n_min: float = 0.0
    n_avg: int = 1
    source_guidance: float | None = None
    target_guidance: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.n_max is not None:
            check_range("n_max", self.n_max, 0, 1)
        check_range("n_min", self.n_min, 0, 1 if self.n_max is None else self.n_max)
        if self.n_avg < 1:
            raise RetourError(f"n_avg must be at least 1, got {self.n_avg}")


@register(
    "flowedit",
    task="edit",
    summary="the difference of the target's and the source's velocity carries the data itself",
    paper=Paper(
        "FlowEdit: Inversion-Free Text-Based Editing Using Pre-Trained Flow Models",
        "Kulikov, Vladimir and Kleiner, Matan and Huberman-Spiegelglas, Inbar and Michaeli, Tomer",
        2025,
        "2412.08629",
        "ICCV 2025",
    ),
    options=FlowEditOptions,
    nfe="4 n_max N",
    stochastic=True,
    mate="virtual",
)
class FlowEdit(Editor):
    """Source and target in one batch, of which the difference is carried."""

    source_branch = True
    masks = True

    def __init__(self, options: FlowEditOptions | None = None):
        self.options = FlowEditOptions() if options is None else options

    def replay(self, replay: Replay) -> Replay:
        """Euler's rule, without the inverter's corrections."""
        return Replay(get("solver", "ddim").make(), replay.state)

    def arrange(self, branches: tuple[Branch, ...]) -> tuple[Branch, ...]:
        """Give the source and the targets their scales."""
        options = self.options
        return tuple(
            scaled(b, options.source_guidance if b.name == "source" else options.target_guidance)
            for b in branches
        )

    def prepare(self, job: EditJob, denoiser: Denoiser, replay: Replay) -> Start:
        """All branches at the data: their difference is nothing yet."""
        data = job.inversion.latents.to(denoiser.model.device)
        return Start(State(data).tile(len(denoiser.branches)), self.depth(job))

    def control(self, job: EditJob) -> Control:
        """The path from source to target."""
        return Difference(job, self.options, self.alone(job))

    def depth(self, job: EditJob) -> int:
        """Number of steps taken; no more than the inversion's grid has."""
        if self.options.n_max is not None:
            return self._count(job, self.options.n_max)
        gaps = [abs(clock(job.model.path, t) - START) for t in job.grid.times]
        return gaps.index(min(gaps))

    def alone(self, job: EditJob) -> int:
        """Number of steps, the last ones, in which the targets are sampled alone."""
        return min(self.depth(job), self._count(job, self.options.n_min))

    def _count(self, job: EditJob, part: float) -> int:
        whole = job.inversion.record.get("steps", job.grid.steps)
        return min(job.grid.steps, part_of(part, whole))


def scaled(branch: Branch, scale: float | None) -> Branch:
    """The branch at another guidance scale, of the kind that its model has."""
    if scale is None:
        return branch
    if "guidance" not in branch.condition.tensors:
        return replace(branch, scale=scale)
    negative = None if branch.uncond is None else branch.uncond.told(scale)
    return replace(branch, condition=branch.condition.told(scale), uncond=negative)


class Difference(Control):
    """Renews the noise under source and targets, and keeps what differs.

    Args:
        job: the edit.
        options: of FlowEdit.
        alone: number of the last steps in which the targets are sampled alone.
    """

    def __init__(self, job: EditJob, options: FlowEditOptions, alone: int):
        inversion, self.path, self.alone = job.inversion, job.model.path, alone
        self.clean, self.mask = job.grid.times[0], job.mask
        self.data = enter(self.path, inversion.latents, self.clean)
        generator = torch.Generator().manual_seed(options.seed)
        shape = (job.grid.steps, options.n_avg, 1, *inversion.latents.shape[1:])
        self.noise = torch.randn(shape, generator=generator, dtype=torch.float64)

    def before_step(self, step: Step, state: State, layout: Layout) -> State:
        """Put fresh noise under all branches: the source at `a`, targets at `b`."""
        if step.index < self.alone - 1:
            return state
        u, y = clock(self.path, step.t), enter(self.path, state.x, step.t)
        fresh = (1 - u) * self.data.to(y) + u * self.noise[step.index, 0].to(y)
        moved = [fresh + part - y[layout["source"]] for _, part in layout.split(y)]
        return State(leave(self.path, torch.cat(moved), step.t))

    def denoiser(self, step: Step, denoise: Asked, layout: Layout) -> Asked:
        """Differences averaged over noises; the targets alone in the last steps."""
        if step.index < self.alone:
            return Alone(denoise, self.noise[self.alone - 1, 0], self.data, layout)
        if self.plain(step):
            return denoise

        def rule(first: Prediction, x: Tensor, t: float) -> Prediction:
            u, draws = clock(self.path, t), self.noise[step.index].to(x)
            points = [x + leave(self.path, u * (e - draws[0]), t) for e in draws]
            velocities = [first.velocity, *[denoise(p, t).velocity for p in points[1:]]]
            found = self.average(torch.stack(points), torch.stack(velocities), u, layout)
            return predict("velocity", found, x, *levels(self.path, t, x))

        return Wrapped(denoise, rule)

    def plain(self, step: Step) -> bool:
        """Whether one noise's velocities are taken as they are."""
        return self.noise.shape[1] == 1

    def average(self, points: Tensor, velocities: Tensor, u: float, layout: Layout) -> Tensor:
        """Velocities (R, C, h, w) to step with, of n_avg ones at as many points."""
        return velocities.mean(0)

    def after_step(self, step: Step, state: State, before: State, layout: Layout) -> State:
        """Outside of the mask nothing differs."""
        if self.mask is None:
            return state
        source, mask = state.x[layout["source"]], self.mask.to(state.x)
        parts = [source + mask * (part - source) for _, part in layout.split(state.x)]
        return state.with_x(torch.cat(parts))

    def finish(self, x: Tensor, layout: Layout) -> Tensor:
        """The data, and what differs from it."""
        source = x[layout["source"]]
        data = leave(self.path, self.data.to(x), self.clean)
        moved = 0 if self.alone else data - source
        parts = {name: part + moved for name, part in layout.split(x)}
        return torch.cat([*({**parts, "source": data}).values()])


class Alone(Wrapped):
    """Asks about the targets only; the source's velocity, from data to known noise, is known."""

    def __init__(self, inner: Asked, noise: Tensor, data: Tensor, layout: Layout):
        super().__init__(inner, lambda prediction, x, t: prediction)
        self.noise, self.data, self.layout = noise, data, layout

    def __call__(self, x: Tensor, t: float) -> Prediction:
        """The prediction for all branches."""
        assert isinstance(self.inner, Denoiser)
        names, rows = self.layout.targets(), self.layout["source"]
        others = torch.cat([x[self.layout[name]] for name in names])
        found = self.inner.only(*names)(others, t)
        known = predict(
            "velocity",
            (self.noise - self.data).to(x),
            x[rows],
            *levels(self.model.path, t, x),
        )
        return Prediction(torch.cat([known.x0, found.x0]), torch.cat([known.eps, found.eps]))
