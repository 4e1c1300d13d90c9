"""BDIA: its formula, its orders, its exactness and its limits."""

import math
import warnings

import pytest
import torch

import declarations as claims
from problems import (
    PATHS,
    Mixture,
    ProblemModel,
    gaussian,
    mixture,
    mixture_pair,
    points,
    reference_flow,
    stable_diffusion_path,
)
from retour.core.grid import Grid, discrete_grid, flow_grid, lambda_grid
from retour.core.path import Prediction, levels, predict
from retour.core.registry import get
from retour.core.state import State
from retour.errors import RetourError
from retour.solvers._exact import AmplificationWarning

VP = PATHS["vp"]
BASES = ("bdia", "bdia-edm", "bdia-dpm")
EPS = torch.finfo(torch.float64).eps


def go(name, denoise, start, grid, *, down, **options):
    return claims.go(get("solver", name).make(**options), denoise, start, grid, down=down)


def vp_grid(steps):
    return lambda_grid(VP, steps, 1e-3, 1.0)


def errors(name, steps, *, down=True, **options):
    """Errors of the mixture's walks on the VP path, between exact ends."""
    clean, noisy = mixture_pair("vp", 1e-3, 1.0)
    start, goal = (noisy, clean) if down else (clean, noisy)
    model = ProblemModel(mixture(), VP, "v")
    return [
        claims.error(
            go(name, claims.denoiser(model, 4), start, vp_grid(n), down=down, **options).x, goal
        )
        for n in steps
    ]


# --- The formula ----------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [1.0, 0.94, 0.5])
def test_it_is_the_papers_recursion(gamma):
    """Both directions, written with alpha-bar: D(i -> j) = a_j x0_i + s_j e_i."""
    path, grid = stable_diffusion_path(), discrete_grid(7, 1000, offset=1)
    model = ProblemModel(mixture(), path, "eps")
    denoise = claims.denoiser(model, 4)

    def landing(z, i, j):
        e = denoise(z, grid.times[i]).eps
        a_i, a_j = (path.alpha(grid.times[k]) ** 2 for k in (i, j))
        return a_j.sqrt() * (z - (1 - a_i).sqrt() * e) / a_i.sqrt() + (1 - a_j).sqrt() * e

    z = {7: points()}
    z[6] = landing(z[7], 7, 6)
    for i in range(6, 0, -1):
        z[i - 1] = gamma * z[i + 1] - gamma * landing(z[i], i, i + 1) + landing(z[i], i, i - 1)
    found = go("bdia", denoise, z[7], grid, down=True, gamma=gamma, input_bits=None).x
    assert claims.relative(found, z[0]) < 1e-13

    z = {0: points()}
    z[1] = landing(z[0], 0, 1)
    for i in range(1, 7):
        z[i + 1] = (z[i - 1] - landing(z[i], i, i - 1)) / gamma + landing(z[i], i, i + 1)
    found = go("bdia", denoise, z[0], grid, down=False, gamma=gamma, input_bits=None).x
    assert claims.relative(found, z[7]) < 1e-11  # divided by gamma and by alpha at each level


@pytest.mark.parametrize("down", [True, False])
@pytest.mark.parametrize("kind", ["eps", "v", "x0"])
def test_without_gamma_it_is_ddim_bit_for_bit(kind, down):
    denoise = claims.denoiser(ProblemModel(mixture(), VP, kind), 4, "red", 7.5)
    x, grid = points(), vp_grid(9)
    found = go("bdia", denoise, x, grid, down=down, gamma=0.0).x
    assert torch.equal(found, go("ddim", denoise, x, grid, down=down).x)


@pytest.mark.parametrize("down", [True, False])
def test_without_gamma_the_others_are_their_bases(down):
    denoise, x = claims.denoiser(ProblemModel(mixture(), VP, "v"), 4), points()
    found = go("bdia-edm", denoise, x, vp_grid(9), down=down, gamma=0.0).x
    assert claims.relative(found, go("heun", denoise, x, vp_grid(9), down=down).x) < 1e-13
    if down:
        found = go("bdia-dpm", denoise, x, vp_grid(9), down=down, gamma=0.0, form="multi").x
        plain = go("dpm", denoise, x, vp_grid(9), down=down, lower_order_final=False).x
        assert claims.relative(found, plain) < 1e-13


def test_the_single_step_base_is_dpm_solver_2s():
    """The paper's own lines: u at the middle of lambda, then the step with its data prediction."""
    denoise, grid = claims.denoiser(ProblemModel(mixture(), VP, "eps"), 4), vp_grid(6)
    x = points()
    for step in grid.walk(down=True):
        lam, lam_s = float(VP.lam(step.t)), float(VP.lam(step.s))
        h, middle = lam_s - lam, float(VP.time((lam + lam_s) / 2))
        a_m, s_m = VP.alpha(middle), VP.sigma(middle)
        first = denoise(x, step.t).x0
        u = s_m / VP.sigma(step.t) * x - a_m * math.expm1(-h / 2) * first
        second = denoise(u, middle).x0
        x = VP.sigma(step.s) / VP.sigma(step.t) * x - VP.alpha(step.s) * math.expm1(-h) * second
    found = go("bdia-dpm", denoise, points(), grid, down=True, gamma=0.0).x
    assert claims.relative(found, x) < 1e-12


def edm_by_hand(denoise, z, times, gamma, backward):
    """EDM's coordinates on the VE path, noisy first; `backward` crosses t_i -> t_{i+1}."""

    def slope(z, t):
        return (z - denoise(z, t).x0) / t

    def heun(z, d, t, s):
        euler = z + (s - t) * d
        return euler if s == 0 else z + (s - t) * (d + slope(euler, s)) / 2

    before, d_before = None, None
    for k, (t, s) in enumerate(zip(times, times[1:], strict=False)):
        d = slope(z, t)
        new = heun(z, d, t, s)
        if before is not None:
            up = times[k - 1]
            crossed = heun(z, d, t, up) if backward == "heun" else z + (up - t) * (d + d_before) / 2
            new = new + gamma * (before - crossed)
        before, d_before, z = z, d, new
    return z


def karras(steps, low, high, rho=7.0):
    ramp = [k / (steps - 1) for k in range(steps)]
    a, b = high ** (1 / rho), low ** (1 / rho)
    return [(a + r * (b - a)) ** rho for r in ramp] + [0.0]


@pytest.mark.parametrize("backward", ["heun", "stored"])
@pytest.mark.parametrize("gamma", [1.0, 0.5])
def test_edm_coordinates_are_edms(gamma, backward):
    path, times = PATHS["ve"], karras(8, 0.02, 10.0)
    denoise = claims.denoiser(ProblemModel(mixture(), path, "x0"), 4)
    options = {"coordinates": "edm", "backward": backward, "input_bits": None}
    z, grid = 10 * points(), Grid(tuple(times[::-1]))
    found = go("bdia-edm", denoise, z, grid, down=True, gamma=gamma, **options).x
    assert claims.relative(found, edm_by_hand(denoise, z, times, gamma, backward)) < 1e-12


def test_crossing_both_ways_beats_heun_where_steps_are_few():
    """A scalar toy of two bumps: sigma from 10 to 0.02 in ten Karras steps."""
    path, times = PATHS["ve"], karras(10, 0.02, 10.0)[:-1]
    means = torch.tensor([1.0, -0.8], dtype=torch.float64).reshape(2, 1, 1, 1)
    data = Mixture(("a", "b"), (0.6, 0.4), means, (0.5, 0.5))
    z, grid = 10 * points(64)[:, :1], Grid(tuple(times[::-1]))
    denoise = claims.denoiser(ProblemModel(data, path, "eps"), 64)
    goal = reference_flow(data, path, z, times[0], times[-1])

    def missed(gamma, backward):
        options = {"coordinates": "edm", "backward": backward, "gamma": gamma}
        return claims.error(go("bdia-edm", denoise, z, grid, down=True, **options).x, goal)

    heun = missed(0.0, "heun")
    assert missed(1.0, "stored") < missed(0.5, "stored") < heun
    assert missed(0.5, "heun") < heun


def test_euler_both_ways_is_second_order_too_and_can_be_undone():
    """The third form on EDM's path: one evaluation a step, in either direction."""
    path, steps = PATHS["ve"], (18, 36, 72)
    denoise = claims.denoiser(ProblemModel(mixture(), path, "x0"), 4)

    def grid(count):
        return Grid(tuple(karras(count, 0.02, 10.0)[:-1][::-1]))

    def by_hand(z, times):
        """z_{i-1} = z_{i+1} - (t_{i+1} - t_i) d_i + (t_{i-1} - t_i) d_i, noisy first."""
        before = None
        for k, (t, s) in enumerate(zip(times, times[1:], strict=False)):
            d = (z - denoise(z, t).x0) / t
            new = z + (s - t) * d
            if before is not None:
                new = before - (times[k - 1] - t) * d + (s - t) * d
            before, z = z, new
        return z

    start, plain = 10 * points(), {"gamma": 1.0, "input_bits": None}
    found = go("bdia", denoise, start, grid(9), down=True, **plain)
    assert claims.relative(found.x, by_hand(start, grid(9).times[::-1])) < 1e-12
    back = go("bdia", denoise, found, grid(9), down=False, **plain)
    assert claims.relative(back.x, start) < 1e-9  # the parasitic mode grows on the way up
    goal = reference_flow(mixture(), path, start, 10.0, 0.02)
    errors = [
        claims.error(go("bdia", denoise, start, grid(n), down=True, **plain).x, goal) for n in steps
    ]
    assert abs(claims.slope(steps, errors) - 2) < 0.3


# --- Orders ---------------------------------------------------------------------------------------


def test_order_one_with_less_than_gamma_one_and_its_error_constant():
    """(1 - gamma) / (1 + gamma) of DDIM's error: a third at one half."""
    steps = (80, 160, 320)
    half, ddim = errors("bdia", steps, gamma=0.5), errors("ddim", steps)
    assert abs(claims.slope(steps, half) - 1) < 0.1
    assert half[-1] / ddim[-1] == pytest.approx(1 / 3, rel=0.05)


def test_error_constant_near_gamma_one():
    # The first-order part is 3 % of DDIM's, so the second-order one still shows at 320 steps.
    [found], [ddim] = errors("bdia", [640], gamma=0.94), errors("ddim", [640])
    assert found / ddim == pytest.approx(0.06 / 1.94, rel=0.1)


@pytest.mark.parametrize("name", ["bdia-edm", "bdia-dpm"])
def test_second_order_bases_are_so_at_any_gamma(name):
    steps = (16, 32, 64)
    assert abs(claims.slope(steps, errors(name, steps, gamma=0.5)) - 2) < 0.3


@pytest.mark.parametrize(
    "name, options", [("bdia-edm", {"backward": "stored"}), ("bdia-dpm", {"form": "multi"})]
)
def test_forms_that_only_generate_are_of_second_order_too(name, options):
    steps = (48, 96, 192)
    assert abs(claims.slope(steps, errors(name, steps, gamma=0.5, **options)) - 2) < 0.3


def test_at_equal_cost_more_gamma_is_better_from_twenty_steps():
    for steps in (20, 50):
        [ddim] = errors("ddim", [steps])
        half, full = (errors("bdia", [steps], gamma=g)[0] for g in (0.5, 1.0))
        assert full < half < ddim


def test_in_ten_steps_of_stable_diffusion_half_of_it_is_better():
    """Its grid's steps are long near the data, where the second-order form overshoots."""
    path, grid, z = PATHS["discrete"], discrete_grid(10, 1000, offset=1), points()
    denoise = claims.denoiser(ProblemModel(mixture(), path, "eps"), 4)
    goal = reference_flow(mixture(), path, z, grid.times[-1], grid.times[0])
    ddim, full, half = (
        claims.error(go("bdia", denoise, z, grid, down=True, gamma=gamma).x, goal)
        for gamma in (0.0, 1.0, 0.5)
    )
    assert 1.5 * half < full < ddim


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("gamma", [0.3, 1.0])
def test_what_ddim_solves_exactly_stays_so(name, gamma):
    """Noise that is always the same, and a single picture as data."""
    noise, x, grid = points(seed=5), points(), lambda_grid(PATHS["flow"], 6, 0.01, 1 - 1e-3)
    path, data = PATHS["flow"], points(seed=6)

    class Constant:
        kind = "eps"

        def __call__(self, z, t):
            return predict("eps", noise, z, *levels(VP, t, z))

    class PointMass:
        kind = "velocity"

        def __call__(self, z, t):
            alpha, sigma = levels(path, t, z)
            return Prediction(data, (z - alpha * data) / sigma)

    solver = get("solver", name).make(gamma=gamma, input_bits=None)
    state = State(x)
    for step in vp_grid(6).walk(down=True):
        state = solver.step(Constant(), state, step, VP)
    ddim = x
    for step in vp_grid(6).walk(down=True):
        ddim = get("solver", "ddim").make().step(Constant(), State(ddim), step, VP).x
    assert claims.relative(state.x, ddim) < 1e-12
    state = State(x)
    for step in grid.walk(down=True):
        state = solver.step(PointMass(), state, step, path)
    alpha, sigma = levels(path, 1 - 1e-3, x)
    goal = levels(path, 0.01, x)[0] * data + 0.01 * (x - alpha * data) / sigma
    assert claims.relative(state.x, goal) < 1e-13


# --- Exactness ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("gamma", [1.0, 0.94])
@pytest.mark.parametrize("steps", [10, 100])
def test_round_trips_of_data(name, gamma, steps):
    denoise = claims.denoiser(ProblemModel(mixture(), VP, "eps"), 4)
    solver = get("solver", name).make(gamma=gamma)
    assert claims.round_trip(solver, denoise, points(), vp_grid(steps)) < 100 * EPS


@pytest.mark.parametrize("name", BASES)
def test_round_trips_of_noise(name):
    """Exact too, when the pair is kept; rounding meets the parasitic mode here."""
    model = ProblemModel(mixture(), PATHS["flow"], "velocity")
    denoise, grid, z = claims.denoiser(model, 4, "red", 3.0), flow_grid(20), points()
    bottom = go(name, denoise, z, grid, down=True, gamma=0.94)
    back = go(name, denoise, bottom, grid, down=False, gamma=0.94).x
    assert claims.relative(back, z) < 1e-12


def test_the_pair_is_what_makes_it_exact():
    denoise = claims.denoiser(ProblemModel(mixture(), VP, "v"), 4, "red", 3.0)
    top = go("bdia", denoise, points(), vp_grid(20), down=False)
    alone = go("bdia", denoise, top.x, vp_grid(20), down=True).x
    assert claims.relative(alone, points()) > 1e-3


def test_turning_round_asks_nothing():
    denoise = claims.denoiser(ProblemModel(mixture(), VP, "v"), 4)
    top = go("bdia", denoise, points(), vp_grid(10), down=False)
    spent = denoise.ledger.rows
    go("bdia", denoise, top, vp_grid(10), down=True)
    assert (spent, denoise.ledger.rows - spent) == (40, 36)


def test_uneven_grids_are_exact():
    denoise = claims.denoiser(ProblemModel(mixture(), VP, "eps"), 4, "red", 7.5)
    grid = Grid((1e-3, 0.01, 0.2, 0.21, 0.22, 0.6, 0.61, 0.95, 1.0))
    assert claims.round_trip(get("solver", "bdia").make(), denoise, points(), grid) < 1e-12


def test_exactly_clean_data_can_be_asked_about():
    """The level below the first trained one (t = -1) is where inversion starts."""
    model = ProblemModel(mixture(), PATHS["discrete"], "eps")
    grid = discrete_grid(20, 1000, offset=1, final=-1.0)
    denoise = claims.denoiser(model, 4, "red", 3.0)
    assert claims.round_trip(get("solver", "bdia").make(), denoise, points(), grid) < 1e-12


def test_the_pair_can_be_tiled_over_branches():
    denoise = claims.denoiser(ProblemModel(mixture(), VP, "v"), 4)
    top = go("bdia", denoise, points(), vp_grid(8), down=False)
    wide = claims.denoiser(ProblemModel(mixture(), VP, "v"), 8)
    both = go("bdia", wide, top.tile(2), vp_grid(8), down=True).x
    assert claims.relative(both[4:], points()) < 1e-12


# --- Limits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("down", [True, False])
def test_the_parasitic_mode_changes_as_declared(down):
    """Constant noise: a disturbed pair's difference, in units of alpha."""
    gamma, grid, noise = 0.9, vp_grid(12), points(seed=5)

    class Constant:
        kind = "eps"

        def __call__(self, z, t):
            return predict("eps", noise, z, *levels(VP, t, z))

    solver, walks = get("solver", "bdia").make(gamma=gamma, input_bits=None), []
    for push in (0.0, 1.0):
        states = [State(points())]
        for k, step in enumerate(grid.walk(down=down)):
            states.append(solver.step(Constant(), states[-1], step, VP))
            if k == 0:
                states[-1] = states[-1].with_x(states[-1].x + push)
        walks.append([s.x for s in states[::-1]] if down else [s.x for s in states])
    level = [
        (pushed - calm) / VP.alpha(t) for calm, pushed, t in zip(*walks, grid.times, strict=True)
    ]
    difference = [b - a for a, b in zip(level, level[1:], strict=False)]
    for i in range(1, 12):
        factor = -gamma * VP.alpha(grid.times[i + 1]) / VP.alpha(grid.times[i - 1])
        # Leaves of the difference between levels i - 1, i and between i, i + 1.
        torch.testing.assert_close(difference[i - 1], factor * difference[i], rtol=1e-9, atol=0)


def test_it_warns_before_its_limit():
    denoise = claims.denoiser(ProblemModel(gaussian(), VP, "v"), 1)
    with pytest.warns(AmplificationWarning, match=r"100 steps at gamma 0.9 .*at most 65 steps"):
        go("bdia", denoise, points(1), vp_grid(100), down=False, gamma=0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        go("bdia", denoise, points(1), vp_grid(100), down=False, gamma=0.94)
        go("bdia", denoise, points(1), vp_grid(100), down=True, gamma=0.5)


@pytest.mark.parametrize(
    "name, options", [("bdia-edm", {"backward": "stored"}), ("bdia-dpm", {"form": "multi"})]
)
def test_implicit_inversions_are_refused_before_asking(name, options):
    denoise = claims.denoiser(ProblemModel(mixture(), VP, "v"), 4)
    with pytest.raises(RetourError, match="only generates"):
        go(name, denoise, points(), vp_grid(4), down=False, **options)
    assert denoise.ledger.rows == 0


@pytest.mark.parametrize(
    "options, says",
    [({"gamma": 1.2}, "gamma"), ({"gamma": -0.1}, "gamma"), ({"input_bits": 4}, "8")],
)
def test_options_are_checked(options, says):
    with pytest.raises(RetourError, match=says):
        get("solver", "bdia").make(**options)
