"""Flow solvers against torchdiffeq: the same steps where it has the rule, the same limit where not.

On the flow the latents are their own flow coordinates, so its integrators may walk our grids.
"""

from functools import partial

import pytest
import torch

import declarations as claims
from problems import PATHS, ProblemModel, mixture, mixture_pair, points, reference_flow
from retour.core.grid import flow_grid, lambda_grid
from retour.core.registry import entries, get

torchdiffeq = pytest.importorskip("torchdiffeq")

MODEL = ProblemModel(mixture(), PATHS["flow"], "velocity")
RULES = {"euler": "euler", "midpoint": "midpoint", "heun": "heun2"}
both_ways = pytest.mark.parametrize("down", [True, False], ids=["generation", "inversion"])


def field(prompt="", scale=1.0, images=4):
    denoise = claims.denoiser(MODEL, images, prompt, scale)
    return lambda t, y: denoise(y, float(t)).velocity


def theirs(method, x, times, prompt="", scale=1.0, **options):
    times = torch.tensor(times, dtype=torch.float64)
    return torchdiffeq.odeint(field(prompt, scale), x, times, method=method, **options)[-1]


@both_ways
@pytest.mark.parametrize("shift", [1.0, 3.15])
@pytest.mark.parametrize("name", RULES)
def test_the_same_steps(name, shift, down):
    """Guided too: linear guidance makes one velocity of two."""
    grid, x = flow_grid(9, shift), points()
    times = grid.times[::-1] if down else grid.times
    for prompt, scale in (("", 1.0), ("red", 3.0)):
        denoise = claims.denoiser(MODEL, 4, prompt, scale)
        found = claims.go(get("solver", name).make(), denoise, x, grid, down=down).x
        assert claims.relative(found, theirs(RULES[name], x, times, prompt, scale)) < 1e-12


def test_the_tests_reference_is_their_limit():
    """Our classical Runge-Kutta against adaptive Dormand-Prince: two codes, one flow."""
    clean, noisy = mixture_pair("flow", 0.0, 1.0)
    tight = {"rtol": 1e-10, "atol": 1e-10}
    assert claims.relative(theirs("dopri5", noisy, (1.0, 0.0), **tight), clean) < 1e-8
    assert claims.relative(theirs("dopri5", clean, (0.0, 1.0), **tight), noisy) < 1e-8
    back = reference_flow(mixture(), PATHS["flow"], clean, 0.0, 1.0)
    assert claims.relative(back, noisy) < 1e-8


@both_ways
@pytest.mark.parametrize("entry", [e for e in entries("solver") if e.order], ids=lambda e: e.name)
def test_every_ordered_solver_converges_to_their_answer(entry, down):
    """Doubling the steps halves the distance, or quarters it, as declared."""
    order = entry.order if down else entry.facts.get("inversion_order", entry.order)
    if order is None or entry.stochastic:
        pytest.skip("declares no order in this direction, or draws noise")
    ends = 0.02, 0.98
    clean, noisy = mixture_pair("flow", *ends)
    start, times = (noisy, ends[::-1]) if down else (clean, ends)
    goal = theirs("dopri5", start, times, rtol=1e-9, atol=1e-9)
    grids = partial(lambda_grid, MODEL.path, t_clean=ends[0], t_noise=ends[1])
    found = claims.measured_order(entry.make(), MODEL, start, goal, grids, (32, 64), down=down)
    assert abs(found - order) < 0.3


@pytest.mark.parametrize("name", ["fireflow", "midpoint", "heun", "ab2"])
def test_at_equal_cost_second_order_is_nearer_to_their_answer_than_their_euler(name):
    clean, noisy = mixture_pair("flow", 0.0, 1.0)
    goal = theirs("dopri5", noisy, (1.0, 0.0), rtol=1e-9, atol=1e-9)
    steps = 32 // get("solver", name).facts["nfe_per_step"]
    denoise = claims.denoiser(MODEL, 4)
    ours = claims.go(get("solver", name).make(), denoise, noisy, flow_grid(steps), down=True).x
    euler = theirs("euler", noisy, flow_grid(32).times[::-1])
    assert claims.error(ours, goal) < claims.error(euler, goal) / 5
