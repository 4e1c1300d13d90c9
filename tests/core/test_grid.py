import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from problems import PATHS
from retour.core.grid import (
    Grid,
    check_steps,
    discrete_grid,
    flow_grid,
    lambda_grid,
    shift,
)
from retour.errors import RetourError

COUNTS = (1, 2, 4, 7, 10, 20, 30, 50, 99, 250, 999, 1000)


@pytest.mark.parametrize("steps", COUNTS)
@pytest.mark.parametrize("to_one", [True, False])
@pytest.mark.parametrize(
    "spacing, offset", [("leading", 0), ("leading", 1), ("trailing", 0), ("linspace", 0)]
)
def test_discrete_grid_equals_diffusers(steps, to_one, spacing, offset):
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        timestep_spacing=spacing, steps_offset=offset, set_alpha_to_one=to_one
    )
    scheduler.set_timesteps(steps)
    theirs = [int(t) for t in scheduler.timesteps.flip(0)]
    final = -1.0 if to_one else 0.0
    grid = discrete_grid(steps, 1000, spacing=spacing, offset=offset, final=final)
    if steps > 1:
        if steps == 1000:
            theirs = list(range(1000))  # with an offset the scheduler asks for level 1000: no such
        # A step of the scheduler from level 0 to itself is no step.
        theirs = [t for t in theirs if final < t]
        assert list(grid.times) == [final, *theirs]
    else:
        assert list(grid.times[1:]) == theirs
    assert max(grid.times) <= 999


def test_unknown_spacing():
    with pytest.raises(RetourError, match="'even'.*leading, trailing or linspace"):
        discrete_grid(10, 1000, spacing="even")


@pytest.mark.parametrize("factor", [1.0, 3.0, 1.9])
@pytest.mark.parametrize("steps", [1, 4, 28])
def test_flow_grid_equals_diffusers(steps, factor):
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=factor)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist())
    assert flow_grid(steps, factor).times == pytest.approx(
        scheduler.sigmas.flip(0).tolist(), abs=1e-6
    )


@pytest.mark.parametrize("factor", [0.2, 3.0])
def test_shift_keeps_the_ends(factor):
    assert (shift(0.0, factor), shift(1.0, factor)) == (0.0, 1.0)


def test_lambda_grid_is_uniform_in_lambda():
    path = PATHS["vp"]
    grid = lambda_grid(path, 12, 1e-3, 1.0)
    lams = torch.tensor([float(path.lam(t)) for t in grid.times])
    assert (grid.times[0], grid.times[-1]) == (1e-3, 1.0)
    assert float(lams.diff().std()) < 1e-6 * float(lams.diff().abs().mean())


@given(st.integers(1, 30))
def test_both_directions_cross_the_same_intervals(steps):
    grid = flow_grid(steps)
    down, up = list(grid.walk(down=True)), list(grid.walk(down=False))
    assert [s.index for s in down] == [s.index for s in up][::-1]
    assert [s.position for s in down] == list(range(steps))
    assert [s.passed for s in down] == [k / steps for k in range(steps)]
    for a, b in zip(down, reversed(up), strict=True):
        assert (a.t, a.s) == (b.s, b.t)
        assert (a.noisy, a.clean, a.position) == (b.noisy, b.clean, b.position)
        assert (a.departure, a.arrival) == (b.arrival, b.departure)
    for step in down + up:
        assert (grid.times[step.departure], grid.times[step.arrival]) == (step.t, step.s)
    assert (up[0].t, up[-1].s) == (grid.times[0], grid.times[-1])
    assert all(a.s == b.t for a, b in zip(up, up[1:], strict=False))


@pytest.mark.parametrize(
    "steps, strength, kept",
    [(50, 0.8, 40), (50, 1, 50), (10, 0.29, 2), (10, 0.3, 3), (10, 0.01, 1)],
)
def test_truncate(steps, strength, kept):
    grid = flow_grid(steps)
    cut = grid.truncate(strength)
    assert cut.steps == kept
    assert cut.times == grid.times[: kept + 1]


@pytest.mark.parametrize("strength", [0, -1, 1.01, float("nan")])
def test_truncate_refuses(strength):
    with pytest.raises(RetourError, match="strength must be above 0"):
        flow_grid(4).truncate(strength)


@pytest.mark.parametrize(
    "times", [(), (1.0,), (0.0, 0.0), (1.0, 0.0), (0.0, float("nan")), (0.0, float("inf"))]
)
def test_grid_refuses(times):
    with pytest.raises(RetourError, match="increasing"):
        Grid(times)


@pytest.mark.parametrize("steps", [0, -3, 2.5, "10", True, None])
def test_steps_are_whole_numbers(steps):
    with pytest.raises(RetourError, match="steps must be a whole number"):
        check_steps(steps)


def test_steps_have_a_limit():
    assert check_steps(1000, 1000) == 1000
    with pytest.raises(RetourError, match="at most the model's 1000"):
        check_steps(1001, 1000)
