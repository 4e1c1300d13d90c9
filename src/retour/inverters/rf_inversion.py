r"""RF-Inversion: a controlled flow up to typical noise, and one back that is pulled to the picture.

In flow coordinates (see :mod:`retour.core.path`), with :math:`V` the network's velocity,
:math:`y_0` the data and :math:`y_1 \sim N(0, I)` drawn once:

.. math::
   \text{up, empty prompt:}\quad & dy = \big[V + \gamma\,(C_1 - V)\big]\,du, \qquad
       C_1 = \frac{y_1 - y}{1 - u} \\
   \text{down, edit prompt:}\quad & dy = \big[V + \eta_i\,(C_0 - V)\big]\,du, \qquad
       C_0 = \frac{y - y_0}{u - u_0}

:math:`C_1, C_0` are the velocities of the straight lines to the noise and to the data, the optimal
controls of a linear-quadratic regulator with infinite end weight. :math:`\gamma = 1` ends in
:math:`y_1` itself, :math:`\gamma = 0` is plain flow inversion; :math:`\eta = 1` in the last step
ends in the data. :math:`\eta_i = \eta` from `start` to `stop` (fractions of the steps, counted from
noise, truncated), and 0 elsewhere; with `decay` it is multiplied by :math:`(1 - i/N)^{decay}`. In
the steps that are pulled every branch is, so a reconstruction is as well.

Forms: ``ode`` as above. ``sde`` is theorems 3.4 and 3.5: up, without any network,

.. math:: dy = -\frac{y - \gamma y_1}{1 - u}\,du + \sqrt{2 (1-\gamma) \tfrac{u}{1-u}}\,dW,

taken by its exact transitions, since Euler's rule doubles the variance of the last step,

.. math:: y_b = \tfrac{1-b}{1-a} y_a + \gamma \tfrac{b-a}{1-a} y_1
              + \sqrt{(1-\gamma)\big(b^2 - a^2 \tfrac{(1-b)^2}{(1-a)^2}\big)}\; z,

and down, in :math:`\tau = 1 - u` with :math:`w = -V`, :math:`\hat w = w + \eta (w_c - w)`,

.. math:: dy = \big[\hat w + (1-\eta)(w - y/\tau)\big]\,d\tau
               + \sqrt{2 (1-\eta) \tfrac{1-\tau}{\tau}}\,dW,

by Euler's rule; the first step (:math:`\tau = 0`) and the last, whose noise would stay, are the
ODE's. ``sde-code`` is the authors' code, whose way down has :math:`2 \hat w - y/\tau` and full
noise: the same where :math:`\eta = 0`. Elsewhere neither keeps the marginals of the ODE, since the
score in it is that of the uncontrolled process. Both are stiff near noise: give them many steps.

Where we deviate: the way up walks the sampling grid backwards. A popular port takes times, steps
and pull from three different clocks and so misses :math:`y_1` even at :math:`\gamma = 1`. The pull
down ends at the state that the inversion began with, which on discrete VP models is not exactly
clean. Runs on every path.

Cost: N evaluations up (none for ``sde``); those of the sampler down.

Reference: Rout et al., "Semantic Image Inversion and Editing using Rectified Stochastic
Differential Equations", ICLR 2025, arXiv 2410.10792.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, TypeAlias

from torch import Tensor

from ..core.branches import Denoiser, Layout, Wrapped
from ..core.control import Control
from ..core.grid import Grid, Step
from ..core.path import Prediction, levels, predict
from ..core.registry import Paper, get, register
from ..core.rows import copies
from ..core.solver import Solver
from ..core.state import Inversion, State, stack
from ..errors import RetourError, check_range
from ..solvers._flow import clock, enter, leave
from .base import Job, Replay

Asked: TypeAlias = Denoiser | Wrapped


@dataclass(frozen=True)
class RFInversionOptions:
    """Options of RF-Inversion.

    Attributes:
        gamma: pull to typical noise on the way up, in [0, 1].
        eta: pull to the picture on the way back, in [0, 1].
        start: fraction of the steps before that pull begins.
        stop: fraction of the steps after which it ends.
        decay: power with which the pull fades over the steps; None: not at all.
        prompt: what the way up is told: nothing (the negative prompt, empty by default) or the
            source prompt.
        form: ordinary or stochastic differential equation, see the module.
        strength: part of the grid that is walked, from the clean end.
        inversion_embedded: guidance that a guidance-distilled model is told on the way up; None:
            that of the way back.
    """

    gamma: float = 0.5
    eta: float = 0.9
    start: float = 0.0
    stop: float = 0.25
    decay: float | None = None
    prompt: Literal["null", "source"] = "null"
    form: Literal["ode", "sde", "sde-code"] = "ode"
    strength: float = 1.0
    inversion_embedded: float | None = 0.0

    def __post_init__(self) -> None:
        for name in ("gamma", "eta", "start", "stop"):
            check_range(name, getattr(self, name), 0, 1)
        if self.start > self.stop:
            raise RetourError(f"start must not be after stop, got {self.start} and {self.stop}")
        if self.decay is not None:
            check_range("decay", self.decay, 0, math.inf)

    def pull(self, position: int, steps: int) -> float:
        """Eta of the step at `position`, counted from noise, of `steps`."""
        first, end = (math.floor(round(part * steps, 9)) for part in (self.start, self.stop))
        if not first <= position < end:
            return 0.0
        return self.eta * (1.0 if self.decay is None else (1 - position / steps) ** self.decay)


@register(
    "rf-inversion",
    task="invert",
    summary="controlled flow: up to typical noise, back with a pull to the picture",
    paper=Paper(
        "Semantic Image Inversion and Editing using Rectified Stochastic Differential Equations",
        "Rout, Litu and Chen, Yujia and Ruiz, Nataniel and Caramanis, Constantine and "
        "Shakkottai, Sanjay and Chu, Wen-Sheng",
        2025,
        "2410.10792",
        "ICLR 2025",
    ),
    options=RFInversionOptions,
    nfe="N",
    stochastic=True,
    provides={"trajectory"},
)
class RFInversion:
    """Controlled flow up and down."""

    name: ClassVar[str] = "rf-inversion"

    def __init__(self, options: RFInversionOptions):
        self.options = options

    def invert(self, job: Job) -> Inversion:
        """Walk up, pulled to noise that the seed decides."""
        options = self.options
        grid, goal = job.grid.truncate(options.strength), job.noise(1)[0]
        if options.form != "ode":
            states = scatter(job, grid, goal, options.gamma)
            noise = job.noise(grid.steps)
            return job.pack(self.name, options, grid, states, noise=noise)
        asked = job.negative if options.prompt == "null" else job.condition
        climb = Climb(goal, options.gamma)
        work = replace(job, condition=asked, controls=[*job.controls, climb])
        states = work.climb(euler(), grid, 1.0, told=options.inversion_embedded)
        return job.pack(self.name, options, grid, states)

    def replay(self, inversion: Inversion) -> Replay:
        """Walk down with the pull."""
        return Replay(euler(), inversion.end(), Pull(inversion, self.options))


def euler() -> Solver:
    """Euler's rule on the flow."""
    solver: Solver = get("solver", "ddim").make()
    return solver


def steered(denoise: Asked, rule: Callable[[Tensor, Tensor, float], Tensor]) -> Wrapped:
    """A denoiser whose flow velocity is rewritten: `rule(velocity, y, u)` in flow coordinates."""
    path = denoise.model.path

    def rewrite(prediction: Prediction, x: Tensor, t: float) -> Prediction:
        velocity = rule(prediction.velocity, enter(path, x, t), clock(path, t))
        return predict("velocity", velocity, x, *levels(path, t, x))

    return Wrapped(denoise, rewrite)


class Climb(Control):
    """On the way up the velocity is pulled to that of a straight line to `goal`."""

    def __init__(self, goal: Tensor, gamma: float):
        self.goal, self.gamma = goal, gamma

    def denoiser(self, step: Step, denoise: Asked, layout: Layout) -> Asked:
        """The pulled one."""
        if self.gamma == 0:
            return denoise
        return steered(denoise, lambda v, y, u: v + self.gamma * ((self.goal - y) / (1 - u) - v))


def scatter(job: Job, grid: Grid, goal: Tensor, gamma: float) -> dict[str, Tensor]:
    """All N+1 states of the stochastic way up, clean first."""
    path, y = job.model.path, enter(job.model.path, job.latents, grid.times[0])
    states = [State(job.latents)]
    for step, z in zip(grid.walk(down=False), job.noise(grid.steps), strict=True):
        a, b = clock(path, step.t), clock(path, step.s)
        kept = (1 - b) / (1 - a)
        spread = math.sqrt((1 - gamma) * (b**2 - (a * kept) ** 2))
        y = kept * y + gamma * (b - a) / (1 - a) * goal + spread * z
        states.append(State(leave(path, y, step.s)))
    return stack(states)


class Pull(Control):
    """On the way down every branch is pulled to the picture.

    Args:
        inversion: whose first state is the picture; it holds the noise of the stochastic forms.
        options: of RF-Inversion.
    """

    def __init__(self, inversion: Inversion, options: RFInversionOptions):
        assert inversion.model is not None
        self.options, self.path = options, inversion.model.path
        self.end = clock(self.path, inversion.grid.times[0])
        self.data = enter(self.path, inversion.latents, inversion.grid.times[0])
        self.noise = inversion.extras.get("noise")

    def acts(self, step: Step) -> bool:
        """Whether this step is anything but the plain ODE's."""
        return self._spread(step) > 0 or self.options.pull(step.position, step.count) > 0

    def guide(self, v: Tensor, gap: Tensor, length: float, step: Step, layout: Layout) -> Tensor:
        """Velocity `v` before the pull; the picture lies back by `gap`, in `length` of time."""
        return v

    def denoiser(self, step: Step, denoise: Asked, layout: Layout) -> Asked:
        """The pulled one."""
        if not self.acts(step):
            return denoise
        spread, eta = self._spread(step), self.options.pull(step.position, step.count)

        def rule(v: Tensor, y: Tensor, u: float) -> Tensor:
            gap = y - tiled(self.data, layout).to(y)
            v = self.guide(v, gap, u - self.end, step, layout)
            pulled = v + eta * (gap / (u - self.end) - v)
            if spread == 0:
                return pulled
            if self.options.form == "sde":
                return pulled + (1 - eta) * (v + y / (1 - u))
            return 2 * pulled + y / (1 - u)

        return steered(denoise, rule)

    def after_step(self, step: Step, state: State, before: State, layout: Layout) -> State:
        """Add the noise of a stochastic form."""
        spread = self._spread(step)
        if spread == 0 or self.noise is None:
            return state
        noise = tiled(self.noise[step.index], layout).to(state.x)
        return state.with_x(state.x + leave(self.path, spread * noise, step.s))

    def _spread(self, step: Step) -> float:
        """Standard deviation of the noise of a step, in flow coordinates."""
        if self.options.form == "ode" or step.position == 0 or step.index == 0:
            return 0.0
        u, s = clock(self.path, step.t), clock(self.path, step.s)
        eta = self.options.pull(step.position, step.count)
        share = 1 - eta if self.options.form == "sde" else 1.0
        return math.sqrt(2 * share * u / (1 - u) * (u - s))


def tiled(rows: Tensor, layout: Layout) -> Tensor:
    """B rows, once for each branch."""
    return copies(rows, len(layout.names))
