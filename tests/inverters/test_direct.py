"""Direct Inversion's offsets, where the exact way is known (tests/test_api.py has the rest)."""

import torch

from inverters.jobs import job, reconstructed
from inverters.searched import MODEL, invert, samples
from retour.core.registry import get
from retour.core.state import State


def offsets(x, steps, guidance=1.0):
    """What each step down misses, (N, B, C, h, w)."""
    found = invert("direct", x, steps=steps, guidance=guidance, form="two-pass")
    return found.extras["offsets"]


def test_offsets_shrink_with_the_square_of_the_steps():
    """Without guidance: one step's error is of second order."""
    _, x = samples(20)
    sizes = [float(offsets(x, n).abs().mean()) for n in (25, 50, 100)]
    for coarse, fine in zip(sizes, sizes[1:], strict=False):
        assert 3 < coarse / fine < 5


def test_offsets_vanish_on_a_fixed_point_without_guidance_only():
    """The track solved for the step's exact inverse needs no correction; a guided step does."""
    _, x = samples(20)
    track = invert("fixed-point", x, tolerance=1e-9)
    solver = get("solver", "ddim").make()

    def missed(guidance):
        work = job(MODEL, latents=x, prompts=["red"] * len(x), steps=20, guidance=guidance)
        states = track.states["x"]
        return [
            float((solver.step(work.denoiser(guidance), State(states[s.index + 1]), s, MODEL.path).x
                   - states[s.index]).abs().max())
            for s in track.grid.walk(down=True)
        ]  # fmt: skip

    assert max(missed(1.0)) < 1e-6 < min(missed(7.5))
    assert float(offsets(x, 20).abs().max()) > 1e-3  # an ordinary track


def test_the_offsets_bring_the_source_back_at_any_guidance():
    _, x = samples(20)
    for guidance in (1.0, 7.5, 15.0):
        found = invert("direct", x, guidance=guidance)
        assert float((reconstructed(found)[0] - x).abs().max()) <= 1e-12
    assert torch.isfinite(offsets(x, 20, 15.0)).all()
