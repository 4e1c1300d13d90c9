"""Uni-Edit: its formula by hand, its mask, its level, and equal prompts."""

import numpy as np
import pytest
import torch

import retour
from problems import PATHS, Mixture, ProblemModel
from retour.core.branches import Branch, Denoiser
from retour.core.path import Prediction, levels, predict
from retour.core.registry import get
from retour.editors.uniedit import Fused
from retour.errors import RetourError

STEPS = 10


def model(path="flow"):
    """Two prompts that differ from place to place."""
    means = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)).double()
    data = Mixture(("red", "blue"), (0.5, 0.5), 0.2 * means, (0.8, 0.8))
    return ProblemModel(data, PATHS[path], "velocity", native=8, default_steps=STEPS)


def inversion(m=None, prompt="red", **options):
    image = np.random.default_rng(0).integers(60, 200, (8, 8, 3)).astype(np.uint8)
    m = model() if m is None else m
    return retour.invert(m, image, prompt, method="uniinv", guidance=3.0, **options)


def edit(inv=None, target="blue", **options):
    return retour.edit(inversion() if inv is None else inv, target, editor="uniedit", **options)


@pytest.mark.parametrize("signed", [False, True])
def test_every_step_is_the_fused_one(signed):
    inv = inversion()
    m, times = inv.model, inv.grid.times
    depth, omega = 6, 1.5
    y = inv.states["x"][depth]
    for k in range(depth, 0, -1):
        run = Denoiser(m, [Branch("target", m.embed(["blue"])), Branch("source", inv.condition)])
        target, source = run(torch.cat([y, y]), times[k]).velocity.split(1)
        gap = target - source
        mean = (gap if signed else gap.abs()).mean(1, keepdim=True)
        mask = (mean - mean.min()) / (mean.max() - mean.min())
        v = mask * target + (1 - mask) * source + (1 + mask) * omega * gap
        y = y + (times[k - 1] - times[k]) * v
    found = edit(inv, alpha=0.6, omega=omega, signed=signed)
    torch.testing.assert_close(found.latents, y, rtol=0, atol=1e-12)
    assert found.record["nfe_edit"] == 2 * depth


@pytest.mark.parametrize("path", ["flow", "vp", "discrete"])
def test_equal_prompts_are_euler_s_way_back(path):
    m = model(path)
    inv = inversion(m)
    found = edit(inv, "red", alpha=1.0, omega=7.0)
    plain = retour.reconstruct(inversion(m, inversion_guidance=1.0))
    one = retour.edit(inv, "red", editor="reprompt", guidance=1.0)
    torch.testing.assert_close(found.latents, one.latents, rtol=0, atol=1e-12)
    assert plain.latents.shape == found.latents.shape


def test_level_zero_returns_the_source_and_higher_ones_change_more():
    inv = inversion()
    gaps = [
        float((edit(inv, alpha=a, omega=0.5).latents - inv.latents).norm())
        for a in (0, 0.2, 0.4, 0.8)
    ]
    assert gaps[0] == 0 and gaps == sorted(set(gaps))


def test_mask_is_each_picture_s_own_and_opposite_signs_cancel():
    gap = torch.zeros(2, 2, 2, 2, dtype=torch.float64)
    gap[0, :, 0, 0] = torch.tensor([1.0, -1.0])
    gap[1, 0, 1, 1] = 8.0
    mask = Fused(5.0).mask(gap)
    assert mask.shape == (2, 1, 2, 2) and float(mask.min()) == 0
    assert float(mask[0, 0, 0, 0]) == float(mask[1, 0, 1, 1]) == 1
    assert float(Fused(5.0, signed=True).mask(gap)[0].max()) == 0
    assert float(Fused(5.0).mask(torch.zeros(1, 2, 2, 2)).max()) == 0


@pytest.mark.parametrize("path", ["flow", "vp"])
def test_the_faces_stay_consistent(path):
    x = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    alpha, sigma = levels(PATHS[path], 0.4, x)
    parts = [predict("velocity", v * x, x, alpha, sigma) for v in (0.3, -1.2)]
    found = Fused(2.0)(*parts, torch.ones(1))
    assert isinstance(found, Prediction)
    torch.testing.assert_close(alpha * found.x0 + sigma * found.eps, x, rtol=0, atol=1e-12)


def test_options_are_checked():
    for options in ({"alpha": 1.5}, {"omega": -1}):
        with pytest.raises(RetourError, match=next(iter(options))):
            get("edit", "uniedit").make(**options)
