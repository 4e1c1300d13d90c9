"""FlowChef's editor: background held, edit pushed, everything else plain sampling."""

import numpy as np
import pytest
import torch

import retour
from problems import PATHS, ProblemModel, pictures
from retour.core.branches import Branch, Denoiser
from retour.core.loop import walk
from retour.core.registry import get
from retour.core.state import State
from retour.errors import RetourError

MODEL = ProblemModel(pictures(8), PATHS["flow"], "velocity", default_steps=10)
RIGHT = np.zeros((8, 8))
RIGHT[:, 4:] = 1
EULER = get("solver", "euler").make()


def inversion(count=1, **options):
    image = torch.full((3, 8, 8), 0.5)
    options = {"method": "noise", "strength": 1.0, **options}
    return retour.invert(MODEL, [image] * count, "red", **options)


def edit(inv=None, mask=RIGHT, target="blue", **options):
    inv = inversion() if inv is None else inv
    return retour.edit(inv, target, editor="flowchef", mask=mask, **options)


@pytest.mark.parametrize("push", [0.0, 2.0])
def test_with_nothing_to_keep_it_is_guided_sampling(push):
    """v_e + w (v_e - v_b) from the same noise, the source prompt as the negative one."""
    inv = inversion()
    found = edit(inv, np.ones((8, 8)), source_until=0.0, push=push, start="inversion")
    cond, base = MODEL.embed(["blue"]), MODEL.embed(["red"])
    run = Denoiser(MODEL, [Branch("target", cond, base, 1 + push)])
    wanted = walk(EULER, run, State(inv.noise), inv.grid, down=True).x
    torch.testing.assert_close(found.latents, wanted, rtol=0, atol=1e-12)
    assert found.record["nfe_edit"] == (20 if push else 10)


def test_kappa_one_returns_the_background_and_changes_the_rest():
    inv = inversion()
    found = edit(inv, kappa=1.0, source_until=0.0).latents
    assert (found - inv.latents)[..., :4].abs().max() < 1e-9
    assert (found - inv.latents)[..., 4:].abs().mean() > 0.3


def test_background_error_falls_with_kappa():
    inv = inversion()
    errors = [
        float((edit(inv, kappa=k, source_until=0.0).latents - inv.latents)[..., :4].norm())
        for k in (0.0, 0.02, 0.05, 0.2, 0.5)
    ]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.2 * errors[0]


def test_the_background_may_be_held_more_than_the_edited_region():
    """Outside of the mask `hold`, in all steps; inside `kappa`, in the first."""
    inv = inversion()
    found = edit(inv, kappa=0.03, hold=1.0).latents
    assert (found - inv.latents)[..., :4].abs().max() < 1e-9
    inside = (found - inv.latents)[..., 4:].norm()
    assert inside > 0.5 * (edit(inv, kappa=0.03).latents - inv.latents)[..., 4:].norm()
    tight = edit(inv, kappa=0.5, hold=1.0, source_until=1.0).latents
    assert inside > 3 * (tight - inv.latents)[..., 4:].norm() > 0
    one, both = (edit(inv, kappa=0.2, hold=h).latents for h in (0.2, None))
    assert torch.equal(one, both)
    # Without a mask there is no outside.
    free, held = (edit(inv, None, kappa=0.2, hold=h).latents for h in (None, 1.0))
    assert torch.equal(free, held)


def test_the_share_is_removed_together_by_as_many_steps_as_there_are():
    """28 steps: 17 of 0.03; another number holds as much, where a fixed size does not."""
    made = get("edit", "flowchef").make().options
    assert made.size(28) == pytest.approx(0.03, abs=5e-4)
    for steps, inner in ((10, 1), (50, 3), (1, 1)):
        options = get("edit", "flowchef").make(inner=inner).options
        held = sum(k / steps < options.source_until for k in range(steps))
        assert (1 - options.size(steps)) ** (held * inner) == pytest.approx(0.6)
    assert get("edit", "flowchef").make(kappa=0.2).options.size(50) == 0.2
    masked = get("edit", "flowchef").make(source_until=0.0, until=0.5).options
    assert (1 - masked.size(10)) ** 5 == pytest.approx(0.6)


def test_first_steps_hold_the_edited_region_too():
    inv = inversion()
    gaps = [
        float((edit(inv, kappa=1.0, source_until=u).latents - inv.latents)[..., 4:].norm())
        for u in (0.0, 0.8, 1.0)
    ]
    assert gaps[0] > gaps[1] > 1e3 * gaps[2]


def test_the_push_stays_inside_the_mask():
    """Outside of it the velocity is the target's own, whatever the push."""
    inv = inversion()
    kept = [
        edit(inv, kappa=0.0, source_until=0.0, push=push, start="inversion").latents
        for push in (0.0, 3.0)
    ]
    cond = MODEL.embed(["blue"])
    state, plain = State(inv.noise), []
    run = Denoiser(MODEL, [Branch("target", cond)])
    walk(EULER, run, state, inv.grid, down=True, observers=[lambda e: plain.append(e.state.x)])
    torch.testing.assert_close(kept[0], plain[-1], rtol=0, atol=1e-12)
    gap = (kept[1] - kept[0]).abs().mean((0, 1, 2))
    assert gap[4:].min() > 10 * gap[:4].max()


def test_steering_ends_where_it_is_told():
    inv = inversion()
    found = edit(inv, kappa=0.5, until=0.0, source_until=0.0).latents
    free = edit(inv, kappa=0.0).latents
    torch.testing.assert_close(found, free, rtol=0, atol=0)


def test_the_noise_is_fresh_seeded_and_shared():
    batch = inversion(2, method="euler")
    found = [edit(batch, kappa=0.0, seed=s).latents for s in (0, 0, 1)]
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    torch.testing.assert_close(found[0][0], found[0][1], rtol=0, atol=1e-12)
    kept = edit(batch, kappa=0.0, start="inversion").latents
    assert (kept - found[0]).abs().max() > 0.1


def test_partial_strength_noises_the_data_to_its_level():
    inv = inversion(method="euler", strength=0.3)
    one = retour.edit(inv, "red", editor="flowchef", kappa=0.0, push=0.0)
    assert (one.latents - inv.latents).abs().mean() < 0.4  # SDEdit from level 0.3


def test_any_inverter_serves():
    """Coupled and corrected ways back are left aside, and with them their further branches."""
    for method in ("edict", "heun", "direct"):
        inv = inversion(method=method, strength=1.0)
        found = edit(inv, kappa=1.0, source_until=0.0, start="inversion")
        assert (found.latents - inv.latents)[..., :4].abs().max() < 1e-9, method
        assert found.source is None and found.record["nfe_edit"] == 20


def test_something_must_hold_the_source():
    with pytest.raises(RetourError, match="nothing holds the source"):
        edit(mask=None, source_until=0.0)
    assert torch.isfinite(edit(mask=None).latents).all()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"kappa": -1.0}, "kappa is -1"),
        ({"hold": -0.5}, "hold is -0.5"),
        ({"share": 1.0}, "share must be at least 0 and below 1"),
        ({"until": 1.5}, "until is 1.5"),
        ({"source_until": -0.1}, "source_until is -0.1"),
        ({"push": -2.0}, "push is -2"),
        ({"start": "zero"}, "zero"),
    ],
)
def test_options_are_checked(options, says):
    with pytest.raises(RetourError, match=says):
        edit(**options)
