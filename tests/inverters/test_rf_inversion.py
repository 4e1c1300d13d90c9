"""RF-Inversion: where its pulls end, what they equal when they are off, its stochastic forms."""

from dataclasses import asdict

import pytest
import torch

from declarations import error, relative
from problems import PATHS, ProblemModel, exact_flow, gaussian, mixture, points
from retour.core.branches import Branch, Denoiser
from retour.core.grid import flow_grid
from retour.core.loop import walk
from retour.core.registry import get
from retour.core.state import Inversion, State
from retour.errors import RetourError
from retour.inverters.base import Job

FLOW = ProblemModel(mixture(), PATHS["flow"], "velocity")
DATA = 0.4 * points(4, seed=3) + 0.2
METHODS = ["rf-inversion", "otip"]


def job(model=FLOW, data=DATA, grid=None, seed=0, prompt="red"):
    count = len(data)
    return Job(
        model,
        data,
        model.embed([prompt] * count),
        model.embed([""] * count),
        flow_grid(28) if grid is None else grid,
        1.0,
        torch.Generator().manual_seed(seed),
    )


def invert(name="rf-inversion", work=None, **options) -> Inversion:
    work = job() if work is None else work
    return get("invert", name).make(**options).invert(work)


def back(inversion: Inversion, prompt="", noise=None):
    """The end of the way back under one prompt for all images."""
    model = inversion.model
    method = get("invert", inversion.method).make(**inversion.options)
    replay = method.replay(inversion)
    count = inversion.images
    target = Branch("target", model.embed([prompt] * count), model.embed([""] * count), 1.0)
    state = replay.state if noise is None else State(noise)
    denoise = Denoiser(model, [target])
    controls = [replay.control]
    return walk(replay.solver, denoise, state, inversion.grid, down=True, controls=controls).x


def euler(x, prompt, *, down, grid=None, model=FLOW):
    denoise = Denoiser(model, [Branch("target", model.embed([prompt] * len(x)))])
    solver = get("solver", "euler").make()
    return walk(solver, denoise, State(x), flow_grid(28) if grid is None else grid, down=down).x


def seeded_noise(seed=0, data=DATA):
    return job(data=data, seed=seed).noise(1)[0]


# --- The ordinary form ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("grid", [flow_grid(7), flow_grid(28, 3.15)], ids=["even", "shifted"])
def test_full_pull_returns_the_picture_from_any_noise(name, grid):
    inversion = invert(name, job(grid=grid), eta=1.0, stop=1.0)
    for noise in (None, 3 * points(4, seed=8)):
        assert relative(back(inversion, "blue", noise), DATA) < 1e-12


@pytest.mark.parametrize("grid", [flow_grid(7), flow_grid(28, 3.15)], ids=["even", "shifted"])
def test_full_gamma_ends_in_the_noise_itself(grid):
    inversion = invert(work=job(grid=grid), gamma=1.0)
    assert relative(inversion.noise, seeded_noise()) < 1e-12


def test_without_pulls_it_is_plain_euler_bit_for_bit():
    inversion = invert(gamma=0.0, eta=0.0)
    up = euler(DATA, "", down=False)
    assert torch.equal(inversion.noise, up)
    assert torch.equal(back(inversion, "green"), euler(up, "green", down=True))


def test_the_formulas_by_hand():
    """The paper's Euler steps in its own clocks, t = s up and 1 - s down, and its own signs."""
    gamma, eta, n = 0.5, 0.9, 28
    grid, y1 = flow_grid(n, 2.0), seeded_noise()
    null = Denoiser(FLOW, [Branch("target", FLOW.embed([""] * 4))])
    target = Denoiser(FLOW, [Branch("target", FLOW.embed(["green"] * 4))])
    y = DATA
    for a, b in zip(grid.times, grid.times[1:], strict=False):
        u = null(y, a).velocity
        y = y + (b - a) * (u + gamma * ((y1 - y) / (1 - a) - u))
    inversion = invert(work=job(grid=grid))
    assert relative(inversion.noise, y) < 1e-13
    sampling = grid.times[::-1]
    for i, (a, b) in enumerate(zip(sampling, sampling[1:], strict=False)):
        w = -target(y, a).velocity
        pull = eta if i < 7 else 0.0
        y = y + (a - b) * (w + pull * ((DATA - y) / a - w))
    assert relative(back(inversion, "green"), y) < 1e-12


@pytest.mark.parametrize("shift", [1.0, 3.15])
def test_three_clocks_of_the_popular_port_miss_the_noise_and_ours_does_not(shift):
    """Its times are i/(N+1) of N+1 levels, its steps those of the way down, in that order."""
    n, y1, y = 28, seeded_noise(), DATA
    levels = flow_grid(n, shift).times[::-1]
    null = Denoiser(FLOW, [Branch("target", FLOW.embed([""] * 4))])
    for i in range(n):
        t = i / (n + 1)
        u = null(y, t).velocity
        y = y + (levels[i] - levels[i + 1]) * (u + ((y1 - y) / (1 - t) - u))
    assert error(y, y1) > 1e-3
    ours = invert(work=job(grid=flow_grid(n, shift)), gamma=1.0).noise
    assert error(ours, y1) < 1e-12


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.9] * 7 + [0.0] * 21),
        ({"start": 0.1, "stop": 0.27}, [0.0] * 2 + [0.9] * 5 + [0.0] * 21),
        ({"stop": 1.0, "decay": 1.0}, [0.9 * (1 - i / 28) for i in range(28)]),
        ({"stop": 3 / 28}, [0.9] * 3 + [0.0] * 25),
    ],
)
def test_schedule(options, expected):
    """Fractions of the steps, truncated, whatever rounding makes of 3/28 of 28."""
    made = get("invert", "rf-inversion").make(**options).options
    assert [made.pull(i, 28) for i in range(28)] == pytest.approx(expected)


def test_more_pull_reconstructs_better():
    errors = [error(back(invert(eta=eta, stop=1.0)), DATA) for eta in (0.0, 0.3, 0.6, 0.9)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < errors[0] / 2


def test_gamma_moves_the_latents_to_typical_noise():
    """On data narrower than its prior, whose plain inversion is too small."""
    model = ProblemModel(gaussian(), PATHS["flow"], "velocity")
    data = gaussian().means + 0.1 * points(2000, seed=1)
    noise = torch.randn(data.shape, generator=torch.Generator().manual_seed(5)).double()
    gaps, spreads = [], []
    for gamma in (0.0, 0.25, 0.5, 0.75, 1.0):
        work = job(model, data, seed=0)
        work.noise = lambda count: noise[None]  # one for each, for the statistics' sake
        top = invert(work=work, gamma=gamma).noise
        gaps.append(float((top - noise).square().mean().sqrt()))
        spreads.append(abs(float(top.std()) - 1) + abs(float(top.mean())))
    assert gaps == sorted(gaps, reverse=True) and gaps[-1] < 1e-12
    assert spreads == sorted(spreads, reverse=True) and spreads[-1] < 0.05


def test_gamma_moves_the_latents_to_a_bell_curve():
    """Data of two points, which a Gaussian model's flow leaves two points: kurtosis 1, not 3."""
    model = ProblemModel(gaussian(), PATHS["flow"], "velocity")
    signs = torch.sign(points(4000, seed=1))
    noise = torch.randn(signs.shape, generator=torch.Generator().manual_seed(5)).double()
    found = []
    for gamma in (0.0, 0.1, 0.2, 0.3, 1.0):
        work = job(model, gaussian().means + 0.5 * signs, seed=0)
        work.noise = lambda count: noise[None]
        top = invert(work=work, gamma=gamma).noise
        z = (top - top.mean(0)) / top.std(0)
        found.append(float((z**4).mean()))
    assert found[:4] == sorted(found[:4]) and found[0] < 1.1 and found[3] > 2
    assert abs(found[-1] - 3) < 4 * (24 / noise.numel()) ** 0.5  # standard error of a kurtosis


def test_a_shorter_grid_drops_the_noisiest_steps_and_counts_its_own():
    inversion = invert(strength=0.5, eta=1.0, stop=1.0)
    assert inversion.grid.times == flow_grid(28).times[:15]
    assert relative(back(inversion, "blue"), DATA) < 1e-12
    half = invert(strength=0.5, gamma=0.0, eta=0.0)
    assert torch.equal(half.noise, euler(DATA, "", down=False, grid=half.grid))


def test_defaults_are_the_published_ones():
    """Those of the released pipeline; a distilled model is told 0 on the way up."""
    made = get("invert", "rf-inversion").make().options
    assert (made.gamma, made.eta, made.start, made.stop) == (0.5, 0.9, 0.0, 0.25)
    assert (made.decay, made.prompt, made.form, made.strength) == (None, "null", "ode", 1.0)
    assert made.inversion_embedded == 0.0


def test_the_way_up_is_told_nothing_by_default():
    assert torch.equal(invert(gamma=0.3).noise, invert(work=job(prompt="blue"), gamma=0.3).noise)
    told = [invert(work=job(prompt=p), gamma=0.3, prompt="source").noise for p in ("red", "blue")]
    assert not torch.equal(*told)


def test_the_seed_decides_the_noise():
    assert torch.equal(invert().noise, invert().noise)
    assert not torch.equal(invert().noise, invert(work=job(seed=1)).noise)


@pytest.mark.parametrize("path", ["vp", "discrete", "cosine"])
def test_other_paths_end_where_they_began(path):
    model = ProblemModel(mixture(), PATHS[path], "eps")
    work = job(model, DATA, model.grid(9))
    inversion = invert(work=work, eta=1.0, stop=1.0)
    assert relative(back(inversion, "blue"), DATA) < 1e-9


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"gamma": 1.5}, "gamma is 1.5"),
        ({"eta": -0.1}, "eta is -0.1"),
        ({"start": 0.5, "stop": 0.2}, "start must not be after stop"),
        ({"form": "sdf"}, "sde"),
    ],
)
def test_bad_options(options, says):
    with pytest.raises(RetourError, match=says):
        get("invert", "rf-inversion").make(**options)


# --- The stochastic forms -------------------------------------------------------------------------

MANY, FINE = 20_000, 200


def crowd(form, eta, *, seed=0, count=MANY, steps=FINE):
    """Samples of the way back of a one-dimensional Gaussian, N(1.5, 0.6^2), each with own noise."""
    data = type(gaussian())(("thing",), (1.0,), torch.full((1, 1, 1, 1), 1.5).double(), (0.6,))
    model = ProblemModel(data, PATHS["flow"], "velocity")
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(steps + 1, count, 1, 1, 1, generator=generator, dtype=torch.float64)
    start = torch.full((count, 1, 1, 1), 0.7).double()
    grid = flow_grid(steps)
    method = get("invert", "rf-inversion").make(form=form, eta=eta, stop=1.0)
    condition = model.embed([""] * count)
    states = {"x": torch.stack([start, *[noise[0]] * steps])}
    options = asdict(method.options)
    args = ("rf-inversion", options, "problem", "", grid, states, condition, condition)
    return back(Inversion(*args, extras={"noise": noise[1:]}, model=model))


@pytest.mark.parametrize("form", ["sde", "sde-code"])
def test_the_stochastic_way_back_by_hand(form):
    """Theorem 3.5 and the code, in their own clock t' = 1 - s; the ends by the ODE."""
    eta, n, count = 0.6, 6, 3
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(n, count, 2, 1, 1, generator=generator, dtype=torch.float64)
    work = job(data=DATA[:count], grid=flow_grid(n))
    draws = {1: seeded_noise()[:1].expand(1, count, -1, -1, -1), n: noise}
    work.noise = lambda amount: draws[amount]
    inversion = invert(work=work, form=form, eta=eta, stop=1.0)
    target = Denoiser(FLOW, [Branch("target", FLOW.embed(["green"] * count))])
    x, times = inversion.noise, flow_grid(n).times[::-1]
    for i, (s, after) in enumerate(zip(times, times[1:], strict=False)):
        h, clock = s - after, 1 - s
        w = -target(x, s).velocity
        drift = pulled = w + eta * ((DATA[:count] - x) / s - w)
        spread = 0.0
        if 0 < i < n - 1:
            share = 1 - eta if form == "sde" else 1.0
            drift = pulled + share * (w - x / clock) if form == "sde" else 2 * pulled - x / clock
            spread = (2 * share * s / clock * h) ** 0.5
        x = x + h * drift + spread * noise[n - 1 - i]
    assert relative(back(inversion, "green"), x) < 1e-12


@pytest.mark.parametrize("form", ["sde", "sde-code"])
def test_without_pull_the_stochastic_way_back_samples_the_data(form):
    """Mean and spread within one percent, which is three standard errors or more here."""
    found = crowd(form, 0.0)
    assert abs(float(found.mean()) - 1.5) < 0.015
    assert abs(float(found.std()) - 0.6) < 0.01 * 0.6 + 3 * 0.6 / (2 * MANY) ** 0.5
    assert not torch.equal(found, crowd(form, 0.0, seed=1))


def test_the_forms_agree_without_pull_and_differ_with_it():
    plain = [crowd(form, 0.0, count=50) for form in ("sde", "sde-code")]
    assert relative(*plain) < 1e-12
    with_pull = [crowd(form, 0.5, count=50) for form in ("sde", "sde-code", "ode")]
    assert error(with_pull[0], with_pull[1]) > 1e-2 and error(with_pull[0], with_pull[2]) > 1e-2


def test_full_pull_of_the_theorem_is_free_of_noise_and_ends_in_the_picture():
    for seed in (0, 1):
        assert relative(crowd("sde", 1.0, seed=seed, count=20), torch.full((1,), 0.7)) < 1e-12


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_the_stochastic_way_up_has_the_law_that_theory_gives_it(gamma):
    """Y_1 = gamma y1 + sqrt(1 - gamma) z, and at gamma 0 the forward kernel at every level."""
    count = 5000
    work = job(data=torch.full((count, 1, 1, 1), 0.7).double(), grid=flow_grid(10))
    shape = (count, 1, 1, 1)
    noise = lambda n: torch.randn(n, *shape, generator=work.generator, dtype=torch.float64)  # noqa: E731
    goal = torch.full(shape, 0.5).double()
    work.noise = lambda n: goal[None] if n == 1 else noise(n)
    inversion = invert(work=work, form="sde", gamma=gamma)
    top, slack = inversion.noise, 5 / count**0.5
    assert abs(float(top.mean()) - 0.5 * gamma) < slack
    assert abs(float(top.std()) - (1 - gamma) ** 0.5) < slack
    middle = inversion.states["x"][5]
    assert abs(float(middle.mean()) - (0.5 * 0.7 + 0.5 * 0.5 * gamma)) < slack
    assert abs(float(middle.std()) - 0.5 * (1 - gamma) ** 0.5) < slack


def test_the_stochastic_way_up_asks_nothing():
    work = job()
    invert(work=work, form="sde")
    assert work.ledger.rows == 0
    work = job()
    invert(work=work)
    assert work.ledger.nfe(4) == 28


def test_gaussian_flow_is_the_limit_without_pulls():
    model = ProblemModel(gaussian(), PATHS["flow"], "velocity")
    goal = exact_flow(gaussian(), PATHS["flow"], DATA, 0.0, 1.0)
    found = invert(work=job(model, grid=flow_grid(512)), gamma=0.0).noise
    assert error(found, goal) < 5e-3
