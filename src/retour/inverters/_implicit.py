r"""Inversion by search: each step's latents are optimised until they solve its equation.

Shared by SPDInv and DCI. From DDIM inversion :math:`z^{(0)}`, with :math:`F` the fixed-point map of
the step (:mod:`retour.solvers.implicit`), AdamW makes up to K steps on

.. math:: L(z) = \tfrac1{Chw}\,\lVert z - F(z)\rVert_2^2,

with its gradient through both places where z stands. A step is made before its loss is compared
with the threshold, as in the published code. Each image has its own loss, its own AdamW and its own
stop, and leaves the batch of the network calls there. Gradients are those of the sum, divided
afterwards: the mean's are too small for half precision.

The equation can be iterated as well (``picard``, ``anderson``), with the same K and threshold.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ..core.branches import Layout
from ..core.control import Control
from ..core.grid import Step
from ..core.path import Path
from ..core.rows import along, rms
from ..core.solver import Denoise, Plain, Solver
from ..core.state import Inversion, State
from ..errors import check_finite, check_range
from ..solvers.ddim import DDIM, DDIMOptions
from ..solvers.implicit import Correct, Equation, FixedPointOptions, solve
from .base import ClimbOptions, Job, Replay
from .negative_prompt import NegativePromptInversion, NegativePromptOptions


@dataclass(frozen=True)
class SearchOptions(ClimbOptions):
    """Options of inversion by search.

    Attributes:
        rounds: K, most steps of the search in an interval; 0 is DDIM inversion.
        threshold: mean squared gap at which an image is done with an interval.
        lr: AdamW's learning rate, about the most that a latent value moves in one step.
        weight_decay: AdamW's.
        search: how the equation is solved: by AdamW, by plain iteration, or by an accelerated one.
        interpolation: on the way back, the negative prompt: from the source prompt (0) to the null
            prompt (1).
    """

    rounds: int = 25
    threshold: float = 5e-6
    lr: float = 1e-3
    weight_decay: float = 0.01
    search: Literal["adamw", "picard", "anderson"] = "adamw"
    interpolation: float = 0.0

    def __post_init__(self) -> None:
        for name in ("rounds", "threshold", "lr", "weight_decay"):
            check_range(name, getattr(self, name), 0)
        check_range("interpolation", self.interpolation, 0, 1)


class Search(Plain):
    """The searched step upwards, DDIM downwards; memory: `loss`, of the last latents measured.

    Args:
        options: how to search.
        correct: rewrites predictions, as in :class:`~retour.solvers.implicit.Equation`.
    """

    def __init__(self, options: SearchOptions, correct: Correct | None = None):
        self.options, self.correct = options, correct

    def step(self, denoise: Denoise, state: State, step: Step, path: Path) -> State:
        """Cross one interval."""
        if step.down:
            return DDIM(DDIMOptions()).step(denoise, State(state.x), step, path)
        equation = Equation(denoise, state.x, step, path, self.correct)
        x, loss = self._find(equation, equation.start())
        return State(x, {"loss": along(loss, x)})

    def _find(self, equation: Equation, y: Tensor) -> tuple[Tensor, Tensor]:
        options = self.options
        if options.search == "adamw" or options.rounds == 0:
            return descend(equation, y, options)
        accelerated = FixedPointOptions(
            iterations=options.rounds,
            tolerance=options.threshold**0.5,
            acceleration="anderson" if options.search == "anderson" else "none",
        )
        x, error = solve(equation, y, accelerated, spread)
        return x, error**2


def spread(equation: Equation, gap: Tensor, images: object) -> Tensor:
    """Root mean square gap of each row."""
    return rms(gap)


def descend(equation: Equation, y: Tensor, options: SearchOptions) -> tuple[Tensor, Tensor]:
    """AdamW from `y` (R, C, h, w); returns where it ends, and each row's last loss (R,)."""
    leaves = [row.clone().requires_grad_() for row in y.split(1)]
    adam = torch.optim.AdamW(leaves, lr=options.lr, weight_decay=options.weight_decay)
    loss, size = y.new_full((len(y),), torch.nan), y[0].numel()
    images = list(range(equation.images))
    for _ in range(options.rounds):
        rows = equation.rows(images)
        active = [leaves[row] for row in rows]
        with torch.enable_grad():
            total = equation.gap(torch.cat(leaves), images).square().flatten(1).sum(1)
            gradients = torch.autograd.grad(total.sum(), active)
        check_finite(total.detach(), "the losses", "use more steps or a smaller lr")
        for leaf in leaves:
            leaf.grad = None  # AdamW passes over an image that is done.
        for leaf, gradient in zip(active, gradients, strict=True):
            leaf.grad = gradient / size
        adam.step()
        loss[rows] = total.detach() / size
        going = (loss >= options.threshold).unflatten(0, (-1, equation.images)).any(0)
        images = [i for i in images if going[i]]
        if not images:
            break
    return torch.cat(leaves).detach(), loss


class Recorder(Control):
    """Keeps a row-wise memory of the solver, step by step."""

    def __init__(self, name: str):
        self.name, self.found = name, list[Tensor]()

    def after_step(self, step: Step, state: State, before: State, layout: Layout) -> State:
        """Write it down."""
        self.found.append(state.memory[self.name].flatten())
        return state

    def table(self) -> Tensor:
        """(N, B)."""
        return torch.stack(self.found)


def climb(
    job: Job, name: str, options: Any, solver: Solver, scale: float, memory: str
) -> Inversion:
    """Walk up with `solver`; its `memory` goes with the inversion, (N, B), its worst on record."""
    recorder = Recorder(memory)
    watched = replace(job, controls=[*job.controls, recorder])
    grid = job.grid.truncate(options.strength)
    states = watched.climb(solver, grid, scale, told=options.inversion_embedded)
    table = recorder.table()
    inversion = job.pack(name, options, grid, states, **{memory: table})
    worst = float(table.max())
    inversion.record[f"worst_{memory}"] = worst if math.isfinite(worst) else None
    return inversion


def replay(inversion: Inversion, options: SearchOptions) -> Replay:
    """Walk down as negative-prompt inversion: the source branch takes the way of guidance 1."""
    negative = NegativePromptOptions(interpolation=options.interpolation)
    return NegativePromptInversion(negative).replay(inversion)
