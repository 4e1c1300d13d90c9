"""What the card of the flow's solvers proves beyond their declared orders."""

import pytest
import torch

from declarations import denoiser, error, go, relative, round_trip, slope
from problems import PATHS, ProblemModel, gaussian, mixture, mixture_pair, points
from retour.core.grid import flow_grid
from retour.core.registry import get

MODEL = ProblemModel(mixture(), PATHS["flow"], "velocity")
CLEAN, NOISY = mixture_pair("flow", 0.0, 1.0)


def generated(name, steps, **options):
    solver = get("solver", name).make(**options)
    return go(solver, denoiser(MODEL, len(NOISY)), NOISY, flow_grid(steps), down=True).x


def fixed_probe(steps, probe=0.01):
    """The RF-Solver paper's step to the letter: the probe reaches beyond short intervals."""
    denoise, z = denoiser(MODEL, len(NOISY)), NOISY
    for step in flow_grid(steps).walk(down=True):
        h = step.s - step.t
        k = denoise(z, step.t).velocity
        # Beyond the clean end there is no network to ask.
        reach = -min(probe, step.t)
        d = (denoise(z + reach * k, step.t + reach).velocity - k) / reach
        z = z + h * k + h**2 / 2 * d
    return z


def test_the_paper_s_probe_is_second_order_and_to_the_letter_falls_to_first():
    """D = 0.01 errs by O(D) in the derivative once steps are shorter; ours shrinks with them."""
    coarse, fine = (16, 32, 64), (128, 256, 512)
    ours = {n: error(generated("midpoint", n, probe=0.01), CLEAN) for n in (*coarse, *fine)}
    letter = {n: error(fixed_probe(n), CLEAN) for n in (*coarse, *fine)}
    assert abs(slope(coarse, [letter[n] for n in coarse]) - 2) < 0.3
    assert slope(fine, [letter[n] for n in fine]) < 1.5
    for steps in (coarse, fine):
        assert abs(slope(steps, [ours[n] for n in steps]) - 2) < 0.3


def test_the_probe_tends_to_the_code_s_as_it_tends_to_half_a_step():
    wanted = generated("midpoint", 10)
    gaps = [relative(generated("midpoint", 10, probe=p), wanted) for p in (0.03, 0.04, 0.045)]
    assert gaps == sorted(gaps, reverse=True)
    # Linear in the distance to 0.05.
    assert gaps[0] / gaps[2] == pytest.approx(4, rel=0.15)


def test_euler_s_round_trip_gains_no_order():
    """Theirs is first order, where the symmetric errors of second-order rules cancel."""
    steps, solver = (32, 64, 128), get("solver", "euler").make()
    denoise = denoiser(MODEL, len(CLEAN))
    trips = [round_trip(solver, denoise, CLEAN, flow_grid(n)) for n in steps]
    assert abs(slope(steps, trips) - 1) < 0.15


@pytest.mark.parametrize("name", ["midpoint", "heun", "fireflow"])
def test_at_32_evaluations_second_order_beats_euler_tenfold(name):
    steps = 32 // get("solver", name).facts["nfe_per_step"]
    assert error(generated(name, steps), CLEAN) < error(generated("euler", 32), CLEAN) / 10


def test_64_midpoint_steps_standardise_a_gaussian():
    """(x0 - m) / q within 1e-3; over many samples of mean 0 and spread 1."""
    data = gaussian()
    model = ProblemModel(data, PATHS["flow"], "velocity")
    z = points(4000, seed=2)
    x = data.means + data.widths[0] * z
    solver = get("solver", "midpoint").make()
    found = go(solver, denoiser(model, len(x)), x, flow_grid(64), down=False).x
    assert (found - z).abs().max() < 1e-3 * z.abs().max()
    slack = 4 / z.numel() ** 0.5
    assert abs(float(found.mean())) < slack and abs(float(found.std()) - 1) < slack


def test_single_precision_is_what_bounds_equal_rules():
    """RF-Solver's formula and the midpoint's agree to the rounding of their own dtype."""
    x, grid = NOISY.float(), flow_grid(16)
    denoise, z = denoiser(MODEL, len(x)), x
    for step in grid.walk(down=True):
        h = step.s - step.t
        k1 = denoise(z, step.t).velocity.float()
        k2 = denoise(z + h / 2 * k1, step.t + h / 2).velocity.float()
        z = z + h * k1 + h**2 / 2 * (k2 - k1) / (h / 2)
    found = go(get("solver", "midpoint").make(), denoise, x, grid, down=True).x
    assert z.dtype == torch.float32 and relative(found.float(), z) < 1e-5
