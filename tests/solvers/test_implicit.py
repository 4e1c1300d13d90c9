"""The implicit step: its equation, its iterations, and what it says where they fail."""

import warnings

import pytest
import torch

import declarations as claims
from problems import PATHS, ProblemModel, mixture, points
from retour.core.branches import Branch, Denoiser, Wrapped
from retour.core.grid import Grid, flow_grid, lambda_grid
from retour.core.path import Prediction, levels, predict
from retour.core.registry import get
from retour.core.state import State
from retour.errors import RetourError
from retour.solvers.implicit import ConvergenceWarning, Equation, FixedPointOptions, solve

TIGHT = {"tolerance": 1e-14, "iterations": 100}
CASES = [
    ("vp", "eps"),
    ("vp", "v"),
    ("discrete", "eps"),
    ("discrete", "x0"),
    ("flow", "velocity"),
    ("flow", "eps"),
    ("ve", "score"),
]


def grid(path, steps):
    if path == "flow":
        return flow_grid(steps).truncate(0.9)
    ends = {"ve": (0.01, 80.0), "discrete": (0.0, 999.0), "vp": (1e-3, 1.0)}[path]
    return lambda_grid(PATHS[path], steps, *ends)


def fixed_point(**options):
    return get("solver", "fixed-point").make(**options)


def problem(path, kind):
    return ProblemModel(mixture(), PATHS[path], kind)


def equation(path, kind, scale=1.0, index=4, x=None):
    model = problem(path, kind)
    step = list(grid(path, 10).walk(down=False))[index]
    x = points() if x is None else x
    return Equation(claims.denoiser(model, len(x), "red", scale), x, step, model.path)


@pytest.mark.parametrize(("path", "kind"), CASES)
@pytest.mark.parametrize("acceleration", ["anderson", "none"])
def test_each_step_is_the_sampler_s_inverse(path, kind, acceleration):
    model, solver = problem(path, kind), fixed_point(acceleration=acceleration, **TIGHT)
    denoise, state = claims.denoiser(model, 4, "red"), State(points())
    for step in grid(path, 10).walk(down=False):
        above = solver.step(denoise, state, step, model.path)
        [back] = [s for s in grid(path, 10).walk(down=True) if s.index == step.index]
        below = solver.step(denoise, above, back, model.path)
        assert claims.relative(below.x, state.x) < 1e-12
        state = above


def test_the_map_is_the_papers_for_noise_networks():
    found = equation("discrete", "eps")
    y = points(seed=1)
    e = found.denoise(y, found.step.noisy).eps
    (alpha_t, sigma_t), (alpha_s, sigma_s) = (
        levels(found.path, t, y) for t in (found.step.clean, found.step.noisy)
    )
    mapped = alpha_s / alpha_t * found.x + (sigma_s - alpha_s / alpha_t * sigma_t) * e
    assert claims.relative(y + found.gap(y, range(4)), mapped) < 1e-14


def test_the_map_is_implicit_euler_on_flows():
    found = equation("flow", "velocity")
    y, step = points(seed=1), found.step
    mapped = found.x + (step.s - step.t) * found.denoise(y, step.s).velocity
    assert claims.relative(y + found.gap(y, range(4)), mapped) < 1e-14


def test_the_last_flow_step_reaches_pure_noise():
    model, solver = problem("flow", "velocity"), fixed_point(**TIGHT)
    end = claims.round_trip(solver, claims.denoiser(model, 4, "red", 2.0), points(), flow_grid(5))
    assert end < 1e-11


@pytest.mark.parametrize(("path", "kind"), CASES)
def test_without_updates_it_is_ddim_inversion(path, kind):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        found = walk(path, kind, fixed_point(iterations=0))
    assert torch.equal(found.x, walk(path, kind, get("solver", "ddim").make(query="noisy")).x)


def walk(path, kind, solver, scale=1.0, x=None, steps=10):
    x = points() if x is None else x
    denoise = claims.denoiser(problem(path, kind), len(x), "red", scale)
    return claims.go(solver, denoise, x, grid(path, steps), down=False)


def linear(slope):
    """A noise network `E = slope y`, so that the map F has one rate of contraction."""
    path = PATHS["vp"]
    [step] = Grid((0.3, 0.6)).walk(down=False)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = (
        levels(path, t, points()) for t in (step.clean, step.noisy)
    )
    per_rate = float(1 / (sigma_s - alpha_s / alpha_t * sigma_t))

    def denoise(y, t):
        return predict("eps", slope * per_rate * y, y, *levels(path, t, y))

    return Equation(denoise, points(), step, path)


@pytest.mark.parametrize("rate", [-0.9, -0.5, 0.5, 0.9])
def test_plain_iteration_contracts_at_its_rate(rate):
    errors = [
        solve(linear(rate), points(), FixedPointOptions(iterations=n, acceleration="none"))[1]
        for n in (5, 6)
    ]
    torch.testing.assert_close(errors[1] / errors[0], torch.full((4,), abs(rate)).double())


@pytest.mark.parametrize("rate", [-1.2, -3.0, -12.0])
def test_plain_iteration_that_diverges_is_damped(rate):
    options = FixedPointOptions(acceleration="none", iterations=200)
    found, error = solve(linear(rate), points(), options)
    assert (error <= options.tolerance).all()
    exact = linear(rate)
    assert claims.relative(found, exact.gain * exact.x / (1 - rate)) < 1e-5


def test_anderson_finds_what_repels_in_every_direction():
    """Damping cannot: a rate of 3 repels at any mixing."""
    plain = solve(linear(3.0), points(), FixedPointOptions(acceleration="none"))[1]
    found, error = solve(linear(3.0), points(), FixedPointOptions())
    exact = linear(3.0)
    assert (plain > 1e-2).all() and (error <= 1e-6).all()
    assert claims.relative(found, exact.gain * exact.x / -2) < 1e-5


def test_guidance_repels_and_anderson_still_arrives():
    """At guidance 7.5 plain iteration does not contract on this step."""
    hard = equation("vp", "eps", 7.5, 6)
    y = hard.start()
    for _ in range(8):
        y = y + hard.gap(y, range(4))
    plain = hard.residual(hard.gap(y, range(4)), range(4))
    found, error = solve(hard, hard.start(), FixedPointOptions())
    assert plain.max() > 1e-2 and error.max() <= 1e-6
    assert torch.equal(hard.residual(hard.gap(found, range(4)), range(4)), error)


def test_the_residual_is_that_of_the_latents_returned():
    found = equation("vp", "eps", 7.5)
    for n in (0, 1, 2, 5):
        y, error = solve(found, found.start(), FixedPointOptions(iterations=n))
        assert torch.equal(found.residual(found.gap(y, range(4)), range(4)), error)


def test_more_updates_never_end_farther_away():
    found = equation("vp", "eps", 7.5, 8)
    errors = torch.stack(
        [solve(found, found.start(), FixedPointOptions(iterations=n))[1] for n in range(12)]
    )
    assert (errors.diff(dim=0) <= 0).all() and (errors[-1] < errors[0]).all()


def test_a_tighter_tolerance_costs_more_and_leaves_less():
    model, costs, errors = problem("vp", "eps"), [], []
    for tolerance in (1e-2, 1e-5, 1e-8):
        denoise = claims.denoiser(model, 4, "red", 3.0)
        solver = fixed_point(tolerance=tolerance)
        errors.append(claims.round_trip(solver, denoise, points(), grid("vp", 20)))
        costs.append(denoise.ledger.nfe(4))
    assert costs == sorted(costs) and errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-6 < errors[0]


# --- Batches ------------------------------------------------------------------------------------


@pytest.mark.parametrize("acceleration", ["anderson", "none"])
def test_a_batch_costs_and_finds_what_its_images_do(acceleration):
    """Easy and hard images together: those that are done leave the network calls."""
    model, solver = problem("vp", "eps"), fixed_point(acceleration=acceleration, tolerance=1e-8)
    prompts, ends = ["red", "blue green", ""], []
    x = points(3) * torch.tensor([0.1, 1.0, 3.0]).double().reshape(3, 1, 1, 1)

    def go(which):
        branch = Branch(
            "source",
            model.embed([prompts[i] for i in which]),
            model.embed([""] * len(which)),
            3.0,
        )
        denoise = Denoiser(model, [branch])
        return denoise, claims.go(solver, denoise, x[which], grid("vp", 12), down=False)

    together, end = go([0, 1, 2])
    costs = []
    for i in range(3):
        alone, one = go([i])
        costs.append(alone.ledger.rows)
        ends.append(one.x)
    assert together.ledger.rows == sum(costs) and len(set(costs)) > 1
    assert claims.relative(end.x, torch.cat(ends)) < 1e-11


def test_branches_of_an_image_are_asked_together():
    model = problem("vp", "eps")
    branches = [Branch(name, model.embed([name] * 2)) for name in ("red", "blue")]
    both = Denoiser(model, branches)
    x, solver = points(4), fixed_point(tolerance=1e-12)
    end = claims.go(solver, both, x, grid("vp", 6), down=False).x
    for branch in branches:
        alone = claims.go(
            solver,
            Denoiser(model, [branch]),
            x[both.layout[branch.name]],
            grid("vp", 6),
            down=False,
        ).x
        assert claims.relative(end[both.layout[branch.name]], alone) < 1e-10


def test_a_wrapped_denoiser_reads_the_whole_state():
    seen = []

    def rule(prediction, x, t):
        seen.append(len(x))
        return prediction

    model, [step] = problem("vp", "eps"), Grid((0.2, 0.5)).walk(down=False)
    x = points(3) * torch.tensor([0.01, 1.0, 3.0]).double().reshape(3, 1, 1, 1)
    bare = claims.denoiser(model, 3, "red", 3.0)
    state = fixed_point().step(Wrapped(bare, rule), State(x), step, model.path)
    assert set(seen) == {3}
    plain = fixed_point().step(claims.denoiser(model, 3, "red", 3.0), State(x), step, model.path)
    assert claims.relative(state.x, plain.x) < 1e-12


# --- Failure ------------------------------------------------------------------------------------


def test_steps_without_a_solution_are_said_once():
    with pytest.warns(ConvergenceWarning) as said:
        end = walk("vp", "eps", fixed_point(), 7.5, steps=3)
    assert len(said) == 1 and "\n" not in str(said[0].message)
    assert "use more steps" in str(said[0].message)
    assert end.memory["worst"].shape == (4, 1, 1, 1)
    assert end.memory["worst"].max() > 1e-6


def test_convergence_is_silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        end = walk("vp", "eps", fixed_point(), 3.0, steps=20)
    assert end.memory["worst"].max() <= 1e-6


def test_a_network_that_overflows_leaves_the_best_iterate():
    def denoise(y, t):
        noise = torch.where(y.abs() > 4, torch.nan, -9 * y)
        return Prediction((y - noise) / 2, noise)

    [step] = Grid((0.3, 0.6)).walk(down=False)
    found = Equation(denoise, points(), step, PATHS["vp"])
    for acceleration in ("anderson", "none"):
        options = FixedPointOptions(acceleration=acceleration)
        y, error = solve(found, points(), options)
        assert torch.isfinite(y).all() and torch.isfinite(error).all()


@pytest.mark.parametrize("rounding", [torch.bfloat16, torch.float16])
def test_a_half_precision_network_ends_at_its_own_rounding(rounding):
    model = ProblemModel(mixture(), PATHS["vp"], "eps", rounding=rounding)
    denoise = claims.denoiser(model, 4, "red", 3.0)
    with pytest.warns(ConvergenceWarning):
        end = claims.go(fixed_point(), denoise, points(), grid("vp", 20), down=False)
    assert end.memory["worst"].max() < 8 * torch.finfo(rounding).eps


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"iterations": -1}, "iterations is -1"),
        ({"tolerance": -1e-3}, "tolerance is -0.001"),
        ({"history": 0}, "history is 0"),
        ({"mixing": 0.0}, "mixing must be above 0 and at most 1, got 0.0"),
        ({"acceleration": "newton"}, "newton"),
    ],
)
def test_bad_options_are_refused(options, says):
    with pytest.raises(RetourError, match=says):
        fixed_point(**options)
