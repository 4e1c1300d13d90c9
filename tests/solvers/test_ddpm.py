"""Stochastic DDIM against its formulas, the forward process and diffusers."""

import pytest
import torch

import declarations as claims
from problems import PATHS, ProblemModel, mixture, points, stable_diffusion_path
from retour.core.grid import discrete_grid, flow_grid, lambda_grid
from retour.core.loop import walk
from retour.core.path import DiscreteVP, levels
from retour.core.registry import get
from retour.core.state import State
from retour.errors import RetourError

VP = PATHS["vp"]


def make(**options):
    return get("solver", "ddpm").make(**options)


def model(path, kind="eps"):
    return ProblemModel(mixture(), PATHS[path], kind)


@pytest.mark.parametrize("down", [True, False])
def test_without_noise_it_is_ddim_bit_for_bit(down):
    denoise, grid = claims.denoiser(model("vp"), 4, "red", 7.5), lambda_grid(VP, 8, 1e-3, 1.0)
    noises = claims.Given([points(seed=k) for k in range(8)])
    for spread in ("posterior", "full"):
        solver = make(eta=0.0, spread=spread)
        found = walk(solver, denoise, State(points()), grid, down=down, controls=[noises]).x
        ddim = claims.go(get("solver", "ddim").make(), denoise, points(), grid, down=down).x
        assert torch.equal(found, ddim)


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_it_equals_diffusers(eta):
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    scheduler.set_timesteps(10)
    noises = [points(seed=k + 1) for k in range(10)]
    net = ProblemModel(mixture(), DiscreteVP(scheduler.alphas_cumprod), "eps")
    denoise, x = claims.denoiser(net, 4), points()
    for t, noise in zip(scheduler.timesteps, noises, strict=True):
        e = denoise(x, float(t)).eps
        x = scheduler.step(e, t, x, eta=eta, variance_noise=noise).prev_sample
    grid = discrete_grid(10, 1000, offset=1)
    found = walk(
        make(eta=eta), denoise, State(points()), grid, down=True, controls=[claims.Given(noises)]
    ).x
    assert claims.relative(found, x) < 1e-5  # diffusers' table is float32


def test_ancestral_steps_are_ddpms_posterior():
    """Mean and deviation of q(x_s | x_t, x0) with the predicted x0, written with betas."""
    path = stable_diffusion_path()
    denoise, grid = claims.denoiser(model("discrete"), 4), discrete_grid(5, 1000, offset=1)
    x, solver = points(), make()
    for step in list(grid.walk(down=True))[:-1]:
        a_t, a_s = (path.alpha(t) ** 2 for t in (step.t, step.s))
        beta = 1 - a_t / a_s
        mean = (
            a_s.sqrt() * beta / (1 - a_t) * denoise(x, step.t).x0
            + (a_t / a_s).sqrt() * (1 - a_s) / (1 - a_t) * x
        )
        found = solver.step(denoise, State(x), step, path).x
        assert claims.relative(found, mean) < 1e-12
        assert solver.std(path, step) ** 2 == pytest.approx(float((1 - a_s) / (1 - a_t) * beta))
        x = found


@pytest.mark.parametrize("path", sorted(PATHS))
def test_upwards_at_eta_one_it_is_the_forward_process(path):
    where = PATHS[path]
    low, high = float(where.time(2.0)), float(where.time(-1.0))
    [step] = lambda_grid(where, 1, low, high).walk(down=False)
    x, solver = points(), make()
    found = solver.step(claims.denoiser(model(path, "v"), 4), State(x), step, where).x
    kept = where.alpha(high) / where.alpha(low)
    assert claims.relative(found, kept * x) < 1e-13
    variance = float(kept**2 * where.sigma(low) ** 2) + solver.std(where, step) ** 2
    assert variance == pytest.approx(float(where.sigma(high) ** 2))


def test_full_spread_resamples_all_noise():
    """Multistep consistency sampling: nothing of the predicted noise is left."""
    path, noise = PATHS["discrete"], points(seed=9)
    denoise, x = claims.denoiser(model("discrete"), 4), points()
    [*_, step] = discrete_grid(4, 1000, offset=1).walk(down=False)
    step = type(step)(step.index, step.count, step.s, step.t, True)
    state = State(x, {"noise": noise})
    found = make(spread="full").step(denoise, state, step, path).x
    alpha, sigma = levels(path, step.s, x)
    wanted = alpha * denoise(x, step.t).x0 + sigma * noise
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("spread", ["posterior", "full"])
def test_clean_data_gets_no_noise_and_pure_noise_is_an_ordinary_point(spread):
    denoise, solver = claims.denoiser(model("flow", "velocity"), 4), make(spread=spread)
    steps = list(flow_grid(3).walk(down=True))
    assert solver.std(PATHS["flow"], steps[-1]) == 0
    assert 0 < solver.std(PATHS["flow"], steps[0]) <= float(PATHS["flow"].sigma(steps[0].s))
    end = walk(solver, denoise, State(points()), flow_grid(3), down=True)
    assert torch.isfinite(end.x).all()


@pytest.mark.parametrize("eta", [-0.1, 1.5, float("nan")])
def test_eta_is_checked(eta):
    with pytest.raises(RetourError, match="eta"):
        make(eta=eta)
