"""The adaptive mask: where branches agree the target is given the faithful latents."""

import pytest
import torch

import retour
from editors.runs import noise
from inverters.jobs import tiny_model, tiny_picture
from retour.core.branches import Layout
from retour.core.grid import Grid
from retour.core.path import levels
from retour.core.state import State
from retour.editors.uniform import AdaptiveMask, held
from retour.models.schedules import vp_path
from tiny import sd1

PATH = vp_path(sd1().scheduler, "epsilon")
GRID = Grid((0.0, 1.0, 101.0, 201.0, 301.0, 401.0))
STEPS = list(GRID.walk(down=True))
LAYOUT = Layout(("source", "target"), 1)
ANCHOR = noise(GRID.steps, seed=9)[:, None]


def crossing(x0, eps, step):
    """Latents before and after a DDIM step that held `x0` and `eps`."""
    return tuple(a * x0 + s * eps for a, s in (levels(PATH, t, x0) for t in (step.t, step.s)))


def run(x0, eps, step, layout=LAYOUT, anchor=ANCHOR, **options):
    """Clean latents and noise after the mask, and the state."""
    before, after = crossing(x0, eps, step)
    options = {"until": 1000.0, **options}
    mask = AdaptiveMask(PATH, anchor, **options)
    x = mask.after_step(step, State(after), State(before), layout).x
    alpha, sigma = levels(PATH, step.s, x)
    return (x - sigma * eps) / alpha, x, after


def test_held_reads_off_what_a_step_held():
    x0, eps = noise(2), noise(2, seed=1)
    for step in STEPS:
        torch.testing.assert_close(held(PATH, step, *crossing(x0, eps, step)), x0)


def test_equal_branches_are_nowhere_edited():
    """|D| > threshold is strict: no difference, no edit, and the target becomes the anchor.

    Nor does a difference by rounding count, which has its own quantiles.
    """
    x0, eps = noise().repeat(2, 1, 1, 1), noise(2, seed=1)
    x0[1] += 1e-8 * noise(seed=2)[0]
    for step in STEPS:
        found, _, _ = run(x0, eps, step, quantile=0.7)
        torch.testing.assert_close(found[1:], ANCHOR[step.index], rtol=0, atol=1e-9)
        torch.testing.assert_close(found[:1], x0[:1], rtol=0, atol=1e-9)


def test_edited_places_keep_the_target_and_its_noise():
    x0, eps, step = noise().repeat(2, 1, 1, 1), noise(2, seed=1), STEPS[-1]
    x0[1, 2, 3, 5] += 4.0  # one channel: masks of the channels are independent
    found, _, _ = run(x0, eps, step)
    edited = torch.zeros(4, 8, 8, dtype=torch.bool)
    edited[2, 2:5, 4:7] = True
    wanted = torch.where(edited, x0[1], ANCHOR[step.index, 0])
    torch.testing.assert_close(found[1], wanted, rtol=0, atol=1e-9)


def test_the_threshold_grows_from_the_minimum_to_the_quantile():
    gap = torch.arange(256, dtype=torch.float64).reshape(1, 4, 8, 8)
    gap = torch.cat([gap, 1000 * gap + 7])
    mask = AdaptiveMask(PATH, ANCHOR, until=1000.0, quantile=0.6, radius=0)
    shares = [mask.edited(gap, step).double().mean((1, 2, 3)) for step in STEPS]
    wanted = [1 - 0.6 * k / 4 for k in range(5)]
    for found, share in zip(shares, wanted, strict=True):  # the same for both images
        torch.testing.assert_close(found, torch.full((2,), share).double(), rtol=0, atol=1 / 256)
    assert shares[0].tolist() == [255 / 256] * 2  # q = 0: all but the smallest


def test_dilation_grows_the_edit_or_what_is_kept():
    gap = torch.zeros(1, 1, 9, 9, dtype=torch.float64)
    gap[..., :5] = 1.0
    for dilate, radius, columns in (
        ("edit", 0, 5), ("edit", 1, 6), ("edit", 2, 7), ("keep", 0, 5), ("keep", 1, 4),
    ):  # fmt: skip
        mask = AdaptiveMask(PATH, ANCHOR, until=1e3, quantile=0.3, radius=radius, dilate=dilate)
        edited = mask.edited(gap, STEPS[-1])
        assert edited[0, 0, 0].tolist() == [k < columns for k in range(9)]


def test_the_source_is_cleaned_where_the_target_is_edited():
    x0, eps, step = noise(2), noise(2, seed=1), STEPS[-1]
    found, _, _ = run(x0, eps, step, clean_source=True, radius=0)
    gap = (x0[0] - x0[1]).abs()
    edited = gap > gap.quantile(0.5)
    anchor = ANCHOR[step.index, 0]
    torch.testing.assert_close(found[1], torch.where(edited, x0[1], anchor), rtol=0, atol=1e-9)
    torch.testing.assert_close(found[0], torch.where(edited, anchor, x0[0]), rtol=0, atol=1e-9)
    without, x, after = run(x0, eps, step, radius=0)
    torch.testing.assert_close(without[1], found[1])
    assert torch.equal(x[0], after[0])


@pytest.mark.parametrize("until", [0.0, 1.0, 201.0])
def test_only_steps_asked_below_the_time_take_part(until):
    x0, eps = noise(2), noise(2, seed=1)
    for step in STEPS:
        _, x, after = run(x0, eps, step, until=until, radius=0)
        assert torch.equal(x, after) == (step.noisy >= until)


def test_runs_without_a_source_and_auxiliary_branches_are_left_alone():
    x0, eps, step = noise(3), noise(3, seed=1), STEPS[-1]
    alone = Layout(("target", "t1", "t2"), 1)
    _, x, after = run(x0, eps, step, layout=alone, radius=0)
    assert torch.equal(x, after)
    helped = Layout(("source", "target", "guide"), 1, auxiliary=("guide",))
    _, x, after = run(x0, eps, step, layout=helped, radius=0)
    assert torch.equal(x[2], after[2]) and not torch.equal(x[1], after[1])


def test_a_batch_of_targets_is_a_loop():
    x0, eps, step = noise(6), noise(6, seed=1), STEPS[-1]
    x0[3:] *= 5  # of another scale: each image has its own quantile
    layout = Layout(("source", "target0", "target1"), 2)
    anchor = noise(2 * GRID.steps, seed=4).reshape(GRID.steps, 2, 4, 8, 8)
    whole, _, _ = run(x0, eps, step, layout=layout, anchor=anchor, radius=0)
    for image in range(2):
        for target in (2, 4):
            rows = [image, target + image]
            alone, _, _ = run(
                x0[rows], eps[rows], step, anchor=anchor[:, image : image + 1], radius=0
            )
            torch.testing.assert_close(whole[rows[1]], alone[1], rtol=0, atol=1e-12)


# --- The editor -----------------------------------------------------------------------------------

SOURCE, TARGET = "a red apple on a cat", "a green apple on a cat"


def invert(method="uniform-maps", steps=5, **options):
    return retour.invert(
        tiny_model(), tiny_picture(), SOURCE, method=method, steps=steps, guidance=5.0, **options
    )


def test_the_editor_is_masactrl_under_the_inversions_mask():
    inversion = invert(mask_until=1.0)
    found, same = (
        retour.edit(inversion, TARGET, editor=e).latents for e in ("uniform-maps", "masactrl")
    )
    assert torch.equal(found, same)
    assert not torch.equal(found, retour.edit(invert("ddim"), TARGET, editor="masactrl").latents)


def test_its_numbers_are_in_place_of_the_inversions():
    changes = {"quantile": 0.9, "mask_until": 1.0, "clean_source": True}
    inversion = invert()
    found = retour.edit(inversion, TARGET, editor="uniform-maps", **changes)
    told = retour.edit(inversion.with_options(**changes), TARGET, editor="masactrl")
    assert torch.equal(found.latents, told.latents) and torch.equal(found.source, told.source)


def test_never_masked_it_is_masactrl_bit_for_bit():
    found = retour.edit(invert(), TARGET, editor="uniform-maps", mask_until=0.0).latents
    assert torch.equal(found, retour.edit(invert("ddim"), TARGET, editor="masactrl").latents)


def test_it_needs_the_faithful_track():
    with pytest.raises(retour.RetourError, match="does not go with inverter 'ddim'.*uniform-maps"):
        retour.edit(invert("ddim"), TARGET, editor="uniform-maps")


@pytest.mark.parametrize(("option", "value"), [("quantile", 1.2), ("mask_until", -0.1)])
def test_settings_out_of_range_are_refused(option, value):
    with pytest.raises(retour.RetourError, match=f"{option} is {value}: choose a number"):
        retour.edit(invert(), TARGET, editor="uniform-maps", **{option: value})
