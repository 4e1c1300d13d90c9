"""Inversions of small pictures with float64 networks, shared by the tests of pivotal inverters."""

from functools import cache

import numpy as np
import torch
from PIL import Image

import retour
from editors.runs import model
from retour.inverters.base import Job

SOURCE, TARGET = "a red apple on a blue background", "a green apple on a blue background"
PROMPTS = (SOURCE, "a cat", "a photo of a green pear")
STEPS, GUIDANCE = 2, 5.0
FREE = {"cross_steps": 0.0, "self_steps": 0.0}  # p2p without control: branches do not meet


def picture(seed=0):
    """A blurred random picture."""
    pixels = np.random.default_rng(seed).integers(0, 255, (4, 4, 3)).astype(np.uint8)
    return Image.fromarray(pixels).resize((16, 16), Image.Resampling.BICUBIC)


@cache
def invert(method, family="sd1", *, images=1, prompts=PROMPTS, **options):
    """Invert the first `images` pictures; shared, so leave the inversion as it is."""
    settings = {"steps": STEPS, "guidance": GUIDANCE, **options}
    pictures = [picture(k) for k in range(images)]
    return retour.invert(model(family), pictures, list(prompts[:images]), method=method, **settings)


def job(inversion):
    """The job that such an inversion was."""
    m = inversion.model
    conditions = inversion.condition, inversion.negative
    generator = torch.Generator()
    return Job(m, inversion.latents, *conditions, inversion.grid, inversion.guidance, generator)


def distance(found, wanted):
    """Mean squared difference of latents."""
    return float((found - wanted).square().mean())


def close(found, wanted, tolerance=1e-10):
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance)
