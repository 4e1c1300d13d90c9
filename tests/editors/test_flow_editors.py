"""What every editor of the flow family promises, on random SD3 and FLUX pipelines."""

from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image

import retour
import tiny
from retour.core.registry import get

EDITORS = {
    "rf-edit": {"inject": 0.5, "blocks": 1.0},
    "flowedit": {"n_avg": 2},
    "otip": {"n_avg": 2, "transport": 0.8},
    "flowchef": {},
    "flowopt": {"iterations": 2},
    "uniedit": {},
}
FAMILIES = ("sd3", "flux")
SOURCES, TARGETS = ["a red apple", "a cat"], ["a green pear", "a blue cat"]
each = pytest.mark.parametrize("name", EDITORS)
everywhere = pytest.mark.parametrize("family", FAMILIES)


@cache
def model(family):
    """In float64 throughout, where batch shapes make no visible difference."""
    return retour.load(tiny.PIPELINES[family]().to(torch.float64))


def picture(seed):
    pixels = np.random.default_rng(seed).integers(0, 255, (4, 4, 3)).astype(np.uint8)
    return Image.fromarray(pixels).resize((16, 16), Image.Resampling.BICUBIC)


def invert(family, name, images=(0, 1)):
    mate = get("edit", name).mate
    shown, told = [picture(k) for k in images], [SOURCES[k] for k in images]
    return retour.invert(model(family), shown, told, method=mate, steps=4, guidance=3.0)


def edit(inversion, name, targets, **options):
    return retour.edit(inversion, targets, editor=name, **{**EDITORS[name], **options})


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-8 * float(wanted.abs().max()))


@everywhere
@each
def test_a_batch_does_what_its_images_do_alone(name, family):
    both = edit(invert(family, name), name, TARGETS)
    for k in range(2):
        close(both.latents[k], edit(invert(family, name, (k,)), name, TARGETS[k]).latents[0])
    assert not torch.equal(*both.latents)


@each
def test_several_targets_do_what_each_does_alone(name):
    inversion = invert("flux", name, (0,))
    both = edit(inversion, name, TARGETS)
    for k in range(2):
        close(both.latents[k], edit(inversion, name, TARGETS[k]).latents[0])


@everywhere
@each
def test_a_mask_of_each_image_keeps_its_background(name, family):
    """Bit for bit, or to rounding where the way back is one of differences; FlowChef pulls."""
    inversion = invert(family, name)
    left, right = np.zeros((2, 16, 16))
    left[:, :8], right[:, 8:] = 1, 1
    options = {"kappa": 1.0} if name == "flowchef" else {}
    found = edit(inversion, name, TARGETS, mask=[left, right], **options).latents
    moved = (found - inversion.latents).abs().amax(1)
    assert moved[0, :, 4:].max() < 1e-9 and moved[1, :, :4].max() < 1e-9
    assert moved[0, :, :4].max() > 1e-3 and moved[1, :, 4:].max() > 1e-3


@each
def test_twice_is_the_same_whatever_the_global_generator(name):
    inversion, runs = invert("sd3", name, (0,)), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        runs.append(edit(inversion, name, TARGETS[0]).latents)
    assert torch.equal(*runs)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("rf-edit", {"inject": 0.2, "features": "inversion", "tokens": "all", "ratio": 1.0}),
        ("rf-edit", {"strategy": "replace_v", "blocks": 18 / 38}),
        ("flowedit", {"n_max": None, "n_min": 0.0, "n_avg": 1, "seed": 0}),
        ("otip", {"transport": 1.0, "reg": 0.1, "adaptive": True, "n_avg": 1}),
        ("flowopt", {"iterations": 8, "strength": 13 / 15, "eta": None}),
        ("flowchef", {"inner": 1, "hold": None, "push": None, "start": "noise"}),
    ],
)
def test_published_defaults(name, wanted):
    """Those that the papers or their code give; other defaults are argued for in the modules."""
    made = get("edit", name).make().options
    assert {key: getattr(made, key) for key in wanted} == wanted
