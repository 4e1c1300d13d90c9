"""The way back as a map, and the differentiable bounds of pixels."""

import warnings

import pytest
import torch

import retour
import tiny
from privacy import cases
from retour.core.control import Control
from retour.core.registry import entries
from retour.core.state import State
from retour.inverters.base import Replay
from retour.privacy.base import WayBack, bounded, rounded
from retour.solvers.implicit import ConvergenceWarning

EXACT = [e for e in entries("invert") if e.exact]


@pytest.mark.parametrize("edge", [0.0, 1.0])
def test_pixel_bounds_are_nearly_continuous(edge):
    value = torch.tensor([edge - 1e-12, edge, edge + 1e-12], dtype=torch.float64)
    found = bounded(value)
    assert float(found.max() - found.min()) < 1e-4


def test_pixel_bounds_hold_and_change_nothing_inside():
    inside = torch.linspace(0, 1, 101, dtype=torch.float64)
    assert torch.equal(bounded(inside), inside)
    far = bounded(torch.tensor([-3.0, -1e-3, 1 + 1e-3, 4.0], dtype=torch.float64))
    assert float(far.min()) >= -1e-4 and float(far.max()) <= 1.0
    # The published formulas, at a value outside of each edge.
    above = (torch.tanh(torch.tensor(1.0, dtype=torch.float64)) + 10_000) / 10_001
    below = -torch.tanh(torch.tensor(1.0, dtype=torch.float64)) / 10_000
    torch.testing.assert_close(far[1:3], torch.stack([below, above]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("value", [-1e-4, 1 + 1e-4, 0.5])
def test_pixel_bounds_have_a_gradient_just_outside(value):
    leaf = torch.tensor([value], requires_grad=True)
    bounded(leaf).sum().backward()
    assert leaf.grad.item() > 1e-2


def test_pixel_bounds_have_finite_gradients_far_outside():
    leaf = torch.tensor([-100.0, 100.0], requires_grad=True)
    bounded(leaf).sum().backward()
    assert torch.isfinite(leaf.grad).all()


def test_rounding_is_that_of_a_file():
    images = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 1.2 - 0.1
    picture = retour.io.to_image(images[0] * 2 - 1)
    kept = retour.io.to_tensor(picture) / 2 + 0.5
    torch.testing.assert_close(rounded(images)[0], kept, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", ["sd1", "sd3"])
@pytest.mark.parametrize("method", EXACT, ids=lambda e: e.name)
def test_the_unchanged_start_of_an_exact_inversion_gives_the_image(method, family):
    """D(x_T) = x_0, at odd and even step counts, at one guidance both ways, whatever it is."""
    model = retour.load(tiny.PIPELINES[family]())
    if not method.needs <= model.capabilities:
        pytest.skip("needs another model")
    image = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))
    bound = method.facts.get("exact_to", 1e-12)
    for steps, guidance in ((4, 4.5), (5, 1.0)):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            inversion = retour.invert(
                model,
                image,
                "a red apple",
                method=method.name,
                steps=steps,
                guidance=guidance,
                inversion_guidance=guidance,
            )
        if any(issubclass(warning.category, ConvergenceWarning) for warning in said):
            continue
        found = WayBack(inversion)(inversion.noise)
        assert (found - inversion.latents).norm() <= bound * inversion.latents.norm()


@pytest.mark.parametrize("method", ["ddim", "dpm", "edict"])
def test_nothing_of_a_call_outlives_it(method):
    """A solver's history is empty at the start of every D."""
    way = cases.job([cases.square()], method=method).denoise
    x = way.replay.state.x
    first = way(x)
    way(x + 0.3)
    assert torch.equal(way(x), first)


def test_a_changed_start_changes_the_image_and_needs_no_graph():
    job = cases.job([cases.square()])
    start = (job.start + 0.1).requires_grad_()
    found = job.denoise(start)
    assert not found.requires_grad
    assert (found - job.denoise(job.start)).abs().max() > 1e-3


def test_a_corrected_source_does_not_undo_the_change():
    """Direct Inversion puts its source branch back on its track; D walks another branch."""
    job = cases.job([cases.square()], method="direct")
    assert (job.denoise(job.start + 0.1) - job.denoise(job.start)).abs().max() > 1e-3


def test_coupled_latents_move_together():
    job = cases.job([cases.square()], method="edict")
    state = job.denoise._start(job.start + 0.1)
    torch.testing.assert_close(state.x - job.start, torch.full_like(job.start, 0.1))
    torch.testing.assert_close(
        state.memory["y"] - job.inversion.states["y"][-1], torch.full_like(job.start, 0.1)
    )


class _Watcher(Control):
    """Notes which branches it meets and holds the source where it was."""

    def __init__(self):
        self.seen = []

    def after_step(self, step, state, before, layout):
        self.seen.append(layout.names)
        return state


def test_a_method_that_needs_its_source_beside_the_target_gets_it(monkeypatch):
    job = cases.job([cases.square(), cases.square(seed=1)], method="ddim")
    watcher = _Watcher()
    replay = job.denoise.replay

    class Needy:
        def replay(self, inversion):
            return Replay(replay.solver, State(replay.state.x), watcher, source_branch=True)

    alone = job.denoise(job.start + 0.1)
    monkeypatch.setattr("retour.privacy.base.way_back", Needy().replay)
    beside = WayBack(job.inversion)(job.start + 0.1)
    torch.testing.assert_close(beside, alone, rtol=0, atol=1e-12)
    assert watcher.seen == [("source", "target")] * 5


def test_an_inversion_without_a_model_is_refused():
    inversion = cases.job([cases.square()]).inversion
    inversion.model = None
    with pytest.raises(retour.RetourError, match="no model attached"):
        WayBack(inversion)
