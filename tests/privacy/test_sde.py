"""SCA's own way back: noise maps of SDE-DPM-Solver++, walked by one rule in both directions."""

import numpy as np
import pytest
import torch

import retour
import retour.privacy.base
import tiny
from privacy import cases
from retour.core.registry import get
from retour.inverters.base import Replay


def job(steps=10, guidance=4.5, prompt="red", **options):
    return cases.job(
        cases.squares(2),
        method="sde-dpm",
        steps=steps,
        guidance=guidance,
        prompt=prompt,
        inversion_guidance=guidance,
        strength=1.0,
        **options,
    )


@pytest.mark.parametrize("steps", [5, 10, 20, 50])
@pytest.mark.parametrize(("guidance", "prompt"), [(1.0, "red"), (4.5, "red"), (7.5, "")])
def test_unchanged_latents_give_the_image(steps, guidance, prompt):
    """In float64, whatever the guidance, the prompt and the number of steps."""
    work = job(steps, guidance, prompt)
    assert (work.denoise(work.start) - work.inversion.latents).abs().max() <= 1e-12


@pytest.mark.parametrize("steps", [5, 10])
def test_unchanged_latents_give_the_image_with_a_float32_network(steps):
    """Of velocities: a noise predictor's rounding is divided by alpha = 0.07 at the noisy end."""
    options = {"method": "sde-dpm", "steps": steps, "guidance": 4.5, "inversion_guidance": 4.5}
    image = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))
    inversion = retour.invert(retour.load(tiny.sd2()), image, "a red apple", **options)
    found = retour.privacy.base.WayBack(inversion)(inversion.noise)
    assert (found - inversion.latents).abs().max() <= 1e-5


def test_a_sampler_of_lower_final_order_does_not_return():
    """The published code samples by another rule than it inverts, in the last of few steps."""
    work = job()
    replay = work.denoise.replay
    solver = get("solver", "sde-dpm").make(lower_order_final=True)
    work.denoise.replay = Replay(solver, replay.state, replay.control)
    assert (work.denoise(work.start) - work.inversion.latents).abs().max() > 1e-5


def test_recorded_noise_is_wide_and_each_step_works_against_the_one_before():
    """Independent noising: wider than unit noise, neighbours anticorrelated; kept in float64."""
    noise = job(steps=10).inversion.extras["noise"]
    assert noise.dtype == torch.float64
    # The last interval is left out: its noise holds what the network cannot tell of the picture.
    inner = noise[1:].flatten(1)
    assert (inner[:-1].var(1) > 1).all()
    pairs = [np.corrcoef(a, b)[0, 1] for a, b in zip(inner[:-1], inner[1:], strict=True)]
    assert np.mean(pairs) < -0.1


def test_the_attack_inverts_and_returns_at_one_guidance():
    image = cases.square()
    result = retour.attack(
        cases.model(),
        image,
        "red",
        classifier=cases.classifier(),
        prompt="red",
        iterations=1,
        guidance=4.5,
        strength=1.0,
        radius=0.001,
    )
    record = result.record
    assert record["inverter"] == "sde-dpm"
    assert record["inverter_options"]["inversion_guidance"] == 4.5
    assert record["inverter_options"]["strength"] == 1.0
    shown = np.asarray(retour.io.read_image(image))
    assert np.array_equal(np.asarray(result.reconstructions[0]), shown)
    # 2n to invert, 2n for each of two X, for the gradient between them and for the last D.
    assert record["nfe"] == 2 * 10 * (1 + 2 + 1 + 1)
    assert [len(record["inversion"][k]) for k in ("prompts", "placements")] == [1, 1]


def test_only_the_first_latents_change():
    """The maps stay as they are: what is found differs from the inversion in x_T alone."""
    work = job()
    before = work.inversion.extras["noise"].clone()
    get("attack", "sca").make(iterations=3).attack(work)
    assert torch.equal(work.inversion.extras["noise"], before)
