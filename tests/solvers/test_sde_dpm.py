"""SDE-DPM-Solver++(2M) against its formula, the ancestral step and diffusers."""

import math

import pytest
import torch

import declarations as claims
from problems import PATHS, ProblemModel, mixture, points
from retour.core.grid import Grid, flow_grid, lambda_grid
from retour.core.loop import walk
from retour.core.path import DiscreteVP
from retour.core.registry import get
from retour.core.state import State

VP = PATHS["vp"]


def make(**options):
    return get("solver", "sde-dpm").make(**options)


def test_it_is_the_published_recursion():
    """mu = (s_s / s_t) e^-h x + a_s (1 - e^-2h) m, later + half of that times (m - m_prev) / r."""
    grid, x, before = lambda_grid(VP, 7, 1e-3, 1.0), points(), None
    denoise = claims.denoiser(ProblemModel(mixture(), VP, "eps"), 4)
    noises = [points(seed=k + 1) for k in range(7)]
    for step, noise in zip(grid.walk(down=True), noises, strict=True):
        m = denoise(x, step.t).x0
        lam, h = VP.lam(step.t), VP.lam(step.s) - VP.lam(step.t)
        fade = VP.alpha(step.s) * (1 - torch.exp(-2 * h))
        mu = VP.sigma(step.s) / VP.sigma(step.t) * torch.exp(-h) * x + fade * m
        if before is not None:
            r = (lam - before[0]) / h
            mu = mu + 0.5 * fade * (m - before[1]) / r
        x = mu + VP.sigma(step.s) * torch.sqrt(1 - torch.exp(-2 * h)) * noise
        before = lam, m
    found = walk(
        make(), denoise, State(points()), grid, down=True, controls=[claims.Given(noises)]
    ).x
    assert claims.relative(found, x) < 1e-11


@pytest.mark.parametrize("steps, lower", [(10, True), (10, False), (20, True)])
def test_it_equals_diffusers(steps, lower):
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        algorithm_type="sde-dpmsolver++",
        solver_order=2,
        final_sigmas_type="sigma_min",
        lower_order_final=lower,
        steps_offset=1,
        timestep_spacing="leading",
    )
    scheduler.set_timesteps(steps)
    times = [float(t) for t in scheduler.timesteps]
    net = ProblemModel(mixture(), DiscreteVP(scheduler.alphas_cumprod), "eps")
    denoise, x = claims.denoiser(net, 4), points()
    noises = [points(seed=k + 1) for k in range(steps)]
    for t, noise in zip(scheduler.timesteps, noises, strict=True):
        e = denoise(x, float(t)).eps
        x = scheduler.step(e, t, x, variance_noise=noise).prev_sample
    grid = Grid((0.0, *times[::-1]))
    solver = make(lower_order_final=lower)
    found = walk(
        solver, denoise, State(points()), grid, down=True, controls=[claims.Given(noises)]
    ).x
    assert claims.relative(found, x) < 1e-4  # diffusers keeps its sigmas in float32


def test_the_first_step_is_the_ancestral_one():
    denoise = claims.denoiser(ProblemModel(mixture(), PATHS["flow"], "velocity"), 4)
    for grid in (flow_grid(1), flow_grid(2), lambda_grid(PATHS["flow"], 4, 0.01, 0.99)):
        step = next(iter(grid.walk(down=True)))
        state = State(points(), {"noise": points(seed=1)})
        ancestral = get("solver", "ddpm").make().step(denoise, state, step, PATHS["flow"]).x
        found = make().step(denoise, state, step, PATHS["flow"]).x
        assert claims.relative(found, ancestral) < 1e-14


def test_steps_that_touch_an_infinite_lambda_are_first_order():
    denoise = claims.denoiser(ProblemModel(mixture(), PATHS["flow"], "velocity"), 4)
    x = State(points())
    for step in flow_grid(2).walk(down=True):
        plain = get("solver", "ddpm").make().step(denoise, x, step, PATHS["flow"]).x
        x = make().step(denoise, x, step, PATHS["flow"])
        assert claims.relative(x.x, plain) < 1e-14


def test_the_last_step_may_be_first_order():
    denoise, grid = claims.denoiser(ProblemModel(mixture(), VP, "eps"), 4), None
    for steps, changes in ((14, True), (15, False)):
        grid = lambda_grid(VP, steps, 1e-3, 1.0)
        first, second = (
            claims.go(make(lower_order_final=v), denoise, points(), grid, down=True).x
            for v in (True, False)
        )
        assert torch.equal(first, second) is not changes


def test_upwards_it_is_the_forward_process_and_asks_nothing():
    denoise, grid = (
        claims.denoiser(ProblemModel(mixture(), VP, "eps"), 4),
        lambda_grid(VP, 5, 1e-3, 1.0),
    )
    top = claims.go(make(), denoise, points(), grid, down=False)
    kept = VP.alpha(1.0) / VP.alpha(1e-3)
    assert claims.relative(top.x, kept * points()) < 1e-13
    assert denoise.ledger.rows == 0
    [step] = lambda_grid(VP, 1, 1e-3, 1.0).walk(down=False)
    variance = float(kept * VP.sigma(1e-3)) ** 2 + make().std(VP, step) ** 2
    assert math.sqrt(variance) == pytest.approx(float(VP.sigma(1.0)))
