"""Negative-prompt inversion: the way of guidance 1 at any guidance, and what lies between."""

import math

import pytest
import torch

import retour
from inverters.pivots import FREE, STEPS, TARGET, close, invert
from retour import api
from retour.errors import RetourError
from retour.inverters.negative_prompt import slerp

FAMILIES = ("sd1", "sd2", "sdxl", "sd3")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_source_takes_the_way_of_guidance_one(family):
    """SDXL and SD3 too: the pooled embeddings are exchanged with the others."""
    straight = api.reconstruct(invert("ddim", family), guidance=1.0).latents
    for guidance in (2.0, 7.5, 15.0):
        inversion = invert("negative-prompt", family, guidance=guidance)
        close(api.reconstruct(inversion).latents, straight)
    assert not torch.allclose(api.reconstruct(invert("ddim", family)).latents, straight, atol=1e-2)


def test_a_target_is_pushed_away_from_the_source_prompt():
    inversion = invert("negative-prompt")
    edited = retour.edit(inversion, TARGET, **FREE)
    by_hand = invert("ddim", negative=inversion.prompts[0])
    close(edited.latents, retour.edit(by_hand, TARGET, **FREE).latents)


def test_it_costs_what_ddim_costs():
    for method in ("ddim", "negative-prompt"):
        inversion = invert(method)
        assert inversion.record["nfe"] == STEPS
        assert retour.edit(inversion, TARGET).record["nfe_edit"] == 4 * STEPS


def test_interpolation_ends_at_plain_guidance():
    latents = [
        api.reconstruct(invert("negative-prompt", "sdxl", interpolation=part)).latents
        for part in (0.0, 0.5, 1.0)
    ]
    plain = api.reconstruct(invert("ddim", "sdxl")).latents
    close(latents[2], plain, 1e-5)  # embeddings are float32, angles lose some of their digits
    assert (latents[1] - plain).abs().max() > 1e-2 < (latents[1] - latents[0]).abs().max()


def test_the_interpolation_may_change_on_the_way_back():
    inversion = invert("negative-prompt").with_options(interpolation=0.3)
    other = invert("negative-prompt", interpolation=0.3)
    assert torch.equal(api.reconstruct(inversion).latents, api.reconstruct(other).latents)


def test_slerp_turns_at_constant_speed_over_whole_images():
    a = torch.tensor([[[3.0, 0.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]]])
    b = torch.tensor([[[0.0, 0.0], [0.0, 3.0]], [[2.0, 0.0], [0.0, 2.0]]])
    third = slerp(a, b, 1 / 3)
    wanted = torch.tensor([[3 * math.cos(math.pi / 6), 0.0], [0.0, 3 * math.sin(math.pi / 6)]])
    torch.testing.assert_close(third[0], wanted)
    torch.testing.assert_close(third[1], a[1] * 4 / 3)  # parallel: a straight line
    assert torch.equal(slerp(b, b, 0.7), b)
    torch.testing.assert_close(slerp(a, b, 1.0), b)
    assert slerp(torch.ones(2), torch.ones(2), 0.5).tolist() == [1, 1]


@pytest.mark.parametrize("part", [-0.1, 1.5])
def test_an_interpolation_outside_is_refused(part):
    with pytest.raises(RetourError, match=f"interpolation is {part}: choose a number from 0 to 1"):
        invert("negative-prompt", interpolation=part)
