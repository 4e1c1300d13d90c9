r"""FireFlow inversion: second order at one evaluation a step, by reusing the last mid velocity.

The midpoint rule asks twice in a step; FireFlow keeps the velocity that the last step found in its
middle in the place of the first answer (see :mod:`retour.solvers.multistep`). Up and down are the
same rule on the same grid, each with its own first evaluation.

The carried velocity :math:`p` and the new one :math:`p'` give an error estimate for nothing: a step
:math:`h` with the one and with the other differ by

.. math:: e = |h|\,\operatorname{rms}(p' - p) = O(h^2),

the error of an Euler step there; twice that in the first step, whose :math:`p` is the velocity at
its start and not in the middle of a step before. With a `tolerance` the grid is found by it on the
way up: a step is kept if :math:`e` is within it, and the next one is
:math:`0.9\,\sqrt{tolerance/e}` times as long (0.2 to 4 times). The way back walks the grid that was
found. A batch shares one grid, that of its most demanding image, so here a batch does *not* do what
its images do alone.

Cost: N+1 evaluations; with a tolerance as many as it takes, and one for each step refused.

Reference: Deng et al., "FireFlow: Fast Inversion of Rectified Flow for Image Semantic Editing",
ICML 2025, arXiv 2412.07517. The adaptive grid is ours, with the textbook's step control: Hairer,
Norsett, Wanner, "Solving Ordinary Differential Equations I", 1993, II.4.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..core.grid import Grid, Step
from ..core.registry import get, register
from ..core.rows import rms
from ..core.solver import Solver
from ..core.state import Inversion, State
from ..errors import RetourError
from ..solvers._flow import clock, enter, velocity
from ..solvers.multistep import FIREFLOW_PAPER
from .base import ClimbOptions, Job, SolverInverter

SAFETY, SHRINK, GROW, TINY = 0.9, 0.2, 4.0, 1e-300


@dataclass(frozen=True)
class FireFlowOptions(ClimbOptions):
    """Options of FireFlow.

    Attributes:
        tolerance: largest error estimate of a step, root mean square over an image's latents; it
            decides the grid, and `steps` only the length that is tried first. None: the model's
            grid.
    """

    tolerance: float | None = None

    def __post_init__(self) -> None:
        if self.tolerance is not None and not self.tolerance > 0:
            raise RetourError(f"tolerance must be above 0 or none, got {self.tolerance}")


@register(
    "fireflow",
    task="invert",
    summary="midpoint rule with a reused velocity: second order at one evaluation a step",
    paper=FIREFLOW_PAPER,
    options=FireFlowOptions,
    order=2,
    nfe="N+1",
    provides={"trajectory"},
)
class FireFlowInversion(SolverInverter):
    """FireFlow walked up and down, on the model's grid or on one that it finds."""

    name = "fireflow"
    options: FireFlowOptions

    def solver(self) -> Solver:
        """FireFlow."""
        solver: Solver = get("solver", "fireflow").make()
        return solver

    def invert(self, job: Job) -> Inversion:
        """Walk up with the source prompt."""
        options, tolerance = self.options, self.options.tolerance
        if tolerance is None:
            return super().invert(job)
        grid, states = self._search(job, job.grid.truncate(options.strength), tolerance)
        if job.controls:  # They act in walks.
            scale, told = options.inversion_guidance, options.inversion_embedded
            states = job.climb(self.solver(), grid, scale, told=told)
        return job.pack(self.name, options, grid, states)

    def _search(self, job: Job, span: Grid, tolerance: float) -> tuple[Grid, dict[str, Tensor]]:
        path, solver = job.model.path, self.solver()
        denoise = job.denoiser(self.options.inversion_guidance, self.options.inversion_embedded)
        u, end = clock(path, span.times[0]), clock(path, span.times[-1])
        h, least = clock(path, span.times[1]) - u, (end - u) / job.model.train_steps
        times, start = [span.times[0]], solver.start(job.latents)
        # The velocity at the start, kept, is what the first step would ask for at every attempt.
        known = velocity(denoise, path, enter(path, start.x, times[0]), times[0])
        states = [replace(start, memory={"velocity": known})]
        while times[-1] < span.times[-1]:
            last = u + h >= end - least / 2
            s = span.times[-1] if last else float(path.from_flow_time(u + h))
            taken = solver.step(denoise, states[-1], Step(0, 1, times[-1], s, False), path)
            tried, h = h, clock(path, s) - u
            error = (2 if len(times) == 1 else 1) * _estimate(states[-1], taken, h)
            if error <= tolerance or tried <= least:
                times.append(s)
                states.append(taken)
                u = clock(path, s)
            factor = SAFETY * (tolerance / max(error, TINY)) ** 0.5
            h = max(least, h * min(GROW, max(SHRINK, factor)))
        return Grid(tuple(times)), {"x": torch.stack([state.x for state in states])}


def _estimate(before: State, after: State, h: float) -> float:
    """Largest error estimate of the images."""
    change = after.memory["velocity"] - before.memory["velocity"]
    return abs(h) * float(rms(change).max())
