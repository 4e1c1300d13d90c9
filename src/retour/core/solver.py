"""The protocol of a solver: one step `t -> s`, the same object in both directions.

Solvers live in `retour.solvers`, register themselves with `task="solver"` and declare ``order``,
``nfe_per_step``, ``exact`` (inverting and generating are inverse maps) and ``stochastic``; the
tests assert the declaration of every registered solver.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from .grid import Step
from .path import Path, Prediction
from .state import State


class Denoise(Protocol):
    """A (guided) denoiser: stacked latents and a path time -> prediction."""

    def __call__(self, x: Tensor, t: float) -> Prediction:
        """Prediction at `(x, t)`, same leading rows as `x`."""


class Solver(Protocol):
    """One integrator. It holds options only; everything it remembers lives in the state."""

    def start(self, x: Tensor) -> State:
        """Make the initial state from latents (R, C, h, w)."""

    def step(self, denoise: Denoise, state: State, step: Step, path: Path) -> State:
        """Cross one interval in the direction that `step` says."""


class Plain:
    """Mixin for solvers without a start of their own."""

    def start(self, x: Tensor) -> State:
        """Latents alone."""
        return State(x)


def kind_of(denoise: Denoise) -> str:
    """What the network behind it predicts; a :class:`~.branches.Denoiser` says so, else eps."""
    return str(getattr(denoise, "kind", "eps"))
