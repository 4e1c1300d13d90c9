"""Every declaration of every registered solver, on models with exact answers."""

import math
import warnings

import pytest
import torch

import declarations as claims
from problems import PATHS, Mixture, ProblemModel, mixture, mixture_pair, points
from retour.core.grid import flow_grid, lambda_grid
from retour.core.registry import entries

SOLVERS = entries("solver")
EXACT = [e for e in SOLVERS if e.exact]
ITERATIVE = [e for e in EXACT if "exact_to" in e.facts]
STOCHASTIC = [e for e in SOLVERS if e.stochastic]
ORDERED = [e for e in SOLVERS if e.order is not None]
STEPS = (24, 48, 96)

# (kind of network, clean end, noisy end): real ends where the grid of uniform lambda has them.
SETTINGS = {
    "flow": ("velocity", 1e-3, 1 - 1e-3),
    "vp": ("eps", 1e-3, 1.0),
    "discrete": ("v", 0.0, 999.0),
}
each = pytest.mark.parametrize("entry", SOLVERS, ids=lambda e: e.name)
everywhere = pytest.mark.parametrize("path", SETTINGS)


def problem(path, **options):
    return ProblemModel(mixture(), PATHS[path], SETTINGS[path][0], **options)


def grid_of(path):
    _, clean, noisy = SETTINGS[path]
    return lambda steps: lambda_grid(PATHS[path], steps, clean, noisy)


def tight(entry):
    return entry.facts.get("tight", {})


def test_the_registry_has_solvers():
    assert {"ddim", "dpm", "midpoint", "heun", "edict"} <= {e.name for e in SOLVERS}


@everywhere
@pytest.mark.parametrize("down", [True, False], ids=["generation", "inversion"])
@pytest.mark.parametrize("entry", ORDERED, ids=lambda e: e.name)
def test_order(entry, path, down):
    order = entry.order if down else entry.facts.get("inversion_order", entry.order)
    if order is None:
        pytest.skip("declares no order in inversion")
    clean, noisy = mixture_pair(path, *SETTINGS[path][1:])
    start, goal = (noisy, clean) if down else (clean, noisy)
    found = claims.measured_order(
        entry.make(), problem(path), start, goal, grid_of(path), STEPS, down=down
    )
    assert abs(found - order) < 0.3


@pytest.mark.parametrize("down", [True, False], ids=["generation", "inversion"])
@pytest.mark.parametrize("entry", ORDERED, ids=lambda e: e.name)
def test_order_between_exactly_clean_data_and_pure_noise(entry, down):
    """Uniform flow grids end at infinite lambda: a solver in lambda pays a logarithm."""
    order = entry.order if down else entry.facts.get("inversion_order", entry.order)
    if order is None:
        pytest.skip("declares no order in inversion")
    clean, noisy = mixture_pair("flow", 0.0, 1.0)
    start, goal = (noisy, clean) if down else (clean, noisy)
    found = claims.measured_order(
        entry.make(), problem("flow"), start, goal, flow_grid, STEPS, down=down
    )
    # Near lambda = infinity uniform flow steps are ln((k+1)/k) long: errors sum to ln(N) / N^2.
    clock = claims.slope(STEPS, [math.log(n) for n in STEPS]) if entry.name == "dpm" else 0
    assert abs(found - order - clock) < 0.3


@pytest.mark.parametrize("path, kind", [("flow", "velocity"), ("discrete", "eps"), ("vp", "v")])
@pytest.mark.parametrize("steps", [1, 2, 49, 50])
@pytest.mark.parametrize("scale", [1.0, 7.5])
@pytest.mark.parametrize("entry", EXACT, ids=lambda e: e.name)
def test_exact(entry, path, kind, steps, scale):
    model, grid = ProblemModel(mixture(), PATHS[path], kind), grid_of(path)(steps)
    claims.assert_exact(
        entry,
        model,
        points(),
        grid,
        prompt="red",
        scale=scale,
        tolerance=1e-12,
        options=tight(entry),
    )


@everywhere
@pytest.mark.parametrize("scale", [1.0, 3.0, 7.5])
@pytest.mark.parametrize("entry", ITERATIVE, ids=lambda e: e.name)
def test_iterations_converge_on_fine_grids(entry, path, scale):
    """Else they could meet the test above by warning every time; by default too, up to 3."""
    options = tight(entry) if scale > 3 else {}
    grid = grid_of(path)(50)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        start = entry.make(**options)
        claims.go(
            start, claims.denoiser(problem(path), 4, "red", scale), points(), grid, down=False
        )
    claims.assert_exact(
        entry, problem(path), points(), grid, prompt="red", scale=scale, options=options
    )


@pytest.mark.parametrize("path", ["discrete", "vp"])
@pytest.mark.parametrize("steps", [3, 10, 25])
@pytest.mark.parametrize("entry", EXACT, ids=lambda e: e.name)
def test_exact_on_coarse_grids_up_to_the_rounding_of_dividing_by_alpha(entry, path, steps):
    """Noise read as data is magnified by alpha's ratio, in a copy and again through the other."""
    model, scale = ProblemModel(mixture(), PATHS[path], "eps"), 7.5
    grid = grid_of(path)(steps)
    ratio = float(model.path.alpha(grid.times[0]) / model.path.alpha(grid.times[-1]))
    bound = torch.finfo(torch.float64).eps * ratio**2 * scale * 2 * steps
    claims.assert_exact(
        entry,
        model,
        points(),
        grid,
        prompt="red",
        scale=scale,
        tolerance=bound,
        options=tight(entry),
    )


@pytest.mark.parametrize("rounding", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("steps", [49, 50])
@pytest.mark.parametrize("entry", [e for e in EXACT if e not in ITERATIVE], ids=lambda e: e.name)
def test_exact_with_a_half_precision_network(entry, steps, rounding):
    model = ProblemModel(mixture(), PATHS["discrete"], "eps", rounding=rounding)
    claims.assert_exact(entry, model, points(), grid_of("discrete")(steps), prompt="red", scale=7.5)


@pytest.mark.parametrize("entry", EXACT, ids=lambda e: e.name)
def test_exact_between_exactly_clean_data_and_pure_noise(entry):
    claims.assert_exact(entry, problem("flow"), points(), flow_grid(25), prompt="red", scale=3.0)


@pytest.mark.parametrize("entry", [e for e in SOLVERS if not e.exact], ids=lambda e: e.name)
def test_what_is_not_declared_exact_is_not(entry):
    """Else the declaration is too modest, or the test above proves nothing."""
    denoise = claims.denoiser(problem("vp"), 4, "red", 7.5)
    assert claims.round_trip(entry.make(), denoise, points(), grid_of("vp")(20)) > 1e-6


@everywhere
@each
def test_cost(entry, path):
    claims.assert_cost(entry, problem(path), points(), grid_of(path)(5))


@everywhere
@each
def test_deterministic(entry, path):
    claims.assert_deterministic(entry, problem(path), points(), grid_of(path)(4))


@everywhere
@each
def test_noise_is_used_where_declared(entry, path):
    claims.assert_noise_is_used(entry, problem(path), points(), grid_of(path)(6))


@everywhere
@pytest.mark.parametrize("entry", STOCHASTIC, ids=lambda e: e.name)
def test_samples_of_a_gaussian_arrive_as_wide_as_it_is(entry, path):
    data = Mixture(("thing",), (1.0,), torch.full((1, 1, 1, 1), 0.6, dtype=torch.float64), (0.5,))
    model = ProblemModel(data, PATHS[path], SETTINGS[path][0])
    missed = [claims.spread_error(entry.make(), model, grid_of(path)(n), 0.6, 0.5) for n in STEPS]
    assert abs(claims.slope(STEPS, missed) - entry.facts["weak_order"]) < 0.3


@each
def test_batch_is_loop(entry):
    claims.assert_batch_is_loop(entry, problem("vp"), points(), grid_of("vp")(4))


@everywhere
@each
def test_dtype_kept(entry, path):
    claims.assert_dtype_kept(entry, problem(path), points(), grid_of(path)(3))


@each
def test_memory_has_rows(entry):
    claims.assert_memory_has_rows(entry, problem("vp"), points(), grid_of("vp")(3))


@each
def test_holds_options_only(entry):
    """A walk leaves nothing on the solver: two interleaved walks cannot disturb each other."""
    solver = entry.make()
    before = dict(vars(solver))
    claims.go(solver, claims.denoiser(problem("vp"), 4), points(), grid_of("vp")(3), down=True)
    assert vars(solver) == before


@each
def test_finite_at_both_ends(entry):
    denoise = claims.denoiser(problem("flow"), 4)
    for down in (True, False):
        end = claims.go(entry.make(), denoise, points(), flow_grid(6), down=down)
        assert torch.isfinite(end.x).all()
