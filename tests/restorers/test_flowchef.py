"""FlowChef restores: what the paper's figures rest on, on an exactly solvable prior."""

import pytest
import torch

import tiny
from problems import PATHS, ProblemModel, pictures
from retour.core.registry import entries, get
from retour.errors import RetourError
from retour.models.load import load
from retour.restorers.base import RestoreJob
from retour.restorers.flowchef import FlowChef, FlowChefOptions, known_cells
from retour.restorers.operators import (
    GaussianBlur,
    Grey,
    Identity,
    Inpaint,
    SuperResolution,
)

SIZE = 8
HOLE = torch.ones(SIZE, SIZE)
HOLE[2:6, 2:6] = 0


def truth(count=64, seed=0):
    """Pictures drawn from the prior: one of three colours, and grain."""
    data = pictures(SIZE)
    generator = torch.Generator().manual_seed(seed)
    which = torch.randint(3, (count,), generator=generator)
    grain = torch.randn(count, 3, SIZE, SIZE, generator=generator, dtype=torch.float64)
    return data.means[which] + data.widths[0] * grain


def job(operator, observed, steps=20, seed=0, path="flow", model=None):
    model = ProblemModel(pictures(SIZE), PATHS[path], "velocity") if model is None else model
    count = len(observed)
    return RestoreJob(
        model,
        operator,
        observed,
        (SIZE, SIZE),
        model.embed([""] * count),
        model.embed([""] * count),
        model.grid(steps),
        1.0,
        torch.Generator().manual_seed(seed),
    )


def decibels(found, wanted, where=None):
    gap = (found - wanted).square()
    gap = gap if where is None else gap[..., where.bool()]
    return float(-10 * torch.log10(gap.flatten(1).mean(1) / 4).mean())


def test_the_known_region_follows_kappa_and_the_hole_is_filled():
    x = truth()
    operator = Inpaint(HOLE)
    y = operator.forward(x)
    known, holes = [], []
    for kappa in (0.01, 0.03, 0.1, 0.3):
        found = FlowChef(FlowChefOptions(kappa=kappa)).restore(job(operator, y))
        known.append(decibels(found, x, HOLE))
        holes.append(decibels(found, x, 1 - HOLE))
    assert known == sorted(known) and known[-1] > known[0] + 10
    # The grain of the hole nobody can know; its colour shows through the rest of the picture.
    free = FlowChef(FlowChefOptions(kappa=0.0)).restore(job(operator, y))
    assert holes[-1] > decibels(free, x, 1 - HOLE) + 2
    assert holes[-1] > decibels(y, x, 1 - HOLE)
    assert float(found[..., ~HOLE.bool()].abs().mean()) > 0.2  # not the zeros of the measurement


class Saved:
    """Bytes that autograd keeps for a backward pass, at most at a time."""

    def __init__(self):
        self.now = self.peak = 0

    def __enter__(self):
        def pack(tensor):
            self.now += tensor.numel() * tensor.element_size()
            self.peak = max(self.peak, self.now)
            return _Kept(tensor, self)

        self.hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)


class _Kept:
    def __init__(self, tensor, counter):
        self.tensor, self.counter = tensor, counter

    def __del__(self):
        self.counter.now -= self.tensor.numel() * self.tensor.element_size()


def test_as_good_as_the_full_gradient_at_a_fraction_of_its_memory():
    """DPS at equal evaluations: within 1 dB over the hole; memory on a real network."""
    x, operator = truth(), Inpaint(HOLE)
    y = operator.forward(x)
    found = {
        gradient: FlowChef(FlowChefOptions(kappa=0.3, gradient=gradient)).restore(job(operator, y))
        for gradient in ("skip", "full")
    }
    hole = {k: decibels(v, x, 1 - HOLE) for k, v in found.items()}
    assert hole["skip"] > hole["full"] - 1
    model = load(tiny.sd3())
    peaks = {}
    for gradient in ("skip", "full"):
        y = torch.zeros(1, 3, 16, 16, dtype=torch.float64)
        work = job(Inpaint(torch.eye(16)), y, 2, model=model)
        work.size = (16, 16)
        with Saved() as saved:
            FlowChef(FlowChefOptions(gradient=gradient, space="latent")).restore(work)
        peaks[gradient] = saved.peak
    assert 0 < peaks["skip"] < 0.5 * peaks["full"]


@pytest.mark.parametrize("path", ["flow", "vp", "cosine"])
@pytest.mark.parametrize(
    "operator",
    [Identity(), Inpaint(HOLE), SuperResolution(2), GaussianBlur(1.0, 5), Grey()],
    ids=lambda op: op.name,
)
def test_it_fits_the_measurement_and_knows_what_it_does_not_say(operator, path):
    x = truth(16)
    y = operator.forward(x)
    found = FlowChef(FlowChefOptions()).restore(job(operator, y, path=path))
    fit = operator.forward(found) - y
    assert float(fit.square().mean().sqrt()) < 0.1 * float(y.square().mean().sqrt())
    if operator.name == "sr":
        # The grain is white, so repeating pixels is the best mean; a sample errs twice as much.
        assert decibels(found, x) > decibels(operator.pinv(y), x) - 3.1
    if operator.name in ("inpaint", "colour"):
        assert decibels(found, x) > decibels(operator.pinv(y), x) + 1


def test_noise_is_not_fitted_with_a_small_kappa():
    """The prior's grain has a known size: the estimate lies between measurement and prior."""
    x, operator = truth(), SuperResolution(2)
    generator = torch.Generator().manual_seed(3)
    y = operator.forward(x) + 0.3 * torch.randn(64, 3, 4, 4, generator=generator).double()
    hard = FlowChef(FlowChefOptions(kappa=1.0)).restore(job(operator, y))
    soft = FlowChef(FlowChefOptions(kappa=0.1)).restore(job(operator, y))
    truthful = operator.forward(x)
    assert decibels(operator.forward(soft), truthful) > decibels(operator.forward(hard), truthful)


def test_batch_equals_loop_and_the_seed_decides():
    x, operator = truth(3), SuperResolution(2)
    y = operator.forward(x)
    whole = FlowChef().restore(job(operator, y, 6))
    for k in range(3):
        alone = FlowChef().restore(job(operator, y[k : k + 1], 6))
        torch.testing.assert_close(alone[0], whole[k], rtol=0, atol=1e-6)  # pixels are float32
    torch.manual_seed(5)
    assert torch.equal(FlowChef().restore(job(operator, y, 6)), whole)
    assert not torch.equal(FlowChef().restore(job(operator, y, 6, seed=1)), whole)


def test_evaluations_are_the_steps():
    y = truth(2)
    work = job(Identity(), y, 9)
    FlowChef(FlowChefOptions(inner=4)).restore(work)
    assert work.ledger.nfe(2) == 9 and work.ledger.calls == 9
    work = job(Identity(), y, 9)
    FlowChef(FlowChefOptions(again=2, free=3)).restore(work)
    assert work.ledger.nfe(2) == 3 * 6 + 3


def test_a_cell_is_known_if_all_its_pixels_are():
    known = torch.ones(8, 8)
    known[0, 0] = 0
    cells = known_cells(known, torch.zeros(1, 4, 2, 2))
    assert cells[0, 0].tolist() == [[0, 1], [1, 1]]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"kappa": -0.1}, "kappa is -0.1"),
        ({"inner": 0}, "inner is 0"),
        ({"free": -1}, "free is -1"),
        ({"again": -1}, "again is -1"),
        ({"gradient": "full", "inner": 2}, "got inner = 2"),
        ({"gradient": "full", "again": 1}, "again = 1"),
    ],
)
def test_options_are_checked(options, says):
    with pytest.raises(RetourError, match=says):
        get("restore", "flowchef").make(**options)


def test_latent_space_needs_an_operator_of_cells():
    with pytest.raises(RetourError, match="'sr' mixes: use space 'pixel'"):
        y = SuperResolution(2).forward(truth(1))
        FlowChef(FlowChefOptions(space="latent")).restore(job(SuperResolution(2), y))


def test_it_is_registered():
    assert [e.name for e in entries("restore", stochastic=True) if e.paper.arxiv == "2412.00100"]
