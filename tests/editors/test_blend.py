"""Blends: outside of the mask the source is back exactly; inside, the edit stands."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from editors.runs import edit, inversion, model
from retour.attention.store import AttentionStore
from retour.core.branches import Layout
from retour.core.control import Chain
from retour.core.grid import Step
from retour.core.state import State
from retour.editors.base import EditJob
from retour.editors.blend import BlendTokens, LocalBlend, MaskBlend, MaskEditor, normalised
from retour.editors.p2p import P2POptions, PromptToPrompt
from retour.editors.reprompt import Reprompt
from retour.errors import RetourError

SOURCES = ["a red apple on a cat", "a photo of a cat"]
TARGETS = {"target": ("a green pear on a cat", "a photo of a pear")}
STEPS = 3


@pytest.fixture(scope="module", params=["sd1", "sd3"])
def family(request):
    return request.param


@pytest.fixture(scope="module")
def inv(family):
    return inversion(family, SOURCES, STEPS)


@pytest.fixture
def mask():
    mask = torch.zeros(2, 1, 8, 8)
    mask[0, :, 2:5, 3:7] = 1
    mask[1, :, 6:] = 1
    return mask


def test_outside_of_the_mask_the_trajectory_returns_exactly(family, inv, mask):
    out = edit(family, MaskEditor(), inv, TARGETS, mask=mask)
    free = edit(family, Reprompt(), inv, TARGETS)
    inside = mask.bool().expand_as(inv.latents)
    assert torch.equal(out["target"][~inside], inv.latents[~inside])
    assert (out["target"][inside] - inv.latents[inside]).abs().max() > 1e-2
    full = edit(family, MaskEditor(), inv, TARGETS, mask=torch.ones_like(mask))
    assert torch.equal(full["target"], free["target"])
    none = edit(family, MaskEditor(), inv, TARGETS, mask=torch.zeros_like(mask))
    assert torch.equal(none["target"], inv.latents)


def test_a_mask_goes_with_any_editor(family, inv, mask):
    class Masked:
        source_branch = True

        def control(self, job):
            return Chain([PromptToPrompt().control(job), MaskBlend(job)])

    out = edit(family, Masked(), inv, TARGETS, mask=mask)
    inside = mask.bool().expand_as(inv.latents)
    assert torch.equal(out["target"][~inside], inv.latents[~inside])
    torch.testing.assert_close(out["source"], inv.latents)


def job(inv, mask):
    layout = Layout(("source", "target"), inv.images)
    return EditJob(inv.model, inv, layout, TARGETS, inv.grid, mask)


def test_remembered_latents_are_blended_too(inv, mask):
    partner = inv.states["x"] + 1
    paired = replace(inv, states={"x": inv.states["x"], "y": partner})
    x = torch.randn(4, 4, 8, 8, dtype=torch.float64)
    state = State(x, {"y": x + 2, "other": x[:, 0]})
    step = Step(1, STEPS, 1.0, 0.0, True)
    layout = Layout(("source", "target"), 2)
    after = MaskBlend(job(paired, mask)).after_step(step, state, state, layout)
    inside = mask.bool().expand(2, 4, 8, 8)
    assert torch.equal(after.x[:2], x[:2])
    assert torch.equal(after.memory["y"][2:][~inside], partner[1][~inside])
    assert torch.equal(after.memory["y"][2:][inside], (x + 2)[2:][inside])
    assert torch.equal(after.memory["other"], x[:, 0])


def test_masks_that_do_not_fit_are_refused(inv):
    with pytest.raises(RetourError, match="needs one"):
        MaskBlend(job(inv, None))
    with pytest.raises(RetourError, match=r"shape \(2, 1, 4, 8\): give \(2, 1, 8, 8\)"):
        MaskBlend(job(inv, torch.ones(2, 1, 4, 8)))


# --- LocalBlend ----------------------------------------------------------------------------------


def filled_store(maps):
    """A store that holds the given (branch, image) -> (h, w, L) maps at factor 4."""
    store = AttentionStore()
    for (branch, image), value in maps.items():
        store._add((branch, image, 4), value)
    return store


def spot(row, column, token, size=4, length=6):
    maps = torch.full((size, size, length), 0.01)
    maps[row, column, token] = 1.0
    return maps


def test_the_mask_is_the_union_of_both_words_grown_by_one():
    store = filled_store({("source", 0): spot(0, 0, 2), ("target", 0): spot(3, 3, 4)})
    blend = LocalBlend({("target", 0): BlendTokens((2,), (4,))}, store=store)
    wanted = torch.zeros(4, 4, dtype=torch.bool)
    wanted[:2, :2] = wanted[2:, 2:] = True
    wanted = F.interpolate(wanted[None, None].float(), (16, 16))[0, 0].bool()
    assert torch.equal(blend.mask("target", 0, (16, 16)), wanted)
    tokens = BlendTokens((2,), (4,), not_source=(2,))
    without = LocalBlend({("target", 0): tokens}, store=store).mask("target", 0, (16, 16))
    wanted[:4, :4] = False
    assert torch.equal(without, wanted)


def test_small_latents_take_finer_maps():
    store = filled_store({("source", 0): spot(0, 0, 2), ("target", 0): spot(0, 0, 2)})
    for branch in ("source", "target"):
        store._add((branch, 0, 2), spot(7, 7, 2, size=8))
    blend = LocalBlend({("target", 0): BlendTokens((2,), (2,))}, store=store)
    fine, coarse = blend.mask("target", 0, (16, 16)), blend.mask("target", 0, (32, 32))
    assert fine[-4:, -4:].all() and fine.sum() == 16
    assert coarse[:16, :16].all() and coarse.sum() == 256


def test_states_are_blended_after_the_start_only():
    store = filled_store({("source", 1): spot(0, 0, 2), ("target", 1): spot(0, 0, 2)})
    blend = LocalBlend({("target", 1): BlendTokens((2,), (2,))}, store=store, start=0.5)
    x = torch.randn(4, 4, 16, 16, dtype=torch.float64)
    state, layout = State(x, {"y": 2 * x, "k": x[:, 0]}), Layout(("source", "target"), 2)

    def after(position):
        step = Step(3 - position, 4, 1.0, 0.0, True)
        return blend.after_step(step, state, state, layout)

    assert after(1) is state
    got = after(2)
    inside = blend.mask("target", 1, (16, 16)).expand(4, 16, 16)
    assert torch.equal(got.x[:3], x[:3]) and torch.equal(got.memory["k"], x[:, 0])
    for value, factor in ((got.x, 1), (got.memory["y"], 2)):
        assert torch.equal(value[3][inside], factor * x[3][inside])
        assert torch.equal(value[3][~inside], factor * x[1][~inside])


def test_pooling_grows_with_the_map():
    heat = torch.zeros(32, 32)
    heat[16, 16] = 5.0
    assert (normalised(heat, (32, 32), pool=True) > 0.3).sum() == 25
    assert (normalised(heat, (32, 32), pool=False) > 0.3).sum() == 1
    assert normalised(torch.zeros(4, 4), (8, 8), pool=True).abs().max() == 0


def test_an_edit_stays_where_its_words_look(family, inv):
    seen = {}

    class Watched:
        source_branch = True

        def control(self, job):
            options = P2POptions(cross_steps=0.2, self_steps=0, blend=",pear", blend_threshold=0.95)
            chain = PromptToPrompt(options).control(job)
            seen["blend"] = chain.controls[0]
            return chain

    out = edit(family, Watched(), inv, TARGETS)
    assert model(family) is inv.model
    for image in range(2):
        inside = seen["blend"].mask("target", image, (8, 8)).expand(4, 8, 8)
        assert 0 < inside.float().mean() < 1
        target, source = out["target"][image], out["source"][image]
        assert torch.equal(target[~inside], source[~inside])
        assert not torch.allclose(target[inside], source[inside], atol=1e-3)
