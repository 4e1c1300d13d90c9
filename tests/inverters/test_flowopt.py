"""FlowOpt: rates, bounds and costs where they are known exactly."""

import math

import pytest
import torch

import retour
from declarations import denoiser, error, go
from problems import (
    PATHS,
    Mixture,
    ProblemModel,
    gaussian,
    mixture,
    mixture_pair,
    pictures,
    points,
)
from retour.core.branches import Branch
from retour.core.grid import flow_grid
from retour.core.model import Ledger
from retour.core.registry import get
from retour.core.state import Inversion
from retour.errors import RetourError
from retour.inverters._flowopt import (
    Sampler,
    SearchOptions,
    largest_step,
    normality,
    pair_bound,
    rms,
    search,
)
from retour.inverters.base import Job
from retour.inverters.uniinv import UniInvStep

EULER = get("solver", "euler").make()


def sampler(data, steps=16, images=1, path="flow", prompt="", scale=1.0):
    model = ProblemModel(data, PATHS[path], "velocity")
    grid = model.grid(steps)
    cond, uncond = model.embed([prompt] * images), model.embed([""] * images)
    branch = Branch("source", cond, uncond, scale)
    return Sampler(model, branch, grid, grid.steps, rule=None, ledger=Ledger())


def noise(count, like, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *like.shape, generator=generator, dtype=like.dtype)


@pytest.mark.parametrize("path", ["flow", "vp", "cosine"])
@pytest.mark.parametrize("part", [0.5, 1.0, 1.9, 2.1])
def test_affine_sampler_contracts_by_one_less_eta_a(path, part):
    """eta = part / A: the residual shrinks by |1 - part| an iteration, exactly."""
    flow = sampler(gaussian(), path=path, images=3)
    z, y = points(3), points(3, 1)
    f = flow(z)
    slope = float(((flow(z + 1.0) - f) / 1.0).mean())
    torch.testing.assert_close(flow(z - 2.0), f - 2.0 * slope, rtol=0, atol=1e-9)
    found = search(flow, z, y, SearchOptions(iterations=6, eta=part / slope), noise(1, z))
    rate = found.residuals[1:] / found.residuals[:-1]
    if part == 1.0:
        assert found.residuals[1:].max() < 1e-12 * found.residuals[0].max()
    else:
        torch.testing.assert_close(rate, torch.full_like(rate, abs(1 - part)), rtol=1e-6, atol=0)


def test_the_bound_of_an_affine_sampler_is_two_over_its_slope():
    flow, z = sampler(gaussian(), images=2), points(2)
    f = flow(z)
    slope = float((flow(z + 1.0) - f).mean())
    found = largest_step(flow, z, f, noise(2, z), 3)
    torch.testing.assert_close(found, torch.full_like(found, 2 / slope), rtol=1e-6, atol=0)


def test_rounds_find_the_steep_directions_that_chance_misses():
    """One steep dimension of 64: the bound there is a tenth of the others'."""
    slopes = torch.ones(1, 8, 8, dtype=torch.float64)
    slopes[0, 3, 3] = 10.0
    z = torch.zeros(1, 1, 8, 8, dtype=torch.float64) + torch.linspace(-1, 1, 8).double()

    def flow(x):
        return slopes * x

    chance = float(largest_step(flow, z, flow(z), noise(2, z), 1))
    sought = float(largest_step(flow, z, flow(z), noise(2, z), 4))
    assert sought == pytest.approx(0.2, rel=0.02) and chance > 3 * sought


def test_pair_bound_is_the_contraction_of_the_pair():
    """sqrt(1 - 2 eta r c + eta^2 r^2) < 1 exactly below the bound."""
    du, df = noise(1, points(5)), noise(1, points(5), 1)
    (bound,), du, df = pair_bound(du, df), du[0], df[0]
    for factor, closer in ((0.99, True), (1.01, False)):
        after = (du - (factor * bound)[:, None, None, None] * df).flatten(1).norm(dim=1)
        assert ((after < du.flatten(1).norm(dim=1)) == closer).all()


def test_a_fixed_point_never_moves():
    flow, z = sampler(mixture(), images=4), points(4)
    found = search(flow, z, flow(z), SearchOptions(iterations=5, eta=0.1), noise(1, z))
    assert torch.equal(found.z, z) and found.residuals.max() == 0


@pytest.mark.parametrize("rounding", [torch.float16, torch.bfloat16], ids=str)
def test_updates_below_the_network_s_rounding_are_kept(rounding):
    """eta (F(z) - y) of 1e-6 would vanish in latents of half precision."""
    model = ProblemModel(mixture(), PATHS["flow"], "velocity", rounding=rounding)
    grid = flow_grid(8)
    branch = Branch("source", model.embed([""] * 2), model.embed([""] * 2), 1.0)
    flow = Sampler(model, branch, grid, grid.steps, rule=None, ledger=Ledger())
    z = points(2)
    y = flow(z) - 1e-3
    found = search(flow, z, y, SearchOptions(iterations=1, eta=1e-3), noise(1, z))
    torch.testing.assert_close(z - found.z, torch.full_like(z, 1e-6), rtol=1e-6, atol=0)
    assert torch.equal((z - 1e-6).to(rounding), z.to(rounding))


def test_the_record_tells_how_typical_the_noise_is():
    """Mean square 1 and kurtosis 3 of noise, whatever its mean; kurtosis 1 of two values."""
    many = torch.randn(1, 4, 100, 100, generator=torch.Generator().manual_seed(0)).double()
    found = normality(torch.cat([many, 2 * torch.sign(many)]))
    assert found["mean_square"] == pytest.approx([1, 4], abs=0.03)
    assert found["kurtosis"] == pytest.approx([3, 1], abs=0.1)
    assert normality(many + 5)["kurtosis"] == pytest.approx(normality(many)["kurtosis"])
    inversion = get("invert", "flowopt").make(iterations=1, eta=0.1).invert(job(4))
    assert inversion.record["mean_square"] == pytest.approx(
        inversion.noise.flatten(1).square().mean(1).tolist()
    )


def job(steps, data=None, path="flow", seed=0, guidance=1.0):
    model = ProblemModel(mixture(), PATHS[path], "velocity")
    y, _ = mixture_pair("flow", 0.0, 1.0)
    y = y if data is None else data
    empty = model.embed([""] * len(y))
    generator = torch.Generator().manual_seed(seed)
    return Job(model, y, empty, empty, flow_grid(steps), guidance, generator)


def test_residuals_fall_and_end_far_below_uni_inv_alone():
    """A coarse grid, where Uni-Inv is off; the estimate's half is safe, five times it is not."""
    make = get("invert", "flowopt").make
    found = make(fraction=0.5).invert(job(4)).record
    residuals = torch.tensor(found["residuals"])
    rises = residuals[1:] / residuals[:-1].clamp_min(1e-13)
    assert rises[residuals[1:] > 1e-12].max() <= 1.01
    assert (residuals[-1] < residuals[0] / 5).all()
    wild = torch.tensor(make(fraction=5.0).invert(job(4)).record["residuals"])
    assert (wild[-1] > residuals[-1]).all() and wild[-1].max() > wild[0].max()


def test_no_iterations_are_uni_inv_and_euler():
    work = job(8)
    inversion = get("invert", "flowopt").make(iterations=0).invert(work)
    model = work.model
    top = go(UniInvStep(), denoiser(model, 4), work.latents, flow_grid(8), down=False).x
    back = go(EULER, denoiser(model, 4), top, flow_grid(8), down=True).x
    assert torch.equal(inversion.noise, top)
    torch.testing.assert_close(
        torch.tensor(inversion.record["residuals"][-1]).double(), rms(back - work.latents)
    )


@pytest.mark.parametrize(
    ("options", "evaluations"),
    [
        ({"iterations": 30, "eta": 0.01}, 321),
        ({"iterations": 0}, 21),
        ({}, 11 + 60 + 310),
        ({"strength": 0.5, "eta": 0.1, "iterations": 2}, 6 + 15),
    ],
)
def test_evaluations_are_counted(options, evaluations):
    work = job(10)
    get("invert", "flowopt").make(**options).invert(work)
    assert work.ledger.nfe(4) == evaluations


def test_declared_evaluations_hold():
    entry, work = get("invert", "flowopt"), job(10)
    entry.make().invert(work)
    assert entry.nfe == "38N+1" and work.ledger.nfe(4) == 381


def test_the_monitor_sees_every_iterate_and_stops():
    seen = []

    def monitor(iterate):
        seen.append(iterate)
        return iterate.index == 3

    work = job(6)
    inversion = get("invert", "flowopt").make(monitor=monitor, eta=0.1).invert(work)
    assert [s.index for s in seen] == [0, 1, 2, 3]
    assert torch.equal(inversion.noise, seen[-1].z)
    assert inversion.options["monitor"] is None
    torch.testing.assert_close(
        seen[-1].residual, rms(seen[-1].result - work.latents), rtol=0, atol=0
    )
    assert len(inversion.record["residuals"]) == 5  # four seen, and that of the way kept


def test_the_monitor_may_stop_single_images():
    def first_only(iterate):
        return torch.tensor([True, False, False, False])

    stopped = get("invert", "flowopt").make(monitor=first_only, eta=0.1, iterations=4)
    free = get("invert", "flowopt").make(eta=0.1, iterations=4)
    start = get("invert", "flowopt").make(iterations=0)
    a, b, c = (m.invert(job(6)).noise for m in (stopped, free, start))
    assert torch.equal(a[0], c[0]) and torch.equal(a[1:], b[1:])


def test_a_good_image_rests_while_others_go_on():
    make = get("invert", "flowopt").make
    free = make(eta=0.1, iterations=9).invert(job(4)).record["residuals"]
    found = make(eta=0.1, iterations=9, tolerance=free[4][0]).invert(job(4)).record["residuals"]
    assert [r[0] for r in found[4:]] == [free[4][0]] * 6
    assert found[-1][1] < found[4][1]


def test_coming_back_returns_the_data_closer_than_uni_inv():
    y, _ = mixture_pair("flow", 0.0, 1.0)
    gaps = {}
    for name in ("uniinv", "flowopt"):
        method = get("invert", name).make()
        inversion = method.invert(job(5))
        assert torch.equal(inversion.latents, y) and inversion.states["x"].shape[0] == 6
        back = method.replay(inversion)
        model = ProblemModel(mixture(), PATHS["flow"], "velocity")
        end = go(back.solver, denoiser(model, 4), back.state, inversion.grid, down=True)
        gaps[name] = error(end.x, y)
    assert gaps["flowopt"] < gaps["uniinv"] / 5


def test_it_can_be_saved(tmp_path):
    model = ProblemModel(pictures(8), PATHS["flow"], "velocity")
    options = {"method": "flowopt", "steps": 3, "iterations": 2, "monitor": lambda i: None}
    inversion = retour.invert(model, torch.full((3, 8, 8), 0.5), "red", **options)
    inversion.save(tmp_path / "a.safetensors")
    loaded = Inversion.load(tmp_path / "a.safetensors", model)
    assert torch.equal(loaded.noise, inversion.noise)
    assert len(loaded.record["eta"]) == 1 and len(loaded.record["residuals"]) == 3


def test_where_no_step_converges_it_says_so_and_stays():
    def flow(x):
        return -x

    z = points(2)
    with pytest.warns(UserWarning, match="no step size makes FlowOpt converge for 2 of 2"):
        found = search(flow, z, points(2, 1), SearchOptions(iterations=3), noise(2, z))
    assert torch.equal(found.z, z) and not found.eta.any()


def test_monotone_but_unbounded_slopes_have_no_step_for_all():
    """The cubic of a review: c = 1 everywhere, yet no step suits all points."""

    def flow(x):
        return x**3

    z = torch.full((1, 1, 1, 1), 3.0).double()
    local = float(largest_step(flow, z, flow(z), noise(2, z), 2))
    far = 100 * z
    assert float(largest_step(flow, far, flow(far), noise(2, far), 2)) < local / 1e3
    gap = search(flow, far, z * 0, SearchOptions(iterations=3, eta=local), noise(1, z)).residuals
    assert float(gap[-1]) > float(gap[0])  # no global convergence is claimed


def test_wide_and_narrow_dimensions_set_the_bound_together():
    """eta_max is 2 / A of the widest component's slope, whatever the others are."""
    means = torch.zeros(1, 1, 1, 1).double()
    bounds = [
        float(
            largest_step(flow := sampler(Mixture(("a",), (1.0,), means, (q,)), 64), z := points(1),
                         flow(z), noise(2, z), 3)
        )
        for q in (0.25, 0.5, 1.0)
    ]  # fmt: skip
    for q, bound in zip((0.25, 0.5, 1.0), bounds, strict=True):
        assert bound == pytest.approx(2 / q, rel=0.1)  # F(z) = m + q z in the limit


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"iterations": -1}, "iterations is -1"),
        ({"eta": math.nan}, "eta is nan"),
        ({"fraction": -0.5}, "fraction is -0.5"),
        ({"probes": 0}, "probes is 0"),
        ({"rounds": 0}, "rounds is 0"),
        ({"tolerance": -1.0}, "tolerance is -1"),
        ({"monitor": "print"}, "'monitor' of 'flowopt'"),
    ],
)
def test_options_are_checked(options, says):
    with pytest.raises(RetourError, match=says):
        get("invert", "flowopt").make(**options)
