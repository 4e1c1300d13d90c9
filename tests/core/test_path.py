import math

import pytest
import torch

from problems import PATHS, exact_flow, gaussian, points, stable_diffusion_path
from retour.core.path import (
    DiscreteVP,
    Path,
    betas,
    express,
    from_ode_velocity,
    levels,
    ode_velocity,
    predict,
)

KINDS = ("eps", "x0", "v", "velocity", "score")
# Interior times as fractions of the way from clean to noisy.
INSIDE = (0.05, 0.3, 0.5, 0.77, 0.95)
paths = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)


def times(path: Path):
    return [path.t_clean + f * (path.t_noise - path.t_clean) for f in INSIDE]


@paths
@pytest.mark.parametrize("kind", KINDS)
def test_conversions_round_trip(path, kind):
    x, value = points(seed=1), points(seed=2)
    for t in times(path):
        alpha, sigma = levels(path, t, x)
        prediction = predict(kind, value, x, alpha, sigma)
        assert torch.allclose(express(kind, prediction, alpha, sigma), value, rtol=0, atol=1e-12)
        # Both faces explain the same latents, to rounding of the larger of the two.
        size = float((alpha * prediction.x0).abs().max() + (sigma * prediction.eps).abs().max())
        both = alpha * prediction.x0 + sigma * prediction.eps
        assert float((both - x).abs().max()) < 1e-14 * (1 + size)


@paths
def test_every_kind_says_the_same(path):
    x, data = points(), gaussian()
    logs = data.log_weights().expand(len(x), -1)
    for t in times(path):
        alpha, sigma = levels(path, t, x)
        exact = data.predict(x, alpha, sigma, logs)
        for kind in KINDS:
            again = predict(kind, express(kind, exact, alpha, sigma), x, alpha, sigma)
            # Dividing by alpha or sigma magnifies rounding by their inverse.
            room = 1e-13 * (1 + 1 / float(alpha) + 1 / float(sigma))
            assert float((again.x0 - exact.x0).abs().max()) < room
            assert float((again.eps - exact.eps).abs().max()) < room


@pytest.mark.parametrize("function", [predict, express])
def test_unknown_kind(function):
    x, one = points(), torch.ones(())
    arguments = (x, x, one, one) if function is predict else (predict("eps", x, x, one, one),)
    with pytest.raises(ValueError, match="use eps, x0, v"):
        function("noise", *arguments, *(() if function is predict else (one, one)))


@paths
def test_time_inverts_lambda_and_flow_time(path):
    span = path.t_noise - path.t_clean
    for t in times(path):
        assert abs(float(path.time(path.lam(t))) - t) < 1e-12 * span
        assert abs(float(path.from_flow_time(path.flow_time(t))) - t) < 1e-12 * span


@paths
def test_time_reaches_exactly_clean_data(path):
    assert float(path.sigma(path.t_clean)) == 0
    assert float(path.alpha(path.t_clean)) == 1
    assert math.isinf(float(path.lam(path.t_clean)))
    assert float(path.time(math.inf)) == path.t_clean
    assert float(path.from_flow_time(0.0)) == path.t_clean


@paths
def test_lambda_falls_with_time(path):
    lams = path.lam(torch.tensor(times(path), dtype=torch.float64))
    assert bool((lams[1:] < lams[:-1]).all())


@pytest.mark.parametrize("name", ["vp", "cosine", "discrete"])
def test_variance_preserving(name):
    path = PATHS[name]
    for t in times(path):
        assert float(path.alpha(t) ** 2 + path.sigma(t) ** 2) == pytest.approx(1, abs=1e-14)


def test_sub_vp_sigma_is_the_square_of_vp_s():
    t = torch.tensor(INSIDE, dtype=torch.float64)
    assert torch.allclose(PATHS["sub-vp"].sigma(t), PATHS["vp"].sigma(t) ** 2, atol=1e-15)


def test_vp_from_its_own_differential_equation():
    """d log alpha / dt = -beta(t) / 2 with beta linear from 0.1 to 20."""
    for t in INSIDE:
        alpha_rate, _ = PATHS["vp"].rates(t)
        beta = 0.1 + t * (20 - 0.1)
        assert float(alpha_rate / PATHS["vp"].alpha(t)) == pytest.approx(-beta / 2, rel=1e-13)


@paths
def test_ode_velocity_is_the_slope_of_the_exact_flow(path):
    data, x = gaussian(), points()
    logs = data.log_weights().expand(len(x), -1)
    # Half levels: the discrete table is piecewise, and smooth within a piece.
    step = 1e-5 * (path.t_noise - path.t_clean) / (10 if path.name == "ve" else 1)
    for t in times(path):
        t = math.floor(t) + 0.5 if isinstance(path, DiscreteVP) else t
        found = ode_velocity(path, data.predict(x, *levels(path, t, x), logs), t)
        ahead, behind = (exact_flow(data, path, x, t, t + d) for d in (step, -step))
        slope = (ahead - behind) / (2 * step)
        assert float((found - slope).abs().max()) < 1e-8 * (1 + float(slope.abs().max()))


def test_rates_hold_at_trained_levels():
    """The table's values are exact there; the slope is that of the interval above."""
    path = stable_diffusion_path()
    at, just_above = path.rates(500.0), path.rates(500.0 + 1e-9)
    for a, b in zip(at, just_above, strict=True):
        assert float(a) == pytest.approx(float(b), rel=1e-6)


@paths
def test_ode_velocity_inverts(path):
    x, value = points(seed=1), points(seed=2)
    for t in times(path):
        again = ode_velocity(path, from_ode_velocity(path, value, x, t), t)
        assert torch.allclose(again, value, rtol=0, atol=1e-11)


@paths
def test_exact_flow_has_the_semigroup_property(path):
    a, b, c = times(path)[1:4]
    x, data = points(), gaussian()
    twice = exact_flow(data, path, exact_flow(data, path, x, c, b), b, a)
    assert torch.allclose(twice, exact_flow(data, path, x, c, a), rtol=1e-12, atol=1e-12)


@paths
def test_add_noise(path):
    x0, noise, t = points(seed=1).float(), points(seed=2).float(), times(path)[2]
    x = path.add_noise(x0, noise, t)
    assert x.dtype == torch.float32
    assert torch.allclose(x, float(path.alpha(t)) * x0 + float(path.sigma(t)) * noise)


def test_levels_first_asked_for_without_gradients_can_be_differentiated_through_later():
    path, x = stable_diffusion_path(), points().requires_grad_()
    with torch.inference_mode():
        levels(path, 123.0, points())
    alpha, _ = levels(path, 123.0, x)
    (alpha * x).sum().backward()
    assert torch.equal(x.grad, alpha.expand_as(x))


@paths
def test_vector_times(path):
    t = torch.tensor(times(path)[:4], dtype=torch.float64)
    alpha, sigma = levels(path, t, points())
    assert alpha.shape == sigma.shape == (4, 1, 1, 1)
    assert [float(a) for a in alpha] == [float(path.alpha(v)) for v in t]


# --- the discrete table -------------------------------------------------------------------------


def test_discrete_levels_are_the_table_s():
    path = stable_diffusion_path()
    t = torch.arange(1000, dtype=torch.float64)
    assert torch.equal(path.alpha(t), path.abar.sqrt())
    assert torch.equal(path.sigma(t), (1 - path.abar).sqrt())
    assert float((path.time(path.lam(t)) - t).abs().max()) < 1e-9


def test_discrete_minus_one_is_clean():
    path = stable_diffusion_path()
    assert (float(path.alpha(-1)), float(path.sigma(-1))) == (1.0, 0.0)
    half = float(path.alpha(-0.5)) ** 2
    assert half == pytest.approx((1 + float(path.abar[0])) / 2, abs=1e-15)
    assert float(path.time(path.lam(-0.5))) == pytest.approx(-0.5, abs=1e-9)


def test_discrete_fractions_interpolate_lambda():
    path = stable_diffusion_path()
    for t in (0.25, 10.5, 998.75):
        low, part = math.floor(t), t - math.floor(t)
        lam = (1 - part) * float(path.lam(low)) + part * float(path.lam(low + 1))
        assert float(path.lam(t)) == pytest.approx(lam, abs=1e-12)


@pytest.mark.parametrize("table", [[0.9], [0.5, 0.9], [0.9, 0.9], [[0.9, 0.5]]])
def test_discrete_table_is_checked(table):
    with pytest.raises(ValueError, match="decreasing"):
        DiscreteVP(table)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear"])
def test_betas_equal_diffusers(schedule):
    from diffusers import DDPMScheduler

    theirs = DDPMScheduler(1000, 0.00085, 0.012, beta_schedule=schedule).betas
    ours = betas(schedule, 0.00085, 0.012, 1000)
    assert ours.dtype == torch.float64
    assert torch.allclose(ours.float(), theirs, rtol=1e-6)


def test_unknown_betas():
    with pytest.raises(ValueError, match="'cosinus'"):
        betas("cosinus", 0.1, 0.2, 10)
