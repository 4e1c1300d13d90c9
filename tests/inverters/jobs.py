"""Jobs on analytic models and tiny networks, shared by the tests of single inverters."""

from functools import lru_cache

import numpy as np
import torch
from PIL import Image

import retour
import tiny
from problems import points
from retour.core.branches import Branch, Denoiser
from retour.core.loop import walk
from retour.core.registry import get
from retour.inverters.base import Job


def job(model, *, images=2, guidance=1.0, steps=5, seed=0, latents=None, prompts=None):
    """A job of `images` points (or given latents) with the prompts red, green, ..."""
    x = points(images) if latents is None else latents
    prompts = ["red", "green", "blue"][: len(x)] if prompts is None else prompts
    return Job(
        model,
        x,
        model.embed(prompts),
        model.embed([""] * len(x)),
        model.grid(steps),
        guidance,
        torch.Generator().manual_seed(seed),
    )


@lru_cache
def tiny_model(family="sd1", wide=False):
    """A tiny random pipeline, in float64 if `wide`."""
    pipe = tiny.PIPELINES[family]()
    return retour.load(pipe.to(torch.float64) if wide else pipe)


def tiny_picture(seed=0):
    """A random 16 x 16 picture."""
    pixels = np.random.default_rng(seed).integers(0, 255, (4, 4, 3)).astype(np.uint8)
    return Image.fromarray(pixels).resize((16, 16), Image.Resampling.BICUBIC)


def reconstructed(inversion, scale=None):
    """Latents of the source brought back, and evaluations spent on each image."""
    scale = inversion.guidance if scale is None else scale
    branch = Branch("source", inversion.condition, inversion.negative, scale)
    denoiser = Denoiser(inversion.model, [branch])
    replay = get("invert", inversion.method).make(**inversion.options).replay(inversion)
    grid, control = inversion.grid, [replay.control]
    end = walk(replay.solver, denoiser, replay.state, grid, down=True, controls=control)
    return end.x, denoiser.ledger.nfe(inversion.images)
