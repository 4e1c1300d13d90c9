"""BDIA as an inverter: exact from its pair, at DDIM's cost."""

import warnings

import pytest
import torch

import declarations as claims
import retour
from inverters.jobs import job, reconstructed, tiny_model, tiny_picture
from problems import PATHS, ProblemModel, mixture, points
from retour import api
from retour.core.registry import get
from retour.core.state import Inversion, State
from retour.errors import RetourError
from retour.solvers._exact import AmplificationWarning

PROMPT = "a red apple"


def make(**options):
    return get("invert", "bdia").make(**options)


@pytest.mark.parametrize("base, each", [("ddim", 1), ("edm", 3), ("dpm", 3)])
@pytest.mark.parametrize("guidance", [1.0, 7.5])
def test_round_trip_at_any_guidance_and_what_it_costs(base, each, guidance):
    model = ProblemModel(mixture(), PATHS["vp"], "v")
    work = job(model, guidance=guidance, steps=10)
    inversion = make(base=base, strength=1.0, gamma=0.94).invert(work)
    rows = 1 if guidance == 1 else 2
    assert work.ledger.nfe(2) == rows * (each * 10 - (each > 1))
    back, spent = reconstructed(inversion)
    assert claims.relative(back, points(2)) < 1e-12
    assert spent == rows * each * 9


def test_strength_shortens_the_way():
    work = job(ProblemModel(mixture(), PATHS["vp"], "v"), steps=10)
    inversion = make().invert(work)
    assert inversion.grid.steps == 8 and len(inversion.states["x"]) == 9


def test_the_way_back_needs_the_last_two_levels():
    work = job(ProblemModel(mixture(), PATHS["vp"], "v"), guidance=3.0, steps=10)
    inversion = make().invert(work)
    replay = make().replay(inversion)
    assert torch.equal(replay.state.memory["cleaner"], inversion.states["x"][-2])
    alone = claims.go(
        replay.solver, work.denoiser(3.0), State(inversion.noise), inversion.grid, down=True
    )
    assert claims.relative(alone.x, points(2)) > 1e-3


def test_gamma_damps_as_much_over_any_number_of_steps():
    inverter = make()
    assert inverter.gamma(40) == pytest.approx(0.94)
    assert inverter.gamma(10) ** 10 == pytest.approx(inverter.gamma(100) ** 100)
    assert make(gamma=0.97).gamma(10) == 0.97


def test_a_saved_inversion_keeps_its_pair(tmp_path):
    inversion = retour.invert(tiny_model(), tiny_picture(), PROMPT, method="bdia", steps=4)
    inversion.save(tmp_path / "a.safetensors")
    loaded = Inversion.load(tmp_path / "a.safetensors", tiny_model())
    assert torch.equal(api.reconstruct(loaded).latents, api.reconstruct(inversion).latents)


def test_a_noise_that_is_too_wide_is_warned_of():
    work = job(ProblemModel(mixture(), PATHS["vp"], "v"), steps=30)
    with pytest.warns(AmplificationWarning, match="times as wide .* gamma 0.6"):
        make(gamma=0.6, strength=1.0).invert(work)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(strength=1.0).invert(job(ProblemModel(mixture(), PATHS["vp"], "v"), steps=30))


@pytest.mark.parametrize("steps", [1, 2])
def test_a_way_of_one_step_is_refused_before_any_work(steps):
    """Its two levels are data and noise: an edit would ask nothing and return the data."""
    work = job(ProblemModel(mixture(), PATHS["vp"], "v"), steps=steps)
    with pytest.raises(RetourError, match=f"at least 2 steps, strength 0.8 of {steps} leaves 1"):
        make().invert(work)
    assert work.ledger.rows == 0


@pytest.mark.parametrize("gamma", [0, -1, 1.1])
def test_gamma_is_checked(gamma):
    with pytest.raises(RetourError, match="gamma"):
        make(gamma=gamma)
