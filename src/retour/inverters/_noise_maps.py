r"""Recorded noise: states of our choice, and the noise that makes them a path of the sampler.

A stochastic sampler steps from level t to s by :math:`x_s = \mu(x_t, \ldots) + v\,z`. Whatever
the states :math:`x_T \dots x_0` are, :math:`z = (x_s - \mu)/v` makes it walk through them. With
:math:`x_t = \alpha_t x_0 + \sigma_t n_t` and *independent* :math:`n_t` the network is asked at
known places only, in one batch; and the z are wider than unit noise and negatively correlated from
step to step: the picture is printed on them more strongly than on a sampler's own noise.

Each state is overwritten by :math:`\mu + v z` as computed, so that rounding does not add up. Where
v is 0 (a step to exactly clean data) no z can do it; the residual :math:`x_s - \mu` itself is kept
there as an offset, which is what :math:`v z` is elsewhere.

Recording follows the solver's own step, multistep history included: both ways walk by one rule.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ..core.branches import Branch, Layout, rescale
from ..core.control import Control
from ..core.grid import Grid, Step
from ..core.path import Path, Prediction
from ..core.solver import Solver
from ..core.state import Inversion, State
from .base import Job


class Noisy(Solver, Protocol):
    """A stochastic solver."""

    def std(self, path: Path, step: Step) -> float:
        """Factor of the unit noise in this step."""


class Known:
    """Stands in for a denoiser where the answer is known."""

    def __init__(self, prediction: Prediction):
        self.prediction = prediction

    def __call__(self, x: Tensor, t: float) -> Prediction:
        """The answer."""
        return self.prediction


def scattered(job: Job, grid: Grid, *, alike: bool = False) -> Tensor:
    """The data noised to every level of the grid, (N+1, B, C, h, w), clean first.

    The noises are independent, or (`alike`) one and the same.
    """
    path = job.model.path
    noises = [*job.noise(1)] * grid.steps if alike else [*job.noise(grid.steps)]
    levels = zip(noises, grid.times[1:], strict=True)
    noisy = [path.add_noise(job.latents, noise, t) for noise, t in levels]
    return torch.stack([job.latents, *noisy])


def record(job: Job, solver: Noisy, grid: Grid, scale: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Independently noised states and the noise with which `solver` walks down through them.

    Returns:
        The states (N+1, B, C, h, w), clean first, and the extras: `noise` (N, B, C, h, w) by
        interval, and `offset` of the same shape if a step takes no noise.
    """
    x = scattered(job, grid)
    found = job.predict_each(x[1:], grid.times[1:], scale)
    noise, offset = torch.zeros_like(x[1:]), torch.zeros_like(x[1:])
    state = solver.start(x[-1])
    for step in grid.walk(down=True):
        k = step.index
        known = Known(found.map(lambda face, k=k: face[k]))
        state = solver.step(known, state, step, job.model.path)
        std = solver.std(job.model.path, step)
        if std > 0:
            noise[k] = (x[k] - state.x) / std
            x[k] = state.x + std * noise[k]
        else:
            offset[k] = x[k] - state.x
        state = state.with_x(x[k])
    x[0] = job.latents
    return x, {"noise": noise, **({"offset": offset} if bool(offset.any()) else {})}


class GivenNoise(Control):
    """Gives every branch the inversion's noise of the step, and its offset after it.

    Args:
        inversion: its extras hold `noise`, and `offset` if any.
        scale: guidance scale of the source branch; None leaves it.
    """

    def __init__(self, inversion: Inversion, scale: float | None = None):
        self.noise = inversion.extras.get("noise")
        self.offset = inversion.extras.get("offset")
        self.scale = scale

    def branches(self, step: Step, branches: tuple[Branch, ...]) -> tuple[Branch, ...]:
        """The source is guided as it was when its noise was recorded."""
        return branches if self.scale is None else rescale(branches, source=self.scale)

    def before_step(self, step: Step, state: State, layout: Layout) -> State:
        """Put the step's noise into the state's memory."""
        if self.noise is None:
            return state
        noise = _spread(self.noise[step.index], state.x, layout)
        return State(state.x, {**state.memory, "noise": noise})

    def after_step(self, step: Step, state: State, before: State, layout: Layout) -> State:
        """Add the step's offset."""
        if self.offset is None:
            return state
        return state.with_x(state.x + _spread(self.offset[step.index], state.x, layout))


def _spread(value: Tensor, like: Tensor, layout: Layout) -> Tensor:
    """B rows repeated for every branch."""
    return value.to(like).repeat(len(layout.names), *[1] * (value.ndim - 1))
