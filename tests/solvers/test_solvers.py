"""Single solvers against their formulas and against diffusers."""

import math

import pytest
import torch

import declarations as claims
from problems import (
    PATHS,
    ProblemModel,
    exact_flow,
    gaussian,
    mixture,
    mixture_pair,
    points,
    stable_diffusion_path,
)
from retour.core.grid import Grid, discrete_grid, flow_grid, lambda_grid
from retour.core.path import DiscreteVP, Path, Prediction, as_time, levels, predict
from retour.core.registry import get
from retour.core.state import State
from retour.errors import RetourError
from retour.solvers._exact import AmplificationWarning, snap

FLOW = ProblemModel(mixture(), PATHS["flow"], "velocity")


def walk(name, model, x, grid, *, down, prompt="", scale=1.0, **options):
    denoise = claims.denoiser(model, len(x), prompt, scale)
    return claims.go(get("solver", name).make(**options), denoise, x, grid, down=down).x


# --- DDIM ---------------------------------------------------------------------------------------


def test_euler_is_the_same_object():
    assert get("solver", "euler").factory is get("solver", "ddim").factory


@pytest.mark.parametrize("down", [True, False])
def test_ddim_is_euler_on_the_flow(down):
    grid, x = flow_grid(7), points()
    denoise = claims.denoiser(FLOW, 4)
    y = x
    for step in grid.walk(down=down):
        y = y + (step.s - step.t) * denoise(y, step.t).velocity
    assert claims.relative(walk("ddim", FLOW, x, grid, down=down), y) < 1e-13


@pytest.mark.parametrize("kind", ["eps", "v", "velocity"])
def test_ddim_depends_on_lambda_alone(kind):
    """Path independence: flow and VP with matched lambda end in the same data."""
    vp, flow = PATHS["vp"], PATHS["flow"]
    grid = lambda_grid(vp, 20, 1e-3, 1.0)
    matched = Grid(tuple(float(flow.time(vp.lam(t))) for t in grid.times))
    x = points()
    y = x * (flow.alpha(matched.times[-1]) / vp.alpha(1.0))
    on_vp = walk("ddim", ProblemModel(mixture(), vp, kind), x, grid, down=True)
    on_flow = walk("ddim", ProblemModel(mixture(), flow, kind), y, matched, down=True)
    on_vp, on_flow = on_vp / vp.alpha(1e-3), on_flow / flow.alpha(matched.times[0])
    assert claims.relative(on_flow, on_vp) < 1e-6


def test_noisy_query_is_the_published_inversion_of_noise_models():
    path = stable_diffusion_path()
    model, grid = ProblemModel(mixture(), path, "eps"), discrete_grid(10, 1000, offset=1)
    denoise, z = claims.denoiser(model, 4), points()
    for low, high in zip(grid.times, grid.times[1:], strict=False):
        e = denoise(z, high).eps
        a, b = path.alpha(low) ** 2, path.alpha(high) ** 2
        z = b.sqrt() * (z - (1 - a).sqrt() * e) / a.sqrt() + (1 - b).sqrt() * e
    found = walk("ddim", model, points(), grid, down=False, query="noisy")
    assert claims.relative(found, z) < 1e-12


def test_noisy_query_holds_the_flow_velocity():
    grid, z = flow_grid(5), points()
    denoise = claims.denoiser(FLOW, 4)
    for step in grid.walk(down=False):
        z = z + (step.s - step.t) * denoise(z, step.s).velocity
    found = walk("ddim", FLOW, points(), grid, down=False, query="noisy")
    assert claims.relative(found, z) < 1e-13


@pytest.mark.parametrize("kind", ["eps", "v", "velocity", "x0", "score"])
def test_noisy_query_converges_for_every_kind(kind):
    clean, noisy = mixture_pair("discrete", 0.0, 999.0)
    model = ProblemModel(mixture(), PATHS["discrete"], kind)
    found = claims.measured_order(
        get("solver", "ddim").make(query="noisy"),
        model,
        clean,
        noisy,
        lambda n: lambda_grid(model.path, n, 0.0, 999.0),
        (64, 128),
        down=False,
    )
    assert abs(found - 1) < 0.3


def test_queries_agree_downwards():
    grid = flow_grid(5)
    one, other = (
        walk("ddim", FLOW, points(), grid, down=True, query=q) for q in ("departure", "noisy")
    )
    assert torch.equal(one, other)


def diffusers_walk(scheduler, model, x, prompt=""):
    """Sample with a diffusers scheduler, asking our network."""
    denoise = claims.denoiser(model, len(x), prompt)
    for t in scheduler.timesteps:
        x = scheduler.step(denoise(x, float(t)).eps, t, x).prev_sample
    return x


SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.mark.parametrize("to_one", [True, False])
def test_ddim_equals_diffusers(to_one):
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(**SD, clip_sample=False, set_alpha_to_one=to_one, steps_offset=1)
    scheduler.set_timesteps(20)
    model = ProblemModel(mixture(), DiscreteVP(scheduler.alphas_cumprod), "eps")
    grid = discrete_grid(20, 1000, offset=1, final=-1.0 if to_one else 0.0)
    found = walk("ddim", model, points(), grid, down=True)
    assert claims.relative(found, diffusers_walk(scheduler, model, points())) < 1e-5


# --- DPM-Solver++ -------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [8, 20])
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_dpm_equals_diffusers(steps, final, spacing):
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(
        **SD, timestep_spacing=spacing, final_sigmas_type=final, steps_offset=1
    )
    scheduler.set_timesteps(steps)
    model = ProblemModel(mixture(), DiscreteVP(scheduler.alphas_cumprod), "eps")
    times = [float(t) for t in scheduler.timesteps.flip(0)]
    clean = -1.0 if final == "zero" else 0.0
    grid = Grid((clean, *[t for t in times if t > clean]))
    found = walk("dpm", model, points(), grid, down=True)
    assert claims.relative(found, diffusers_walk(scheduler, model, points())) < 1e-5


def test_dpm_is_far_better_than_ddim_at_equal_cost_in_inversion():
    clean, noisy = mixture_pair("vp", 1e-3, 1.0)
    model = ProblemModel(mixture(), PATHS["vp"], "eps")
    grid = lambda_grid(model.path, 40, 1e-3, 1.0)
    ddim, dpm = (
        claims.error(walk(n, model, clean, grid, down=False), noisy) for n in ("ddim", "dpm")
    )
    assert dpm < ddim / 10


def test_dpm_first_and_last_steps_at_infinity_are_ddim():
    for grid in (flow_grid(1), flow_grid(2)):
        for down in (True, False):
            x = points()
            dpm = walk("dpm", FLOW, x, grid, down=down, lower_order_final=False)
            assert claims.relative(dpm, walk("ddim", FLOW, x, grid, down=down)) < 1e-14


# --- Runge-Kutta and multistep ------------------------------------------------------------------


@pytest.mark.parametrize("down", [True, False])
def test_midpoint_equals_the_rf_solver_code(down):
    """k1, k2 at half a step, d = (k2 - k1) / (h/2), z + h k1 + h^2/2 d."""
    grid, z = flow_grid(9, 3.0), points()
    denoise = claims.denoiser(FLOW, 4)
    for step in grid.walk(down=down):
        h = step.s - step.t
        k1 = denoise(z, step.t).velocity
        k2 = denoise(z + h / 2 * k1, step.t + h / 2).velocity
        z = z + h * k1 + h**2 / 2 * (k2 - k1) / (h / 2)
    assert claims.relative(walk("midpoint", FLOW, points(), grid, down=down), z) < 1e-12


@pytest.mark.parametrize("down", [True, False])
def test_probe_follows_the_rf_solver_paper(down):
    grid, z = flow_grid(9), points()
    denoise = claims.denoiser(FLOW, 4)
    for step in grid.walk(down=down):
        h = step.s - step.t
        reach = 0.01 if h > 0 else -0.01
        k1 = denoise(z, step.t).velocity
        d = (denoise(z + reach * k1, step.t + reach).velocity - k1) / reach
        z = z + h * k1 + h**2 / 2 * d
    # A difference over 0.01 loses two of sixteen digits.
    found = walk("midpoint", FLOW, points(), grid, down=down, probe=0.01)
    assert claims.relative(found, z) < 1e-11


def test_a_probe_of_half_a_step_is_the_midpoint_and_of_a_whole_one_heun():
    grid, x = flow_grid(10), points()
    half = walk("midpoint", FLOW, x, grid, down=True, probe=0.05)
    assert claims.relative(half, walk("midpoint", FLOW, x, grid, down=True)) < 1e-12
    whole = walk("midpoint", FLOW, x, grid, down=True, probe=0.5)
    assert claims.relative(whole, walk("heun", FLOW, x, grid, down=True)) < 1e-12


@pytest.mark.parametrize("probe", [0, -0.1, 1.0])
def test_probe_is_checked(probe):
    with pytest.raises(RetourError, match="probe"):
        get("solver", "midpoint").make(probe=probe)


@pytest.mark.parametrize("name", ["midpoint", "heun", "fireflow", "ab2", "dpm"])
def test_second_order_beats_euler_tenfold_at_equal_cost(name):
    clean, noisy = mixture_pair("flow", 0.0, 1.0)
    budget = 64
    steps = budget // get("solver", name).facts["nfe_per_step"]
    good = claims.error(walk(name, FLOW, noisy, flow_grid(steps), down=True), clean)
    euler = claims.error(walk("euler", FLOW, noisy, flow_grid(budget), down=True), clean)
    assert good < euler / 10


@pytest.mark.parametrize("name", ["midpoint", "heun", "fireflow"])
def test_round_trips_of_one_step_rules_gain_an_order(name):
    """The even error term cancels on the way back."""
    clean, _ = mixture_pair("flow", 0.0, 1.0)
    solver, steps = get("solver", name).make(), (16, 32, 64)
    denoise = claims.denoiser(FLOW, len(clean))
    trips = [claims.round_trip(solver, denoise, clean, flow_grid(n)) for n in steps]
    assert abs(claims.slope(steps, trips) - 3) < 0.3


@pytest.mark.parametrize("path", ["flow", "vp", "sub-vp", "cosine", "ve", "discrete"])
@pytest.mark.parametrize("name", ["dpm", "midpoint", "heun", "fireflow", "ab2"])
def test_gaussian_data_goes_to_its_own_noise(name, path):
    """x0 of N(m, q^2) must end at alpha m + sqrt(alpha^2 q^2 + sigma^2) (x0 - m) / q."""
    data, where = gaussian(), PATHS[path]
    low, high = float(where.time(5.0)), float(where.time(-3.0))
    model = ProblemModel(data, where, "v")
    x = where.alpha(low) * (data.means + 0.5 * points())
    found = walk(name, model, x, lambda_grid(where, 96, low, high), down=False)
    # Second order: h = 8/96 in lambda, and the flow's constants are of order one.
    assert claims.relative(found, exact_flow(data, where, x, low, high)) < (8 / 96) ** 2


# --- EDICT --------------------------------------------------------------------------------------


def edict_by_hand(path: Path, denoise, x, grid, p):
    """The paper's four lines, generation only, written with square roots of alpha-bar."""
    y = x
    for k, step in enumerate(grid.walk(down=True)):
        a, b = path.alpha(step.t) ** 2, path.alpha(step.s) ** 2
        scale = (b / a).sqrt()
        gain = (1 - b).sqrt() - scale * (1 - a).sqrt()
        if k % 2 == 0:
            x = scale * x + gain * denoise(y, step.t).eps
            y = scale * y + gain * denoise(x, step.t).eps
        else:
            y = scale * y + gain * denoise(x, step.t).eps
            x = scale * x + gain * denoise(y, step.t).eps
        x = p * x + (1 - p) * y
        y = p * y + (1 - p) * x
    return x


@pytest.mark.parametrize("steps", [9, 10])
def test_edict_follows_the_paper(steps):
    path = stable_diffusion_path()
    model = ProblemModel(mixture(), path, "eps")
    grid = discrete_grid(steps, 1000, offset=1)
    by_hand = edict_by_hand(path, claims.denoiser(model, 4), points(), grid, 0.93)
    found = walk("edict", model, points(), grid, down=True, input_bits=None)
    assert claims.relative(found, by_hand) < 1e-12


def test_edict_shows_a_narrow_network_the_same_on_the_way_back():
    """States that differ by rounding cross float32's edges now and then; the snapped do not."""
    x = points(500_000)
    x[::2] = x[::2].float().double()
    returned = x * (1 + 1e-12)
    assert (x.float() != returned.float()).any()
    assert torch.equal(snap(x, 16), snap(returned, 16))
    assert claims.relative(snap(x, 16), x) < 2**-16


@pytest.mark.parametrize("steps", [49, 50])
@pytest.mark.parametrize("kind", ["eps", "v"])
def test_edict_from_noise_to_noise(steps, kind):
    """This way round the rounding of the descent is amplified by the ascent: p^(-2N) eps."""
    model = ProblemModel(mixture(), PATHS["vp"], kind)
    solver, denoise = get("solver", "edict").make(), claims.denoiser(model, 4, "red", 7.5)
    grid, z = lambda_grid(model.path, steps, 1e-3, 1.0), points()
    bottom = claims.go(solver, denoise, z, grid, down=True)
    growth = 0.93 ** (-2 * steps) / float(model.path.alpha(1.0))
    back = claims.go(solver, denoise, bottom, grid, down=False).x
    assert claims.relative(back, z) < growth * steps * torch.finfo(torch.float64).eps


def test_edict_with_blind_noise_is_ddim():
    path = stable_diffusion_path()
    noise, grid = points(seed=5), discrete_grid(10, 1000, offset=1)
    x = points()

    def blind(z, t):
        return predict("eps", noise, z, *levels(path, t, z))

    solver, ddim = get("solver", "edict").make(), get("solver", "ddim").make()
    a, b = solver.start(x), ddim.start(x)
    for step in grid.walk(down=True):
        a, b = solver.step(blind, a, step, path), ddim.step(blind, b, step, path)
    assert claims.relative(a.x, b.x) < 1e-12
    assert claims.relative(a.memory["y"], a.x) < 1e-12


def test_edict_without_mixing_inverts_at_first_order():
    clean, noisy = mixture_pair("vp", 1e-3, 1.0)
    model = ProblemModel(mixture(), PATHS["vp"], "eps")
    found = claims.measured_order(
        get("solver", "edict").make(mixing=1.0),
        model,
        clean,
        noisy,
        lambda n: lambda_grid(model.path, n, 1e-3, 1.0),
        (64, 128),
        down=False,
    )
    assert abs(found - 1) < 0.3


@pytest.mark.parametrize("down", [False, True])
def test_edict_pair_grows_upwards_and_shrinks_downwards_as_declared(down):
    """Mixing alone (no network) changes a perturbation of the pair by p^2 each step down."""
    path, p, steps = PATHS["flow"], 0.9, 20
    solver = get("solver", "edict").make(mixing=p)

    class Still:
        kind = "velocity"

        def __call__(self, z, t):
            return Prediction(torch.zeros_like(z), torch.zeros_like(z))

    state = solver.start(points())
    state = type(state)(state.x, {"y": state.x + 1e-6})
    for step in flow_grid(steps).walk(down=down):
        state = solver.step(Still(), state, step, path)
    changed = float((state.memory["y"] - state.x).abs().mean()) / 1e-6
    # The difference of two numbers of order one is known to 1e-16, which is 1e-8 of it at least.
    assert changed == pytest.approx(p ** (2 * steps * (1 if down else -1)), rel=1e-6)


@pytest.mark.parametrize("down", [False, True])
def test_edict_mixing_changes_the_pair_as_much_beside_a_network(down):
    """Against p = 1, which has the affine maps and the network alone; in logarithms, to a fifth."""
    model, steps, p = ProblemModel(mixture(), PATHS["discrete"], "eps"), 40, 0.93
    denoise, grid, x = claims.denoiser(model, 4, "red", 3.0), model.grid(steps), points()

    def factor(mixing):
        solver = get("solver", "edict").make(mixing=mixing, input_bits=None)
        gaps = []
        for push in (0.0, 1e-6):
            end = claims.go(solver, denoise, State(x, {"y": x + push}), grid, down=down)
            gaps.append(end.memory["y"] - end.x)
        return float((gaps[1] - gaps[0]).abs().mean()) / 1e-6

    found = math.log(factor(p) / factor(1.0)) / (2 * steps * math.log(p))
    assert found == pytest.approx(1 if down else -1, rel=0.2)


def test_edict_warns_before_its_limit():
    model = ProblemModel(mixture(), PATHS["vp"], "eps")
    grid = lambda_grid(model.path, 100, 1e-3, 1.0)
    with pytest.warns(AmplificationWarning, match=r"100 steps at mixing 0.93.*at least 0.9"):
        walk("edict", model, points(1), grid, down=False)


@pytest.mark.parametrize("mixing", [0, 1.1, -0.5])
def test_edict_mixing_is_checked(mixing):
    with pytest.raises(RetourError, match="mixing"):
        get("solver", "edict").make(mixing=mixing)


def test_solvers_run_on_the_model_s_own_half_level_times():
    """Fractional times of a discrete path are ordinary ones: the midpoint asks there."""
    path = stable_diffusion_path()
    u = float((path.flow_time(10.0) + path.flow_time(30.0)) / 2)
    t = float(path.from_flow_time(u))
    assert 10 < t < 30 and t != int(t)
    assert float(path.flow_time(as_time(t))) == pytest.approx(u, abs=1e-14)
