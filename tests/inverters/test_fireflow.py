"""FireFlow as an inverter: cost, round trip, and the grid that its error estimate finds."""

import pytest
import torch

from declarations import error, slope
from problems import PATHS, ProblemModel, gaussian, mixture, mixture_pair
from retour.core.branches import Branch, Denoiser
from retour.core.grid import flow_grid
from retour.core.loop import walk
from retour.core.registry import get
from retour.core.state import State
from retour.errors import RetourError
from retour.inverters.base import Job

CLEAN, NOISY = mixture_pair("flow", 0.0, 1.0)


def invert(name="fireflow", steps=32, path="flow", data=CLEAN, **options):
    model = ProblemModel(mixture(), PATHS[path], "velocity")
    count = len(data)
    empty = model.embed([""] * count)
    work = Job(
        model, data, empty, empty, flow_grid(steps) if path == "flow" else model.grid(steps), 1.0,
        torch.Generator().manual_seed(0),
    )  # fmt: skip
    return get("invert", name).make(**options).invert(work), work


def returned(inversion):
    model = inversion.model
    replay = get("invert", inversion.method).make(**inversion.options).replay(inversion)
    denoise = Denoiser(model, [Branch("source", inversion.condition)])
    end = walk(replay.solver, denoise, replay.state, inversion.grid, down=True)
    return end.x, denoise.ledger.nfe(inversion.images)


def test_one_evaluation_a_step_each_way_and_one_more():
    inversion, work = invert(steps=20)
    assert work.ledger.nfe(len(CLEAN)) == 21
    assert returned(inversion)[1] == 21
    assert set(inversion.states) == {"x"}


def test_inversion_is_second_order_and_the_round_trip_third():
    steps = (16, 32, 64, 128)
    runs = [invert(steps=n)[0] for n in steps]
    assert abs(slope(steps, [error(r.noise, NOISY) for r in runs]) - 2) < 0.2
    assert abs(slope(steps, [error(returned(r)[0], CLEAN) for r in runs]) - 3) < 0.3


def test_equal_error_costs_less_than_with_rf_solver():
    """At 33 evaluations against 32: the reuse is worth half of the budget."""
    fire, work = invert(steps=32)
    solver, other = invert("rf-solver", steps=16)
    assert work.ledger.nfe(4) == other.ledger.nfe(4) + 1
    assert error(fire.noise, NOISY) < error(solver.noise, NOISY)
    euler, _ = invert("euler", steps=32)
    assert error(fire.noise, NOISY) < error(euler.noise, NOISY) / 10


@pytest.mark.parametrize("path", ["flow", "vp", "discrete"])
def test_the_estimate_finds_a_grid_for_the_tolerance(path):
    """A finer tolerance takes more steps and ends nearer; steps of the first order's error."""
    data = CLEAN if path == "flow" else 0.4 * CLEAN
    model = ProblemModel(mixture(), PATHS[path], "velocity")
    span = model.grid(32)
    if path == "discrete":  # Its grids end at different times.
        goal, _ = invert("heun", steps=32, path=path, data=data)
    else:
        goal, _ = invert("heun", steps=200, path=path, data=data)
    found = [invert(path=path, data=data, tolerance=t) for t in (0.08, 0.02, 0.005)]
    counts = [inversion.grid.steps for inversion, _ in found]
    errors = [error(inversion.noise, goal.noise) for inversion, _ in found]
    assert counts == sorted(set(counts))
    if path != "discrete":  # There linear interpolation between levels is not smooth.
        assert errors == sorted(errors, reverse=True) and errors[-1] < errors[0] / 4
    for inversion, work in found:
        assert inversion.grid.times[0] == span.times[0]
        assert inversion.grid.times[-1] == span.times[-1]
        assert work.ledger.nfe(4) >= inversion.grid.steps + 1


def test_the_grid_found_is_walked_back_and_equals_a_walk_on_it():
    inversion, _ = invert(tolerance=0.01)
    solver = get("solver", "fireflow").make()
    denoise = Denoiser(inversion.model, [Branch("source", inversion.condition)])
    again = walk(solver, denoise, solver.start(CLEAN), inversion.grid, down=False)
    torch.testing.assert_close(inversion.noise, again.x, rtol=0, atol=1e-12)
    end, cost = returned(inversion)
    assert cost == inversion.grid.steps + 1
    assert error(end, CLEAN) < 5e-3


def test_found_steps_keep_the_tolerance():
    inversion, _ = invert(tolerance=0.01)
    solver = get("solver", "fireflow").make()
    denoise = Denoiser(inversion.model, [Branch("source", inversion.condition)])
    begin = denoise(CLEAN, inversion.grid.times[0]).velocity
    state, twice = State(CLEAN, {"velocity": begin}), 2
    for step in inversion.grid.walk(down=False):
        after = solver.step(denoise, state, step, inversion.model.path)
        change = after.memory["velocity"] - state.memory["velocity"]
        worst = twice * (step.s - step.t) * change.square().mean((1, 2, 3)).sqrt().max()
        assert float(worst) <= 0.01 * (1 + 1e-9)
        state, twice = after, 1


@pytest.mark.parametrize(("part", "accepted"), [(1.5, False), (2.5, True)])
def test_the_first_step_counts_twice(part, accepted):
    """Its carried velocity is that of its start, half a step further away than later ones."""
    grid = flow_grid(32)
    model = ProblemModel(mixture(), PATHS["flow"], "velocity")
    denoise = Denoiser(model, [Branch("source", model.embed([""] * len(CLEAN)))])
    begin = denoise(CLEAN, 0.0).velocity
    first = next(grid.walk(down=False))
    after = (
        get("solver", "fireflow")
        .make()
        .step(denoise, State(CLEAN, {"velocity": begin}), first, model.path)
    )
    change = (after.memory["velocity"] - begin).square().mean((1, 2, 3)).sqrt().max()
    inversion, _ = invert(steps=32, tolerance=part * first.s * float(change))
    assert (inversion.grid.times[1] == first.s) is accepted


def test_the_first_step_is_found_too():
    """However long the step that is tried first; each attempt costs one evaluation."""
    runs = [invert(steps=n, tolerance=0.01) for n in (2, 8, 200)]
    errors = [error(inversion.noise, NOISY) for inversion, _ in runs]
    assert max(errors) < 2 * min(errors)
    (coarse, work), _, (fine, other) = runs
    assert coarse.grid.times[1] < 0.1
    refused = [w.ledger.nfe(4) - i.grid.steps - 1 for i, w in ((coarse, work), (fine, other))]
    assert 1 <= refused[0] <= 5 and 0 <= refused[1] <= 2


def test_an_easy_flow_takes_few_steps():
    """Of a single point the flow is straight: the estimate is nothing, and steps grow fourfold."""
    narrow = type(gaussian())(("thing",), (1.0,), torch.zeros(1, 2, 1, 1).double(), (1e-3,))
    model = ProblemModel(narrow, PATHS["flow"], "velocity")
    empty = model.embed([""])
    data = torch.full((1, 2, 1, 1), 1e-3).double()
    work = Job(model, data, empty, empty, flow_grid(64), 1.0, torch.Generator())
    curved, _ = invert(steps=64, tolerance=0.01)
    straight = get("invert", "fireflow").make(tolerance=0.01).invert(work)
    assert straight.grid.steps < curved.grid.steps


@pytest.mark.parametrize("tolerance", [0, -1.0])
def test_tolerance_is_checked(tolerance):
    with pytest.raises(RetourError, match="tolerance must be above 0"):
        get("invert", "fireflow").make(tolerance=tolerance)
