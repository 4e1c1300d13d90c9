"""Gradient skipping: what it computes, what it costs, and where it must converge or diverge."""

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import Tensor

from declarations import denoiser
from problems import PATHS, ProblemModel, gaussian, mixture, pictures, points
from retour.core.branches import Branch, Denoiser
from retour.core.control import Control
from retour.core.grid import flow_grid
from retour.core.loop import walk
from retour.core.path import FlowPath, levels, predict
from retour.core.registry import get
from retour.core.state import State
from retour.restorers.operators import Grey, Inpaint, SuperResolution
from retour.restorers.steering import (
    Classified,
    Distance,
    Measurement,
    Steer,
    largest_curvature,
)

EULER = get("solver", "euler").make()


@dataclass
class Watched(ProblemModel):
    """Writes down whether a graph would be recorded, and every answer."""

    graphs: list[bool] = field(default_factory=list)

    def network(self, x: Tensor, t: Tensor, condition) -> Tensor:
        out = super().network(x, t, condition)
        self.graphs.append(torch.is_grad_enabled() or out.requires_grad)
        return out


def target(model, images):
    return Denoiser(model, [Branch("target", model.embed([""] * images))])


def sample(model, noise, grid, *controls):
    return walk(
        EULER, target(model, len(noise)), State(noise), grid, down=True, controls=controls
    ).x


@pytest.mark.parametrize("name", ["flow", "vp", "cosine"])
def test_the_skipped_gradient_is_that_of_the_frozen_velocity(name):
    """autograd through y - u v with v detached, bit for bit, in flow coordinates."""
    path = PATHS[name]
    model = ProblemModel(mixture(), path, "velocity")
    x, t = points(5), 0.7
    alpha, sigma = levels(path, t, x)
    total = alpha + sigma
    prediction = denoiser(model, 5)(x, t)
    y = (x / total).requires_grad_()
    cost = Distance(points(5, seed=1), 0.5)
    held = (prediction.eps - prediction.x0).detach()
    (wanted,) = torch.autograd.grad(cost(y - sigma / total * held).sum(), y)
    leaf = prediction.x0.detach().requires_grad_()
    (found,) = torch.autograd.grad(cost(leaf).sum(), leaf)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-14)
    if name == "flow":  # one and the same floating-point expression
        leaf = (x - t * held).requires_grad_()
        assert torch.equal(torch.autograd.grad(cost(leaf).sum(), leaf)[0], wanted)


def test_no_graph_and_one_evaluation_a_step():
    model = Watched(mixture(), PATHS["flow"], "velocity")
    run = target(model, 4)
    steer = Steer({"target": Distance(points(4))}, 0.5, inner=3)
    walk(EULER, run, State(points(4, 1)), flow_grid(7), down=True, controls=[steer])
    assert model.calls == 7 and run.ledger.nfe(4) == 7
    assert model.graphs == [False] * 7


def test_steering_works_inside_no_grad():
    model = ProblemModel(mixture(), PATHS["flow"], "velocity")
    steer = Steer({"target": Distance(points(4))}, 1.0)
    with torch.no_grad():
        found = sample(model, points(4, 1), flow_grid(7), steer)
    assert (found - points(4)).abs().max() < 1e-12


@pytest.mark.parametrize("name", ["flow", "vp", "cosine", "sub-vp"])
def test_kappa_one_ends_at_the_reference_whatever_the_noise(name):
    path = PATHS[name]
    model = ProblemModel(mixture(), path, "velocity")
    grid = model.grid(6)
    wanted = points(4)
    noise = path.sigma(grid.times[-1]) * points(4, 1)
    steer = Steer({"target": Distance(wanted)}, 1.0)
    found = sample(model, noise, grid, steer)
    alpha, sigma = levels(path, grid.times[0], wanted)
    # At the clean end of a path that does not quite reach it, alpha x0 + sigma eps is left.
    assert ((found - alpha * wanted) / (1 + sigma)).abs().max() <= (1e-6 if sigma == 0 else 0.05)
    less = sample(model, noise, grid, Steer({"target": Distance(wanted)}, 0.3))
    assert 1e-3 < float((less - alpha * wanted).abs().mean()) < 0.5


def test_kappa_nought_is_plain_sampling():
    model = ProblemModel(mixture(), PATHS["flow"], "velocity")
    plain = sample(model, points(4), flow_grid(9), Control())
    steered = sample(model, points(4), flow_grid(9), Steer({"target": Distance(points(4))}, 0.0))
    assert torch.equal(plain, steered)


@pytest.mark.parametrize("kappa", [0.5, 1.5, 1.9, 2.1, 3.0])
@pytest.mark.parametrize("inner", [1, 4, 9])
def test_inner_loop_contracts_by_one_less_kappa(kappa, inner):
    """The factor |1 - kappa|^inner exactly: a sharp threshold at 2."""
    model = ProblemModel(mixture(), PATHS["flow"], "velocity")
    wanted, x = points(3), points(3, 1)
    run = target(model, 3)
    steer = Steer({"target": Distance(wanted)}, kappa, inner=inner)
    step = next(flow_grid(5).walk(down=True))
    before = run(x, step.t)
    after = steer.denoiser(step, run, run.layout)(x, step.t)
    gap = (before.x0 - wanted) * (1 - kappa) ** inner
    torch.testing.assert_close(after.x0 - wanted, gap, rtol=1e-10, atol=1e-12)
    assert (abs(1 - kappa) < 1) == bool((after.x0 - wanted).norm() < (before.x0 - wanted).norm())
    torch.testing.assert_close(after.velocity, before.velocity, rtol=0, atol=1e-10)


def test_both_faces_stay_consistent_and_the_state_moves():
    for name in ("flow", "vp"):
        path = PATHS[name]
        model = ProblemModel(mixture(), path, "velocity")
        run, x, t = target(model, 3), points(3), 0.6
        [step] = [s for s in flow_grid(5).walk(down=True) if s.t == 0.6]
        steer = Steer({"target": Distance(points(3, 2))}, 0.7)
        before, after = run(x, t), steer.denoiser(step, run, run.layout)(x, t)
        alpha, sigma = levels(path, t, x)
        moved = alpha * after.x0 + sigma * after.eps
        wanted = x + (alpha + sigma) * (after.x0 - before.x0)
        torch.testing.assert_close(moved, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["flow", "vp"])
def test_asking_again_is_at_the_moved_state(name):
    """By hand: ask, move, ask there, move, and the interval with the last answer."""
    path = PATHS[name]
    model = ProblemModel(mixture(), path, "velocity")
    run, wanted, x, t = target(model, 3), points(3, 2), points(3), 0.6
    [step] = [s for s in flow_grid(5).walk(down=True) if s.t == 0.6]
    found = Steer({"target": Distance(wanted)}, 0.7, again=2).denoiser(step, run, run.layout)(x, t)
    assert run.ledger.nfe(3) == 3
    total = sum(levels(path, t, x))
    for _ in range(3):
        before = run(x, t)
        move = -0.7 * (before.x0 - wanted)
        x = x + total * move
    torch.testing.assert_close(found.x0, before.x0 + move, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.velocity, before.velocity, rtol=0, atol=1e-10)


def test_asking_again_once_is_the_code_s_rectified_diffusion_step_with_a_last_move():
    """Its noise is predicted anew after the move: only the estimate's last descent is ours."""
    model = ProblemModel(mixture(), PATHS["vp"], "eps")
    run, x, t = target(model, 3), points(3), 0.6
    [step] = [s for s in flow_grid(5).walk(down=True) if s.t == 0.6]
    costs = {"target": Distance(points(3, 2))}
    found = Steer(costs, 0.4, again=1).denoiser(step, run, run.layout)(x, t)
    once = Steer(costs, 0.4).denoiser(step, run, run.layout)(x, t)
    alpha, sigma = levels(model.path, t, x)
    anew = run(alpha * once.x0 + sigma * once.eps, t)
    torch.testing.assert_close(found.velocity, anew.velocity, rtol=0, atol=1e-10)
    assert (anew.velocity - once.velocity).abs().max() > 1e-3


def test_last_steps_may_be_left_free():
    model = ProblemModel(mixture(), PATHS["flow"], "velocity")
    steer = Steer({"target": Distance(points(4))}, 1.0, free=2)
    seen = []

    class Watch(Control):
        def after_step(self, step, state, before, layout):
            seen.append(state.x)
            return state

    end = sample(model, points(4, 1), flow_grid(6), steer, Watch())
    plain = sample(model, points(4, 1), flow_grid(6), Control())
    assert (end - points(4)).abs().max() > 1e-3
    rest = walk(EULER, target(model, 4), State(seen[3]), flow_grid(6), down=True, between=(0, 2))
    assert torch.equal(rest.x, end) and not torch.equal(plain, end)


def test_only_the_named_branches_move():
    model = ProblemModel(mixture(), PATHS["flow"], "velocity")
    cond = model.embed([""] * 2)
    run = Denoiser(model, [Branch("source", cond), Branch("target", cond)])
    state = State(points(4))
    steer = Steer({"target": Distance(points(2, 3))}, 1.0)
    end = walk(EULER, run, state, flow_grid(5), down=True, controls=[steer]).x
    plain = walk(EULER, run, state, flow_grid(5), down=True).x
    torch.testing.assert_close(end[:2], plain[:2], rtol=0, atol=1e-13)
    torch.testing.assert_close(end[2:], points(2, 3), rtol=0, atol=1e-10)


# --- Step sizes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [4, 8, 16])
def test_kappa_means_the_same_at_every_size(size):
    """A loss averaged over all elements would steer the smaller picture 16 times as hard."""
    model = ProblemModel(pictures(size), PATHS["flow"], "velocity")
    truth = torch.zeros(1, 3, size, size, dtype=torch.float64)
    for operator in (Grey(), SuperResolution(2), Inpaint(torch.eye(size))):
        cost = Measurement(model, operator, operator.forward(truth + 0.3))
        run = target(model, 1)
        steer = Steer({"target": cost}, 0.4)
        step = next(flow_grid(3).walk(down=True))
        x = torch.full_like(truth, 0.1)
        before, after = run(x, step.t), steer.denoiser(step, run, run.layout)(x, step.t)
        left = cost(after.x0) / cost(before.x0)
        # Every one of these measures its whole range with one and the same gain.
        assert float(left) == pytest.approx(0.6**2, rel=5e-3)


def test_curvature_is_the_squared_norm_of_the_derivative():
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(5, 8, generator=generator, dtype=torch.float64)
    matrix = (
        torch.linalg.svd(matrix)[0]
        @ torch.diag(torch.tensor([3.0, 1.0, 0.5, 0.2, 0.1], dtype=torch.float64))
        @ torch.linalg.svd(matrix)[2][:5]
    )
    scales = torch.tensor([1.0, 2.0], dtype=torch.float64)[:, None]
    found = largest_curvature(
        lambda x: scales * (x.flatten(1) @ matrix.T) + 0.01 * x.flatten(1)[:, :5] ** 2,
        torch.zeros(2, 2, 2, 2, dtype=torch.float64),
    )
    torch.testing.assert_close(
        found.flatten(), torch.tensor([9.0, 36.0]).double(), rtol=5e-3, atol=0
    )


def test_a_cost_without_curvature_gets_steps_of_a_fixed_size():
    model = ProblemModel(pictures(4), PATHS["flow"], "velocity")

    def logits(images):
        return torch.stack([images.mean((1, 2, 3)), -images.mean((1, 2, 3))], 1)

    for scale in (1e-6, 1.0, 1e6):
        cost = Classified(model, lambda images, scale=scale: scale * logits(images), 1)
        cost = _Scaled(cost, 1.0) if scale == 1.0 else cost
        x0 = torch.zeros(2, 3, 4, 4, dtype=torch.float64)
        run = target(model, 2)
        move = Steer({"target": cost}, 0.02).descend({"target": cost}, x0, run.layout)
        rms = move.square().mean((1, 2, 3)).sqrt()
        torch.testing.assert_close(rms, torch.full_like(rms, 0.02), rtol=1e-5, atol=0)
        assert bool((move < 0).all())


class _Scaled(Distance):
    """Any function of latents is a cost."""

    curvature = None

    def __init__(self, inner, factor):
        self.inner, self.factor = inner, factor

    def __call__(self, x0):
        return self.factor * self.inner(x0)


def test_a_flat_cost_moves_nothing():
    steer = Steer({"target": _Scaled(Distance(points(2)), 0.0)}, 0.5)
    run = target(ProblemModel(mixture(), PATHS["flow"]), 2)
    move = steer.descend(steer.costs(None), points(2), run.layout)
    assert torch.equal(move, torch.zeros_like(move))


# --- Against the true gradient --------------------------------------------------------------------


@dataclass
class Straight:
    """The flow of the straight coupling of unit noise with N(m, diag(q^2)): a reflowed model.

    x_s = (1-s)(m + q z) + s z, so v = (1-q) z - m with z = (x - (1-s) m) / ((1-s) q + s).
    """

    means: Tensor
    widths: Tensor

    def predict(self, x, s):
        z = (x - (1 - s) * self.means) / ((1 - s) * self.widths + s)
        return predict("velocity", (1 - self.widths) * z - self.means, x, 1 - s, s)


@dataclass
class Curved(Straight):
    """The flow that training on independent pairs gives: E[x0 | x_s] of the same data."""

    def predict(self, x, s):
        gain = (1 - s) * self.widths**2 / ((1 - s) ** 2 * self.widths**2 + s**2)
        x0 = self.means + gain * (x - (1 - s) * self.means)
        return predict("x0", x0, x, 1 - s, s)


def cosine(model, s, cost):
    """Between the skipped gradient and the true one, averaged over states of level `s`."""
    x = (1 - s) * (model.means + model.widths * points(64)) + s * points(64, seed=1)
    leaf = x.clone().requires_grad_()
    x0 = model.predict(leaf, torch.tensor(s, dtype=torch.float64)).x0
    (true,) = torch.autograd.grad(cost(x0).sum(), leaf)
    skipped = x0.detach().requires_grad_()
    (skip,) = torch.autograd.grad(cost(skipped).sum(), skipped)
    return float(torch.cosine_similarity(skip.flatten(1), true.flatten(1)).mean())


def test_skipping_is_better_near_the_data_and_on_a_straight_flow():
    widths = torch.tensor([0.3, 1.2], dtype=torch.float64).reshape(2, 1, 1)
    means = torch.tensor([0.5, -0.2], dtype=torch.float64).reshape(2, 1, 1)
    cost, times = Distance(points(64, seed=2)), np.linspace(0.05, 0.95, 10)
    curved, straight = (
        [cosine(model(means, widths), float(s), cost) for s in times]
        for model in (Curved, Straight)
    )
    ranks = np.argsort(np.argsort(curved))
    assert np.corrcoef(ranks, -times)[0, 1] > 0.8
    assert sum(curved) < sum(straight)
    # Where skipping costs most: near the noise, where the estimate hardly depends on the state.
    assert all(c < r for c, r, s in zip(curved, straight, times, strict=True) if s > 0.5)


def test_the_full_gradient_goes_through_the_network():
    """On the flow of a Gaussian it is the skipped one times a gain, known in closed form."""
    data = gaussian()
    model = Watched(data, FlowPath(), "velocity")
    run, x, s = target(model, 3), points(3), 0.8
    cost = Distance(points(3, 1))
    steer = Steer({"target": cost}, 0.5, gradient="full")
    [step] = [k for k in flow_grid(5).walk(down=True) if abs(k.t - s) < 1e-12]
    before, after = run(x, step.t), steer.denoiser(step, run, run.layout)(x, step.t)
    q2 = data.widths[0] ** 2
    gain = (1 - s) * q2 / ((1 - s) ** 2 * q2 + s**2)
    wanted = -0.5 * gain * (before.x0 - points(3, 1))
    torch.testing.assert_close(after.x0 - before.x0, wanted, rtol=0, atol=1e-12)
    assert model.graphs[-1] and not after.x0.requires_grad
