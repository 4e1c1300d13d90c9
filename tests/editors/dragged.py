"""Pictures, masks and runs for tests of drags, on tiny random transformers."""

from functools import cache

import numpy as np
import torch
from PIL import Image

import retour
import tiny


@cache
def model(family):
    return retour.load(tiny.PIPELINES[family]().to(torch.float64))


def picture(seed=0, size=(16, 16)):
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1] // 4, size[0] // 4, 3))
    return Image.fromarray(pixels.astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)


def mask(top, left, bottom, right, size=16):
    area = np.zeros((size, size))
    area[top:bottom, left:right] = 1
    return area


def invert(family="sd3", images=None, **options):
    images = picture() if images is None else images
    options = {"method": "uniinv", "steps": 4, "guidance": 1.0, **options}
    return retour.invert(model(family), images, "a red apple", **options)


def edit(inv, target="a red apple", **options):
    """From noise, unless told otherwise."""
    return retour.edit(inv, target, editor="lazydrag", **{"strength": 1.0, **options})
