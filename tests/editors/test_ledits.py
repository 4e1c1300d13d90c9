"""LEDITS++: concepts as guidance, their masks, and the source when there is nothing to add."""

import pytest
import torch

import declarations as claims
import retour
from inverters.jobs import tiny_model, tiny_picture
from retour.core.branches import Branch, Denoiser
from retour.core.path import levels
from retour.core.registry import get
from retour.errors import RetourError

SOURCE = "a red apple on a cat"


@pytest.fixture(scope="module", params=["sd1", "sd3"])
def model(request):
    return tiny_model(request.param, wide=True)


def inverted(model, method="sde-dpm", steps=3, **options):
    return retour.invert(
        model, tiny_picture(), SOURCE, method=method, steps=steps, guidance=5.0, **options
    )


def edit(inversion, target, **options):
    return retour.edit(inversion, target, editor="ledits", **options)


def test_a_whole_prompt_without_masks_is_plain_guidance(model):
    inversion = inverted(model, "euler")
    found = edit(inversion, "a green apple on a cat", masks="none")
    plain = retour.edit(inversion, "a green apple on a cat", editor="reprompt")
    assert claims.relative(found.latents, plain.latents) < 1e-9
    assert found.record["nfe_edit"] == (2 + 1) * 3


def test_a_whole_prompt_moves_the_half_where_it_differs_most_from_the_source(model):
    """All of the correction there, none elsewhere; outside the source."""
    target = "a green apple on a cat"
    inversion = inverted(model, "euler", steps=1)
    every, half = (edit(inversion, target, masks=m).latents for m in ("none", "auto"))
    still = edit(inversion, "green", scale=0.0).latents
    ones = edit(inversion, target, masks="none", scale=1.0).latents  # moved by X_tgt - X_src
    gap = (ones - still).abs().sum(1, keepdim=True)
    wanted = torch.where(gap >= gap.quantile(0.5), every, still)
    torch.testing.assert_close(half, wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize("method", ["sde-dpm", "edit-friendly", "virtual"])
def test_a_target_that_says_what_the_source_says_returns_it(model, method):
    inversion = inverted(model, method)
    found = edit(inversion, SOURCE)
    assert (found.latents - inversion.latents).abs().max() < 1e-9


@pytest.mark.parametrize("method", ["sde-dpm", "edit-friendly", "virtual"])
def test_without_guidance_the_source_returns(model, method):
    inversion = inverted(model, method)
    found = edit(inversion, "green, -red", scale=0.0)
    assert (found.latents - inversion.latents).abs().max() < 1e-9
    idle = edit(inversion, "green, -red", warmup=1.0)
    assert (idle.latents - inversion.latents).abs().max() < 1e-9


def test_that_holds_at_the_guidance_it_was_inverted_with(model):
    inversion = inverted(model, inversion_guidance=3.5)
    found = edit(inversion, "green", scale=0.0)
    assert (found.latents - inversion.latents).abs().max() < 1e-9


def by_hand(inversion, said, *, start=0, stop=99):
    """DDIM with X = X_src + sum s (X_c - X_none)."""
    net, x, path = inversion.model, inversion.noise, inversion.model.path

    def ask(condition):
        return Denoiser(net, [Branch("one", condition, None, 1.0)])(x, step.t)

    for step in inversion.grid.walk(down=True):
        base, none = ask(inversion.condition), ask(inversion.negative)
        x0, eps = base.x0, base.eps
        for text, scale in said if start <= step.position < stop else ():
            found = ask(net.embed([text]))
            x0 = x0 + scale * (found.x0 - none.x0)
            eps = eps + scale * (found.eps - none.eps)
        alpha, sigma = levels(path, step.s, x)
        x = alpha * x0 + sigma * eps
    return x


def test_guidance_is_the_papers_sum(model):
    inversion = inverted(model, "euler")
    found = edit(inversion, "green, -red apple", scale="4,2", masks="none")
    wanted = by_hand(inversion, [("green", 4.0), ("red apple", -2.0)])
    assert claims.relative(found.latents, wanted) < 1e-9
    assert found.record["nfe_edit"] == (2 + 2) * 3


def test_the_scale_is_the_edits_guidance_unless_given(model):
    inversion = inverted(model, "euler")
    given = edit(inversion, "green", masks="none", guidance=2.5).latents
    assert claims.relative(given, by_hand(inversion, [("green", 2.5)])) < 1e-9


def test_warmup_and_cooldown(model):
    inversion = inverted(model, "euler", steps=4)
    found = edit(inversion, "green", scale=4, masks="none", warmup=0.25, cooldown=0.75)
    wanted = by_hand(inversion, [("green", 4.0)], start=1, stop=3)
    assert claims.relative(found.latents, wanted) < 1e-9


def moved(inversion, target, **options):
    """Places (h, w) of the latents that one step moves."""
    still = edit(inversion, target, scale=0.0).latents
    return ((edit(inversion, target, **options).latents - still).abs().amax(1) > 1e-9)[0]


@pytest.mark.parametrize("threshold", [0.5, 0.75, 0.9])
def test_masks_leave_their_quantile_alone(model, threshold):
    inversion = inverted(model, "euler", steps=1)
    places = moved(inversion, "green pear", masks="prediction", threshold=threshold)
    count = places.numel()
    assert abs(int(places.sum()) - (1 - threshold) * count) <= 1
    looked = moved(inversion, "green pear", masks="attention", threshold=threshold)
    # Attention maps may be coarser than the latents: whole cells.
    assert 0 < int(looked.sum()) <= (1 - threshold) * count + 16
    both = moved(inversion, "green pear", masks="both", threshold=threshold)
    assert torch.equal(both, places & looked)


def test_prediction_masks_sit_where_the_concept_speaks_loudest(model):
    inversion = inverted(model, "euler", steps=1)
    gap = (moved_by(inversion, "none"), moved_by(inversion, "prediction"))
    loud = gap[0].abs().sum(1) >= torch.quantile(gap[0].abs().sum(1).flatten(), 0.75)
    assert torch.equal(loud, gap[1].abs().sum(1) > 0)


def moved_by(inversion, masks):
    still = edit(inversion, "green", scale=0.0).latents
    change = edit(inversion, "green", scale=1.0, masks=masks, threshold=0.75).latents - still
    return torch.where(change.abs() > 1e-9, change, 0.0)


def test_each_concept_has_its_own_threshold(model):
    inversion = inverted(model, "euler", steps=1)
    apart = [
        moved(inversion, "green", masks="prediction", threshold=0.9),
        moved(inversion, "cat", masks="prediction", threshold=0.5),
    ]
    both = moved(inversion, "green, cat", masks="prediction", threshold="0.9,0.5")
    assert torch.equal(both, apart[0] | apart[1])


@pytest.mark.parametrize("method", ["sde-dpm", "virtual", "edict", "bdia", "direct"])
def test_further_branches_stand_where_their_target_stands(method):
    """Whatever the solver remembers or asks in between."""
    inversion = inverted(tiny_model(wide=True), method)
    states = []
    edit(inversion, "green, -red", observers=[lambda e: states.append((e.denoiser, e.state))])
    for denoiser, state in states:
        parts = dict(denoiser.layout.split(state.x))
        for name in ("target/none", "target/0", "target/1"):
            assert torch.equal(parts[name], parts["target"])


def test_a_batch_of_unequal_concepts_does_what_its_images_do_alone():
    net = tiny_model(wide=True)
    prompts = [SOURCE, "a cat", SOURCE]
    targets = ["green, -red", "photo of a pear", "a green apple on a cat"]
    batch = retour.invert(
        net, [tiny_picture(k) for k in range(3)], prompts, method="sde-dpm", steps=3, guidance=5.0
    )
    edited = edit(batch, targets)
    for k in range(3):
        one = retour.invert(
            net, tiny_picture(k), prompts[k], method="sde-dpm", steps=3, guidance=5.0
        )
        alone = edit(one, targets[k]).latents[0]
        torch.testing.assert_close(edited.latents[k], alone, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    "target, options, says",
    [
        ("green,,red", {}, "empty concept"),
        ("-", {}, "empty concept"),
        ("a, b, red", {"scale": "1,2"}, "2 values of scale for 3"),
        ("green", {"threshold": "high"}, "threshold is 'high'"),
        ("green", {"threshold": 1.5}, "threshold"),
        ("a green apple on a cat", {"read": "sentence"}, "read"),
        ("green", {"scale": -1.0}, "scale"),
    ],
)
def test_bad_input_is_one_sentence(target, options, says):
    inversion = inverted(tiny_model(), steps=1)
    with pytest.raises(RetourError, match=says):
        edit(inversion, target, **options)


def test_it_is_registered_with_its_paper():
    assert get("edit", "ledits").paper.arxiv == "2311.16711"
