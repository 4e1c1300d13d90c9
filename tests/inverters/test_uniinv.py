"""Uni-Inv: the orders that theory gives it, and where it asks the network."""

import pytest
import torch

from declarations import denoiser, error, go, slope
from problems import PATHS, ProblemModel, gaussian, mixture, mixture_pair, points
from retour.core.grid import flow_grid, lambda_grid
from retour.core.registry import get
from retour.core.state import State
from retour.inverters.base import Job
from retour.inverters.uniinv import UniInvStep

STEPS = (16, 32, 64, 128)
EULER = get("solver", "euler").make()


def round_trip(steps, zero_start=False):
    model = ProblemModel(mixture(), PATHS["flow"], "velocity")
    data, _ = mixture_pair("flow", 0.0, 1.0)
    grid, denoise = flow_grid(steps), denoiser(model, len(data))
    top = go(UniInvStep(zero_start), denoise, data, grid, down=False)
    return error(go(EULER, denoise, State(top.x), grid, down=True).x, data)


@pytest.mark.parametrize("name", ["flow", "vp"])
def test_inversion_is_first_order(name):
    low, high = (0.0, 1.0) if name == "flow" else (1e-3, 1.0)
    path, model = PATHS[name], ProblemModel(mixture(), PATHS[name], "velocity")
    data, noise = mixture_pair(name, low, high)

    def grid(count):
        return flow_grid(count) if name == "flow" else lambda_grid(path, count, low, high)

    found = [go(UniInvStep(), denoiser(model, len(data)), data, grid(n), down=False) for n in STEPS]
    assert abs(slope(STEPS, [error(f.x, noise) for f in found]) - 1) < 0.15


def test_round_trip_is_second_order_and_better_than_eulers():
    errors = [round_trip(n) for n in STEPS]
    assert abs(slope(STEPS, errors) - 2) < 0.2
    model = ProblemModel(mixture(), PATHS["flow"], "velocity")
    data, _ = mixture_pair("flow", 0.0, 1.0)
    denoise, grid = denoiser(model, len(data)), flow_grid(STEPS[-1])
    euler = go(EULER, denoise, go(EULER, denoise, data, grid, down=False), grid, down=True)
    assert errors[-1] < error(euler.x, data) / 10


class Asked:
    """A denoiser that writes down when it is asked."""

    def __init__(self, inner):
        self.inner, self.times = inner, []

    def __call__(self, x, t):
        self.times.append(t)
        return self.inner(x, t)


@pytest.mark.parametrize("zero_start", [False, True])
def test_it_asks_where_the_sampler_asks(zero_start):
    """Features kept on the way up are of the very levels of the way down."""
    grid = flow_grid(5, 3.0)
    model = ProblemModel(mixture(), PATHS["flow"], "velocity")
    up, down = Asked(denoiser(model, 4)), Asked(denoiser(model, 4))
    state = State(points())
    for step in grid.walk(down=False):
        state = UniInvStep(zero_start).step(up, state, step, model.path)
    state = State(state.x)
    for step in grid.walk(down=True):
        state = EULER.step(down, state, step, model.path)
    assert up.times[0 if zero_start else 1 :] == down.times[::-1]
    assert len(up.times) == (5 if zero_start else 6)


def test_the_noise_of_a_gaussian_is_its_standardised_data():
    data = gaussian()
    model = ProblemModel(data, PATHS["flow"], "velocity")
    x = data.means + data.widths[0] * points()
    found = go(UniInvStep(), denoiser(model, 4), x, flow_grid(400), down=False)
    assert error(found.x, points()) < 2e-2


def test_clean_data_networks_start_from_nothing():
    model = ProblemModel(mixture(), PATHS["flow"], "x0")
    job = Job(
        model, points(2), model.embed(["", ""]), model.embed(["", ""]), flow_grid(8), 1.0,
        torch.Generator(),
    )  # fmt: skip
    inversion = get("invert", "uniinv").make(zero_start=True).invert(job)
    assert torch.isfinite(inversion.noise).all() and job.ledger.nfe(2) == 8
    assert inversion.states["x"].shape == (9, 2, 2, 1, 1) and set(inversion.states) == {"x"}
