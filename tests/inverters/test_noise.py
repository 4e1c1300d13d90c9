"""SDEdit's noising: no evaluation, the right levels, and Blended Diffusion on top of it."""

import pytest
import torch

import declarations as claims
import retour
from inverters.jobs import job, reconstructed, tiny_model, tiny_picture
from problems import PATHS, ProblemModel, mixture, points
from retour.core.path import levels
from retour.core.registry import get


def make(**options):
    return get("invert", "noise").make(**options)


def model(path="discrete", kind="v"):
    return ProblemModel(mixture(), PATHS[path], kind)


@pytest.mark.parametrize("path, kind", [("discrete", "v"), ("flow", "velocity")])
@pytest.mark.parametrize("independent", [True, False])
def test_states_are_the_data_plus_noise(path, kind, independent):
    work = job(model(path, kind), steps=10)
    inversion = make(strength=1.0, independent=independent).invert(work)
    assert work.ledger.rows == 0
    x = inversion.states["x"]
    assert torch.equal(x[0], points(2))
    noises = []
    for state, t in zip(x[1:], inversion.grid.times[1:], strict=True):
        alpha, sigma = levels(PATHS[path], t, state)
        noises.append((state - alpha * points(2)) / sigma)
    noises = torch.stack(noises)
    assert claims.relative(noises[:, 0], noises[:, 1]) < 1e-9, "images of a batch share noise"
    apart = (noises - noises[0]).abs().max()
    assert apart > 0.1 if independent else apart < 1e-9


def test_strength_is_where_it_starts():
    inversion = make(strength=0.3).invert(job(model(), steps=10))
    assert inversion.grid.steps == 3


def test_it_returns_by_ddim_and_with_eta_by_recorded_noise():
    start = make(strength=1.0).invert(job(model(), steps=8))
    ddim = claims.go(
        get("solver", "ddim").make(), job(model()).denoiser(1.0), start.noise, start.grid, down=True
    )
    assert torch.equal(reconstructed(start)[0], ddim.x)
    assert start.extras == {}
    noisy = make(strength=1.0, eta=1.0).invert(job(model(), steps=8))
    assert noisy.extras["noise"].shape == noisy.states["x"][1:].shape
    first, again = (reconstructed(noisy)[0] for _ in range(2))
    assert torch.equal(first, again)
    assert claims.relative(first, ddim.x) > 1e-2


def test_more_noise_keeps_less_of_the_picture():
    net = tiny_model()
    moved = []
    for strength in (0.2, 0.5, 1.0):
        inversion = retour.invert(
            net, tiny_picture(), "a cat", method="noise", steps=10, strength=strength
        )
        result = retour.edit(inversion, "a pear", editor="reprompt")
        moved.append(float((result.latents - inversion.latents).norm()))
        assert inversion.record["nfe"] == 0
    assert moved == sorted(moved)


def test_with_a_mask_it_is_blended_diffusion():
    mask = torch.zeros(16, 16).numpy()
    mask[:, 8:] = 1
    inversion = retour.invert(
        tiny_model(), tiny_picture(), "a cat", method="noise", steps=4, independent=True
    )
    states = []
    result = retour.edit(
        inversion,
        "a green pear",
        editor="mask-blend",
        mask=mask,
        observers=[lambda e: states.append(e.state.x)],
    )
    for k, x in enumerate(states[::-1]):
        assert torch.equal(x[..., :4], inversion.states["x"][k][..., :4])
    assert (result.latents - inversion.latents)[..., 4:].abs().max() > 1e-2


def test_eta_is_checked():
    with pytest.raises(retour.RetourError, match="eta"):
        make(eta=-0.1)
