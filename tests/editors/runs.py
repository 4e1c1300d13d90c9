"""Short denoising runs on tiny random networks, shared by the tests of attention and of editors."""

from functools import cache

import torch

import tiny
from retour.core.branches import Branch, Denoiser
from retour.core.loop import walk
from retour.core.state import Inversion, State, stack
from retour.editors.base import EditJob
from retour.models.load import load
from retour.solvers.ddim import DDIM, DDIMOptions

SCALE = 5.0
SIZE = (8, 8)
SOLVER = DDIM(DDIMOptions())


@cache
def model(family):
    """The family's tiny model with a float64 network; shared, so leave it as it was."""
    pipe = getattr(tiny, family)()
    getattr(pipe, "unet", getattr(pipe, "transformer", None)).double()
    return load(pipe)


def noise(images=1, seed=0, size=SIZE, channels=4):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(images, channels, *size, dtype=torch.float64, generator=generator)


def denoiser(family, prompts, scale=SCALE):
    """Denoiser over branches: name -> prompts."""
    m = model(family)
    branches = [
        Branch(name, m.embed(texts), m.embed([""] * len(texts)), scale)
        for name, texts in prompts.items()
    ]
    return Denoiser(m, branches)


def inversion(family, sources, steps, start=None):
    """A pretended inversion: the way that the source prompts take down from `start`."""
    m = model(family)
    grid = m.grid(steps)
    states = [State(noise(len(sources)) if start is None else start)]
    den = denoiser(family, {"source": sources})
    walk(SOLVER, den, states[0], grid, down=True, observers=[lambda e: states.append(e.state)])
    named = stack(states[::-1])
    condition, negative = m.embed(sources), m.embed([""] * len(sources))
    return Inversion("none", {}, m.name, m.fingerprint, grid, named, condition, negative, model=m)


def edit(family, editor, inv, targets, *, mask=None, extra=(), scale=SCALE):
    """Run an editor; targets: branch -> prompts. Returns branch -> latents (B, C, h, w)."""
    m = model(family)
    source = {"source": list(inv.prompts)} if editor.source_branch else {}
    den = denoiser(family, {**source, **{k: list(v) for k, v in targets.items()}}, scale)
    job = EditJob(m, inv, den.layout, targets, inv.grid, mask)
    state = State(inv.noise).tile(len(den.branches))
    end = walk(SOLVER, den, state, inv.grid, down=True, controls=[editor.control(job), *extra])
    return dict(den.layout.split(end.x))
