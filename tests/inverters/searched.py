"""Inversions of a mixture's own samples, whose noise is known; shared by tests of implicit ones."""

from functools import cache

import torch

from inverters.jobs import job, reconstructed
from problems import PATHS, ProblemModel, mixture, pictures
from retour.core.branches import Branch, Denoiser
from retour.core.loop import walk
from retour.core.registry import get
from retour.core.state import State

MODEL = ProblemModel(mixture(), PATHS["discrete"], "eps")
PICTURES = ProblemModel(pictures(), PATHS["discrete"], "eps")
FLOW = ProblemModel(mixture(), PATHS["flow"], "velocity")
DDIM = get("solver", "ddim").make()


@cache
def samples(steps, images=32, pictured=False):
    """Noise (images, C, h, w) and what the sampler makes of it without guidance, prompted red."""
    model = PICTURES if pictured else MODEL
    shape = (images, *model.data.means.shape[1:])
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    denoise = Denoiser(model, [Branch("source", model.embed(["red"] * images))])
    return noise, walk(DDIM, denoise, State(noise), model.grid(steps), down=True).x


def invert(method, x, *, steps=20, model=MODEL, prompt="red", guidance=1.0, **options):
    """Invert latents with one prompt for all."""
    work = job(model, latents=x, prompts=[prompt] * len(x), steps=steps, guidance=guidance)
    inversion = get("invert", method).make(**options).invert(work)
    inversion.record["nfe"] = work.ledger.nfe(len(x))
    return inversion


def rms(difference):
    """Root mean square."""
    return float(difference.square().mean().sqrt())


def returned(inversion, scale=1.0):
    """Root mean square error of the round trip."""
    return rms(reconstructed(inversion, scale)[0] - inversion.latents)
