r"""Uni-Inv: invert with the velocity at the *arriving* level, found by reusing the last one.

The Euler sampler crosses an interval with the velocity at its noisy end. Its exact inverse would
need that velocity at the very point that is sought; Uni-Inv asks there about a prediction made with
the previous step's velocity, once. In flow coordinates (see :mod:`retour.core.path`), upwards from
:math:`a` to :math:`b`, :math:`h = b - a`:

.. math:: p \leftarrow V(y_a + h p,\, b), \qquad y_b = y_a + h p,

that is one fixed-point iteration, warm-started. The network is asked at exactly the levels at
which the way back, plain Euler on the same grid, asks it. First order in either direction, but the
round trip converges at second order.

The first prediction takes :math:`p = V(y_a, a)` at the clean end, one evaluation more;
``zero_start`` takes :math:`p = 0` (both are in the published code), which also suits networks that
predict clean data and so cannot be asked at the clean end.

Cost: N+1 evaluations (N with `zero_start`).

Reference: Jiao et al., "UniEdit-Flow: Unleashing Inversion and Editing in the Era of Flow Models",
2025, arXiv 2504.13109.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..core.grid import Step
from ..core.path import Path
from ..core.registry import Paper, get, register
from ..core.solver import Denoise, Plain, Solver
from ..core.state import Inversion, State
from ..solvers._flow import clock, enter, leave, velocity
from .base import ClimbOptions, Job, Replay

UNIEDIT_PAPER = Paper(
    "UniEdit-Flow: Unleashing Inversion and Editing in the Era of Flow Models",
    "Jiao, Guanlong and Huang, Biqing and Wang, Kuan-Chieh and Liao, Renjie",
    2025,
    "2504.13109",
)


class UniInvStep(Plain):
    """The step upwards; memory: `velocity`, the last step's."""

    def __init__(self, zero_start: bool = False):
        self.zero_start = zero_start

    def step(self, denoise: Denoise, state: State, step: Step, path: Path) -> State:
        """Cross one interval upwards."""
        h = clock(path, step.s) - clock(path, step.t)
        y = enter(path, state.x, step.t)
        v = state.memory.get("velocity")
        if v is None:
            at_start = not self.zero_start
            v = velocity(denoise, path, y, step.t) if at_start else torch.zeros_like(y)
        v = velocity(denoise, path, y + h * v, step.s)
        return State(leave(path, y + h * v, step.s), {"velocity": v})


@dataclass(frozen=True)
class UniInvOptions(ClimbOptions):
    """Options of Uni-Inv.

    Attributes:
        zero_start: predict the first point without asking for a velocity at the clean end.
    """

    zero_start: bool = False


@register(
    "uniinv",
    task="invert",
    summary="velocity of the arriving level, one warm-started fixed-point iteration a step",
    paper=UNIEDIT_PAPER,
    options=UniInvOptions,
    order=1,
    nfe="N+1",
    provides={"trajectory"},
)
class UniInv:
    """Uni-Inv up, Euler down."""

    def __init__(self, options: UniInvOptions):
        self.options = options

    def invert(self, job: Job) -> Inversion:
        """Walk up with the source prompt."""
        grid = job.grid.truncate(self.options.strength)
        solver, options = UniInvStep(self.options.zero_start), self.options
        states = job.climb(
            solver, grid, options.inversion_guidance, told=options.inversion_embedded
        )
        return job.pack("uniinv", options, grid, states)

    def replay(self, inversion: Inversion) -> Replay:
        """Walk down by Euler's rule."""
        euler: Solver = get("solver", "ddim").make()
        return Replay(euler, inversion.end())
