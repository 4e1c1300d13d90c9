"""Direct Inversion: offsets where the exact way is known, editors, ablations, the paper's order.

tests/test_api.py has its identities on every family.
"""

from functools import cache

import numpy as np
import pytest
import torch

import retour
from inverters.jobs import job, reconstructed, tiny_model, tiny_picture
from inverters.paired import inversion, missed
from inverters.searched import MODEL, invert, samples
from retour.core.registry import entries, get
from retour.core.state import State

SOURCE, TARGET = "a red apple on a blue background", "a green apple on a blue background"
FREE = {"cross_steps": 0.0, "self_steps": 0.0}  # branches do not meet


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


# --- Beside an edit -------------------------------------------------------------------------------


@cache
def inverted(**options):
    """A picture inverted by a float64 network, at a guidance that DDIM does not survive."""
    options = {"method": "direct", "steps": 6, "guidance": 7.5, **options}
    return retour.invert(tiny_model("sd2", wide=True), tiny_picture(), SOURCE, **options)


def fitting():
    """Editors that go with Direct Inversion on a diffusion UNet and carry the source branch."""
    given = get("invert", "direct").provides
    able = tiny_model("sd2", wide=True).capabilities
    found = [e for e in entries("edit") if e.requires <= given and e.needs <= able]
    return [e for e in found if e.factory.source_branch]


@pytest.mark.parametrize("editor", fitting(), ids=lambda e: e.name)
def test_no_editor_moves_the_source(editor):
    mask = np.zeros((16, 16))
    mask[4:12, 4:12] = 1
    found = retour.edit(inverted(), TARGET, editor=editor.name, mask=mask).source
    assert (found - inverted().latents).abs().max() <= 1e-12


def test_the_three_forms_are_one():
    """Apart from a float32 network's rounding, which tests/test_api.py allows for."""
    first, *others = (
        retour.edit(inverted(form=form), TARGET).latents
        for form in ("offset", "two-pass", "overwrite")
    )
    for other in others:
        assert (other - first).abs().max() <= 1e-10


def watched(inversion, **options):
    """Each step and the state after it, branches in the order source, target."""
    seen = []
    retour.edit(
        inversion, TARGET, observers=[lambda e: seen.append((e.step, e.state.x))], **options
    )
    return seen


def test_only_every_kth_step_is_corrected():
    """The paper's ablation: of six steps the first and the fourth."""
    inversion = inverted(every=3)
    on = [
        bool((x[:1] - inversion.states["x"][step.index]).abs().max() <= 1e-12)
        for step, x in watched(inversion)
    ]
    assert on == [True, False, False, True, False, False]


@pytest.mark.parametrize("options", [{"every": 0}, {"scale": float("nan")}])
def test_malformed_options_are_refused_at_once(options):
    with pytest.raises(retour.RetourError, match=f"{next(iter(options))} is"):
        get("invert", "direct").make(**options)


def test_the_target_may_be_given_the_offset_too():
    """What the published pix2pix-zero does; its first step shows the offset by itself."""
    plain, both = inverted(method="ddim"), inverted(target_too=True)
    [(step, free), *_], [(_, moved), *_] = (watched(i, **FREE) for i in (plain, both))
    offset = both.states["x"][step.index] - free[:1]
    assert offset.abs().max() > 1e-3
    torch.testing.assert_close(moved - free, offset.repeat(2, 1, 1, 1), rtol=0, atol=1e-12)


def test_inverting_at_guidance_zero_is_inverting_without_a_prompt():
    """One end of the paper's grid of inversion guidances; more than 1 is the other."""
    none = inverted(inversion_guidance=0.0).noise
    empty = retour.invert(
        tiny_model("sd2", wide=True), tiny_picture(), "", method="direct", steps=6, guidance=7.5
    ).noise
    torch.testing.assert_close(none, empty, rtol=0, atol=1e-12)
    strong = inverted(inversion_guidance=7.5)
    assert (strong.noise - inverted().noise).abs().max() > 1e-2
    assert (retour.edit(strong, TARGET).source - strong.latents).abs().max() <= 1e-12


@pytest.mark.slow
def test_the_offset_improves_the_background_of_edits():
    """Prompt-to-Prompt on the shipped model at guidance 7.5; no offset is DDIM inversion.

    Measured 0.0240, 0.0251, 0.0225, 0.0226 at scales 0, 0.4, 0.8 and 1: of the edit's background,
    unlike of the source, less than half of the offset is no gain.
    """
    made = inversion("direct", 14, 10, guidance=7.5)
    none, *most = [missed(made.with_options(scale=scale)) for scale in (0.0, 0.8, 1.0)]
    print("background", none, most)
    assert max(most) < none
