"""Proximal and inversion guidance: the operators, what returns, and what is left alone."""

from dataclasses import replace

import pytest
import torch

import retour
from editors import runs
from inverters.jobs import tiny_model, tiny_picture
from problems import PATHS, points
from retour.core.branches import Branch, Wrapped
from retour.core.control import Control
from retour.core.guidance import CFG, Interval, Rescaled
from retour.core.path import Prediction, levels, predict
from retour.core.registry import get
from retour.editors.proximal import InversionGuidance, Proximal
from retour.errors import RetourError

SOURCE, TARGET = "a red apple on a blue background", "a green apple on a blue background"
STEPS = 5


def pair(count=3, seed=0, gap=1.0):
    """Two predictions about the same latents, with their levels and the latents."""
    x = runs.noise(count, seed)
    alpha, sigma = levels(PATHS["vp"], 0.4, x)
    first, second = runs.noise(count, seed + 1), gap * runs.noise(count, seed + 2)
    cond, uncond = (predict("eps", e, x, alpha, sigma) for e in (first + second, first))
    return cond, uncond, x, alpha, sigma


def scale(w, count=3):
    return torch.full((count, 1, 1, 1), w, dtype=torch.float64)


def thresholds(gap, q):
    return torch.stack([row.abs().quantile(q) for row in gap])[:, None, None, None]


# --- The rule -------------------------------------------------------------------------------------


@pytest.mark.parametrize("q", [0.25, 0.7])
@pytest.mark.parametrize("prox", ["l0", "l1"])
def test_the_operators_on_the_noise(prox, q):
    cond, uncond, *_ = pair()
    gap = cond.eps - uncond.eps
    limit = thresholds(gap, q)
    hard = torch.where(gap.abs() > limit, gap, 0.0)
    soft = gap.sign() * (gap.abs() - limit).clamp_min(0)
    found = Proximal(q, prox)(cond, uncond, scale(5.0))
    wanted = uncond.eps + 5.0 * (hard if prox == "l0" else soft)
    torch.testing.assert_close(found.eps, wanted, rtol=1e-10, atol=1e-10)
    assert ((found.eps != uncond.eps).double().mean() - (1 - q)).abs() < 0.01


def test_places_are_kept_or_left_with_all_of_their_channels():
    """The published rule leaves channels of a place behind, which is another colour."""
    cond, uncond, *_ = pair()
    size = (cond.velocity - uncond.velocity).square().mean(1, keepdim=True).sqrt()
    kept = size > thresholds(size, 0.7)
    found = Proximal(0.7, each="place")(cond, uncond, scale(5.0))
    plain = CFG()(cond, uncond, scale(5.0))
    wanted = torch.where(kept, plain.eps, uncond.eps)
    torch.testing.assert_close(found.eps, wanted, rtol=1e-10, atol=1e-10)
    alone = Proximal(0.7)(cond, uncond, scale(5.0))
    mixed = (alone.eps != uncond.eps).double().mean(1)
    assert ((0 < mixed) & (mixed < 1)).any()


def test_the_published_operator_and_its_mask():
    """Clamp over both rows, of which the source's differences are zeros; mask of what is left."""
    cond, uncond, *_ = pair(1)
    gap, seen = cond.eps - uncond.eps, []
    both = torch.cat([torch.zeros_like(gap), gap])
    limit = both.abs().quantile(0.7)
    left = gap - gap.clamp(-limit, limit)
    found = Proximal(0.7, "published", watch=seen.append)(cond, uncond, scale(5.0, 1))
    torch.testing.assert_close(found.eps, uncond.eps + 5.0 * left, rtol=1e-10, atol=1e-10)
    assert torch.equal(seen[0], left.abs() > limit)
    alone = Proximal(0.4, "l1")(cond, uncond, scale(5.0, 1))
    torch.testing.assert_close(found.eps, alone.eps, rtol=0, atol=0.1)


@pytest.mark.parametrize("prox", ["l0", "l1", "published"])
def test_both_faces_stay_consistent(prox):
    cond, uncond, x, alpha, sigma = pair()
    found = Proximal(0.6, prox)(cond, uncond, scale(7.5))
    torch.testing.assert_close(alpha * found.x0 + sigma * found.eps, x)


@pytest.mark.parametrize("prox", ["l0", "l1"])
def test_without_a_threshold_it_is_plain_guidance(prox):
    cond, uncond, *_ = pair()
    found, plain = Proximal(0.0, prox)(cond, uncond, scale(5.0)), CFG()(cond, uncond, scale(5.0))
    torch.testing.assert_close(found.eps, plain.eps, rtol=0, atol=1e-3)


def test_equal_prompts_have_nothing_to_edit_whatever_the_rounding():
    cond, uncond, *_ = pair(gap=1e-7)
    seen = []
    found = Proximal(0.7, watch=seen.append)(cond, uncond, scale(7.5))
    assert torch.equal(found.eps, uncond.eps) and not seen[0].any()


def test_images_have_their_own_thresholds():
    cond, uncond, *_ = pair()
    sizes = torch.tensor([1.0, 10.0, 0.1]).double().reshape(3, 1, 1, 1)
    cond = Prediction(
        uncond.x0 + sizes * (cond.x0 - uncond.x0), uncond.eps + sizes * (cond.eps - uncond.eps)
    )
    together = Proximal()(cond, uncond, scale(5.0))
    for i in range(3):
        rows = slice(i, i + 1)
        alone = Proximal()(*(p.map(lambda f: f[rows]) for p in (cond, uncond)), scale(5.0, 1))  # noqa: B023
        assert torch.equal(together.eps[rows], alone.eps)


def test_it_wraps_other_rules():
    cond, uncond, *_ = pair()
    rule = Proximal(0.5, inner=Interval(0.2, 0.6, Rescaled()))
    assert rule.active(0.4) and not rule.active(0.8)
    kept = (cond.eps - uncond.eps).abs() > thresholds(cond.eps - uncond.eps, 0.5)
    near = Prediction(
        torch.where(kept, cond.x0, uncond.x0), torch.where(kept, cond.eps, uncond.eps)
    )
    wanted = Rescaled()(near, uncond, scale(5.0))
    torch.testing.assert_close(rule(cond, uncond, scale(5.0)).eps, wanted.eps)


def test_it_serves_any_run():
    model = tiny_model("sd1")
    made = retour.invert(model, tiny_picture(), SOURCE, steps=2, guidance=5.0)
    plain, other = (
        retour.edit(made, TARGET, editor="reprompt", rule=rule).latents
        for rule in (None, Proximal())
    )
    assert (plain - other).abs().max() > 1e-3


# --- The editor -----------------------------------------------------------------------------------


def make(**options):
    return get("edit", "proximal").make(**options)


def edited(family="sd1", sources=(SOURCE,), targets=(TARGET,), start=None, **options):
    inversion = runs.inversion(family, list(sources), STEPS, start)
    return inversion, runs.edit(family, make(**options), inversion, {"target": tuple(targets)})


@pytest.mark.parametrize("family", ["sd1", "sdxl", "sd3"])
def test_identical_prompts_return_the_image(family):
    inversion, found = edited(family, targets=(SOURCE,))
    assert torch.equal(found["target"], inversion.latents)
    assert torch.equal(found["source"], inversion.latents)


@pytest.mark.parametrize("family", ["sd1", "sd3"])
def test_unedited_places_return_exactly(family):
    inversion, found = edited(family, dilation=0, quantile=0.9, edited="step", each="number")
    moved = (found["target"] != inversion.latents).double().mean()
    assert 0.05 < moved <= 0.1 + 1 / 256
    assert torch.equal(found["source"], inversion.latents)


def test_dilation_widens_the_edit():
    shares = []
    for dilation in (0, 1, 2):
        inversion, found = edited(dilation=dilation, quantile=0.9)
        shares.append(float((found["target"] != inversion.latents).double().mean()))
    assert shares == sorted(shares) and shares[0] < shares[1] < shares[2]


def test_what_was_edited_in_any_step_stays_so():
    shares = {}
    for kind in ("step", "run"):
        inversion, found = edited(dilation=0, quantile=0.9, edited=kind, each="number")
        shares[kind] = float((found["target"] != inversion.latents).double().mean())
    assert 0.1 < shares["run"] < 1 and shares["step"] < shares["run"] <= 0.5 + 5 / 256


def test_part_of_the_pull_goes_part_of_the_way():
    ends = []
    for pull in (0.0, 0.5, 1.0):
        inversion, found = edited(pull=pull, pull_last=0.2, quantile=0.9)  # the last step alone
        ends.append(found["target"] - inversion.latents)
    # Where everything returns at 1, half of the gap is left at 0.5.
    back = ends[2] == 0
    assert back.any()
    torch.testing.assert_close(ends[1][back], ends[0][back] / 2)
    torch.testing.assert_close(ends[1][~back], ends[0][~back])


def test_without_both_it_is_prompt_to_prompt():
    same = {"mode": "refine", "cross_steps": 0.8}
    inversion, found = edited(pull=0.0, quantile=0.0, negative="inversion")
    plain = runs.edit("sd1", get("edit", "p2p").make(**same), inversion, {"target": (TARGET,)})
    for name in ("source", "target"):  # differences of the size of rounding are left out
        torch.testing.assert_close(found[name], plain[name], rtol=0, atol=1e-2)


def test_only_the_last_steps_are_pulled():
    inversion, found = edited(pull_last=0.0, pull=1.0)
    _, none = edited(pull=0.0)
    assert torch.equal(found["target"], none["target"])
    _, late = edited(pull_last=0.2)
    assert not torch.equal(late["target"], none["target"])


def test_the_source_prompt_is_the_negative_one():
    """So the source takes the way of guidance 1, at any guidance."""
    inversion, found = edited(pull=0.0)
    straight = runs.edit(
        "sd1", get("edit", "p2p").make(), inversion, {"target": (TARGET,)}, scale=1.0
    )
    torch.testing.assert_close(found["source"], straight["source"], rtol=0, atol=1e-10)
    _, other = edited(pull=0.0, negative="inversion")
    assert (other["source"] - straight["source"]).abs().max() > 1e-2


def test_an_inverter_s_own_negative_prompt_stays():
    inversion = runs.inversion("sd1", [SOURCE], STEPS)
    model = runs.model("sd1")
    guide = InversionGuidance(inversion, Proximal())
    own = model.embed(["a cat"])
    target = Branch("target", model.embed([TARGET]), own, 5.0)
    [step, *_] = inversion.grid.walk(down=True)
    [kept] = guide.branches(step, (target,))
    assert kept.uncond is own and kept.scale == 5.0
    [changed] = guide.branches(step, (replace(target, uncond=model.embed([""])),))
    assert changed.uncond.prompts == (SOURCE,) and changed.scale == 5.0
    less = InversionGuidance(inversion, Proximal(), push=0.25)
    [changed] = less.branches(step, (replace(target, uncond=model.embed([""])),))
    assert changed.scale == 2.0 and less.branches(step, (target,))[0].scale == 5.0
    [bare] = guide.branches(step, (replace(target, uncond=None),))
    assert bare.uncond is None


def test_a_batch_is_its_images():
    sources, targets = [SOURCE, "a cat", "a red pear"], [TARGET, "a cat", "a photo of a pear"]
    start = runs.noise(3)
    _, together = edited(sources=sources, targets=targets, start=start)
    for i in range(3):
        rows = slice(i, i + 1)
        _, alone = edited(sources=sources[rows], targets=targets[rows], start=start[rows])
        torch.testing.assert_close(together["target"][rows], alone["target"], rtol=0, atol=1e-10)


def test_several_targets_have_their_own_masks():
    inversion = runs.inversion("sd1", [SOURCE], STEPS)
    targets = {"target0": (TARGET,), "target1": ("a photo of a cat",)}
    together = runs.edit("sd1", make(), inversion, targets)
    for name, prompts in targets.items():
        alone = runs.edit("sd1", make(), inversion, {"target": prompts})["target"]
        torch.testing.assert_close(together[name], alone, rtol=0, atol=1e-10)


class Asks(Control):
    """Asks the same guided network about other latents, around the solver's own question."""

    def denoiser(self, step, denoise, layout):
        def rule(prediction, x, t):
            denoise(x + 1, t)
            return prediction

        return Wrapped(denoise, rule)


def test_masks_are_those_of_the_solver_s_own_evaluation():
    inversion, alone = edited()
    inner = runs.edit("sd1", make(), inversion, {"target": (TARGET,)}, extra=[Control()])
    assert torch.equal(inner["target"], alone["target"])


def test_guidance_one_measures_nothing_and_still_runs():
    inversion = runs.inversion("sd1", [SOURCE], STEPS)
    found = runs.edit("sd1", make(), inversion, {"target": (TARGET,)}, scale=1.0)
    assert torch.equal(found["source"], inversion.latents)
    assert (found["target"] - inversion.latents).abs().max() > 1e-3


@pytest.mark.parametrize("method", ["edict", "direct", "spdinv", "fixed-point", "null-text"])
def test_it_goes_with_every_trajectory(method):
    """Coupled copies and other memories are pulled with the latents."""
    options = {"strength": 1.0} if method == "edict" else {}
    model = tiny_model("sd3", wide=True)
    made = retour.invert(
        model, tiny_picture(), SOURCE, method=method, steps=4, guidance=3.0, **options
    )
    result = retour.edit(made, TARGET, editor="proximal")
    assert torch.equal(result.source, made.latents)
    assert (result.latents - made.latents).abs().max() > 1e-3


def test_evaluations_are_counted():
    model = tiny_model("sd1")
    for method, rows in (("ddim", 3), ("negative-prompt", 3)):
        made = retour.invert(model, tiny_picture(), SOURCE, method=method, steps=4, guidance=5.0)
        assert retour.edit(made, TARGET, editor="proximal").record["nfe_edit"] == rows * 4
        other = retour.edit(made, TARGET, editor="proximal", negative="inversion")
        assert other.record["nfe_edit"] == 4 * (4 if method == "ddim" else 3)


def test_points_need_no_attention_to_be_thresholded():
    """The rule alone serves latents of any size."""
    x = points(4)
    alpha, sigma = levels(PATHS["vp"], 0.4, x)
    cond, uncond = (predict("eps", e, x, alpha, sigma) for e in (x, 2 * x))
    assert torch.isfinite(Proximal()(cond, uncond, scale(2.0, 4)).eps).all()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"quantile": 1.5}, "quantile is 1.5"),
        ({"pull": -0.1}, "pull is -0.1"),
        ({"pull_last": 2.0}, "pull_last is 2.0"),
        ({"dilation": -1}, "dilation is -1"),
        ({"push": 1.5}, "push is 1.5"),
        ({"each": "row"}, "row"),
        ({"prox": "l2"}, "l2"),
        ({"cross_steps": 2.0}, "cross_steps is 2.0"),
    ],
)
def test_bad_options_are_refused(options, says):
    with pytest.raises(RetourError, match=says):
        make(**options)
