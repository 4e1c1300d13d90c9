"""What a solver's registration claims, as assertions that run on any model.

Each takes a registry entry and a model (analytic or embedded); `tests/solvers` runs them over the
whole registry on exactly solvable models.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy
import torch
from torch import Tensor

from retour.core.branches import Branch, Denoiser, Layout
from retour.core.control import Control
from retour.core.grid import Grid, Step
from retour.core.loop import walk
from retour.core.model import Model
from retour.core.registry import Entry
from retour.core.state import State
from retour.solvers.implicit import ConvergenceWarning


def denoiser(
    model: Model, images: int, prompt: str = "", scale: float = 1.0, negative: str = ""
) -> Denoiser:
    """Denoiser of one branch, all images with the same prompt."""
    cond, uncond = model.embed([prompt] * images), model.embed([negative] * images)
    return Denoiser(model, [Branch("source", cond, uncond, scale)])


def relative(found: Tensor, wanted: Tensor) -> float:
    """Largest difference over largest value; NaN stays NaN, and so fails every bound."""
    return float((found - wanted).abs().max() / wanted.abs().max())


def error(found: Tensor, wanted: Tensor) -> float:
    """Root mean square difference over root mean square value."""
    return float((found - wanted).square().mean().sqrt() / wanted.square().mean().sqrt())


def slope(steps: Sequence[int], errors: Sequence[float]) -> float:
    """Fitted order: minus the slope of log error against log steps."""
    return -float(numpy.polyfit(numpy.log(steps), numpy.log(errors), 1)[0])


def go(solver: Any, denoise: Denoiser, start: Tensor | State, grid: Grid, *, down: bool) -> State:
    """Walk a grid from latents (or a state)."""
    state = start if isinstance(start, State) else solver.start(start)
    return walk(solver, denoise, state, grid, down=down)


def round_trip(solver: Any, denoise: Denoiser, x: Tensor, grid: Grid) -> float:
    """Relative error of data -> noise -> data."""
    top = go(solver, denoise, x, grid, down=False)
    return relative(go(solver, denoise, top, grid, down=True).x, x)


def assert_exact(
    entry: Entry,
    model: Model,
    x: Tensor,
    grid: Grid,
    *,
    prompt: str = "",
    scale: float = 1.0,
    tolerance: float = 1e-12,
    options: Mapping[str, Any] | None = None,
) -> None:
    """The round trip returns the data up to rounding.

    A solver that iterates is held to what it declares (`exact_to`), or to saying that it failed.
    Under high guidance the sampler magnifies what iterations leave: `tight` options leave less.
    """
    tolerance = max(tolerance, entry.facts.get("exact_to", 0.0))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        denoise = denoiser(model, len(x), prompt, scale)
        found = round_trip(entry.make(**(options or {})), denoise, x.double(), grid)
    if not any(issubclass(warning.category, ConvergenceWarning) for warning in said):
        assert found <= tolerance, f"{entry.name}: round trip {found:.1e}, {grid.steps} steps"


def measured_order(
    solver: Any,
    model: Model,
    start: Tensor,
    goal: Tensor,
    grids: Callable[[int], Grid],
    steps: Sequence[int],
    *,
    down: bool,
) -> float:
    """Order fitted to the errors of walks with the given step counts."""
    denoise = denoiser(model, len(start))
    errors = [error(go(solver, denoise, start, grids(n), down=down).x, goal) for n in steps]
    return slope(steps, errors)


def assert_cost(entry: Entry, model: Model, x: Tensor, grid: Grid) -> None:
    """A walk costs what was declared, per image, in both directions."""
    per_step, extra = entry.facts["nfe_per_step"], entry.facts.get("nfe_extra", 0)
    for down in (False, True):
        denoise = denoiser(model, len(x))
        go(entry.make(), denoise, x, grid, down=down)
        each = per_step if down else entry.facts.get("inversion_nfe_per_step", per_step)
        least, most = each if isinstance(each, tuple) else (each, each)
        found = denoise.ledger.nfe(len(x)) - extra
        assert least * grid.steps <= found <= most * grid.steps, entry.name


def assert_deterministic(entry: Entry, model: Model, x: Tensor, grid: Grid) -> None:
    """Two walks are bit-equal, whatever the global generator does between them.

    Those of stochastic solvers too: they draw nothing, noise is given to them.
    """
    for down in (False, True):
        first = go(entry.make(), denoiser(model, len(x)), x, grid, down=down)
        torch.randn(3)
        second = go(entry.make(), denoiser(model, len(x)), x, grid, down=down)
        assert torch.equal(first.x, second.x), entry.name


def assert_noise_is_used(entry: Entry, model: Model, x: Tensor, grid: Grid) -> None:
    """A stochastic solver adds a multiple of the given noise, once; others have no use for it."""
    solver, noise = entry.make(), torch.roll(x, 1, 0)
    for down in (False, True):
        # A second step, so that multistep rules are past their start.
        first, second, *_ = grid.walk(down=down)
        denoise = denoiser(model, len(x))
        state = solver.step(denoise, solver.start(x), first, model.path)
        noisy = State(state.x, {**state.memory, "noise": noise})
        plain = solver.step(denoise, state, second, model.path)
        found = solver.step(denoise, noisy, second, model.path)
        if not entry.stochastic:
            assert torch.equal(found.x, plain.x), entry.name
            continue
        std = solver.std(model.path, second)
        assert std > 0 and relative(found.x, plain.x + std * noise) <= 1e-12, entry.name
        assert "noise" not in found.memory, entry.name


class Given(Control):
    """Gives a stochastic solver unit noises, one for each step, noisiest first."""

    def __init__(self, noises: Sequence[Tensor]):
        self.noises = noises

    def before_step(self, step: Step, state: State, layout: Layout) -> State:
        """The step's noise."""
        return State(state.x, {**state.memory, "noise": self.noises[step.position]})


class Impulses(Control):
    """Gives row 2 + k, and no other, unit noise in step k."""

    def before_step(self, step: Step, state: State, layout: Layout) -> State:
        """The step's noise."""
        noise = torch.zeros_like(state.x)
        noise[2 + step.position] = 1
        return State(state.x, {**state.memory, "noise": noise})


def spread_error(solver: Any, model: Model, grid: Grid, mean: float, width: float) -> float:
    """Relative error of the standard deviation with which samples of N(mean, width^2) arrive.

    Everything is linear there: the variance is the sum of squared answers to one impulse in the
    start and one in each step's noise.
    """
    (low, high), path = (grid.times[0], grid.times[-1]), model.path

    def deviation(t: float) -> float:
        return float((path.alpha(t) ** 2 * width**2 + path.sigma(t) ** 2).sqrt())

    start = path.alpha(high) * mean + torch.zeros(grid.steps + 2, 1, 1, 1, dtype=torch.float64)
    start[1] += deviation(high)
    denoise = denoiser(model, len(start))
    end = walk(solver, denoise, solver.start(start), grid, down=True, controls=[Impulses()]).x
    found = float((end[1:] - end[0]).square().sum().sqrt())
    return abs(found / deviation(low) - 1)


def assert_batch_is_loop(
    entry: Entry, model: Model, x: Tensor, grid: Grid, tolerance: float = 1e-12
) -> None:
    """A batch does what its items do alone."""
    for down in (False, True):
        together = go(entry.make(), denoiser(model, len(x)), x, grid, down=down).x
        alone = [
            go(entry.make(), denoiser(model, 1), x[i : i + 1], grid, down=down).x
            for i in range(len(x))
        ]
        assert relative(torch.cat(alone), together) <= tolerance, entry.name


def assert_dtype_kept(entry: Entry, model: Model, x: Tensor, grid: Grid) -> None:
    """The state keeps the dtype it was given, memory included."""
    for dtype in (torch.float32, torch.float64):
        for down in (False, True):
            end = go(entry.make(), denoiser(model, len(x)), x.to(dtype), grid, down=down)
            assert {v.dtype for v in (end.x, *end.memory.values())} == {dtype}, entry.name


def assert_memory_has_rows(entry: Entry, model: Model, x: Tensor, grid: Grid) -> None:
    """Every memory is aligned with the latents' rows, so that states can be tiled and picked."""
    end = go(entry.make(), denoiser(model, len(x)), x, grid, down=False)
    assert all(len(v) == len(x) and v.ndim == x.ndim for v in end.memory.values()), entry.name
    assert len(end.tile(3).x) == 3 * len(x)
