"""EDICT as an inverter: identity edits, and how near the pair stays; its algebra is a solver's."""

import pytest
import torch

import retour
from inverters.jobs import tiny_model, tiny_picture
from problems import PATHS, ProblemModel, pictures
from retour.core.branches import Branch, Denoiser
from retour.core.loop import walk
from retour.core.registry import get

SOURCE = "a red apple on a cat"


@pytest.mark.parametrize("strength", [0.4, 0.8, 1.0])
def test_editing_with_the_same_prompt_returns_the_image(strength):
    """At any strength and guidance, where DDIM drifts."""
    net, missed = tiny_model(wide=True), {}
    for method in ("edict", "ddim"):
        options = {"strength": strength}
        inversion = retour.invert(
            net, tiny_picture(), SOURCE, method=method, steps=10, guidance=3.0, **options
        )
        found = retour.edit(inversion, SOURCE, editor="reprompt").latents
        missed[method] = float((found - inversion.latents).abs().max())
    assert missed["edict"] < 1e-9 and missed["ddim"] > 1e-2


def pair_after_editing(mixing):
    """PSNR in dB, of pictures in [-1, 1], between the two latents of edits to another prompt."""
    net = ProblemModel(pictures(), PATHS["discrete"], "eps")
    x = pictures().means[:1].expand(4, -1, -1, -1)
    x = x + 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).double()
    solver, grid = get("solver", "edict").make(mixing=mixing), net.grid(40)
    ends = solver.start(x)
    for down, prompt in ((False, "red"), (True, "green")):
        denoiser = Denoiser(
            net, [Branch("source", net.embed([prompt] * 4), net.embed([""] * 4), 3.0)]
        )
        ends = walk(solver, denoiser, ends, grid, down=down)
    return float(10 * torch.log10(4 / (ends.x - ends.memory["y"]).square().mean()))


def test_the_pair_agrees_after_an_edit_the_less_the_less_it_is_mixed():
    agreements = [pair_after_editing(mixing) for mixing in (0.93, 0.97, 1.0)]
    assert agreements[0] > 30
    assert agreements == sorted(agreements, reverse=True)


@pytest.mark.parametrize("mixing", [0, 1.1, float("nan")])
def test_mixing_is_checked_before_any_work(mixing):
    with pytest.raises(retour.RetourError, match="mixing must be above 0 and at most 1"):
        get("invert", "edict").make(mixing=mixing)
