"""SCA on the embedded UNet and classifiers; slow."""

from functools import lru_cache

import pytest
import torch

import retour
from retour.core.registry import get
from retour.demo import examples
from retour.privacy import load_classifier
from retour.privacy.base import AttackJob, WayBack
from retour.privacy.classifiers import stacked

NAMES = ("apple", "cat", "house")
pytestmark = pytest.mark.slow


@lru_cache
def model():
    return retour.load("emoji-unet")


@lru_cache
def inverted(steps, guidance, strength, net=None):
    pictures = examples()[0]
    images, prompts = zip(*(pictures[n] for n in NAMES), strict=True)
    options = {"inversion_guidance": guidance, "strength": strength}
    given = {"method": "sde-dpm", "steps": steps, "guidance": guidance}
    inversion = retour.invert(net or model(), list(images), list(prompts), **given, **options)
    judge = load_classifier()
    labels = torch.tensor([judge.index(n) for n in NAMES])
    return AttackJob(inversion, judge, labels, stacked(images))


def search(**options):
    """Margins at every turn, best so far, from one inversion."""
    job = inverted(10, 1.8, 0.4)
    trace = get("attack", "sca").make(keep="margin", **options).attack(job).trace
    return trace.cummax(0).values


def gap(job):
    found = WayBack(job.inversion)(job.start)
    return float((found - job.inversion.latents).abs().max())


def test_unchanged_latents_give_the_image():
    """At the attack's defaults, up to what a float32 network rounds, otherwise in every batch."""
    assert gap(inverted(10, 1.8, 0.4)) <= 1e-5


@pytest.mark.parametrize("steps", [5, 10])
def test_unchanged_latents_give_the_image_whatever_the_guidance(steps):
    """At the paper's guidance the walk amplifies float32's rounding; a float64 network has none."""
    wide = retour.load("emoji-unet", dtype=torch.float64)
    assert gap(inverted(steps, 4.5, 1.0, wide)) <= 1e-10


def test_the_full_gradient_is_that_of_finite_differences():
    """Along itself, where a float32 network's rounding is far below the rise."""
    job = inverted(10, 1.8, 0.4)
    x, aim = job.start, torch.ones_like(job.start)
    gradient = job.denoise.pull(x, job.denoise.track(x), aim)
    move = gradient / gradient.flatten(1).norm(dim=1)[:, None, None, None]
    rise = (job.denoise(x + 0.02 * move) - job.denoise(x - 0.02 * move)).sum((1, 2, 3)) / 0.04
    torch.testing.assert_close(rise, (gradient * move).sum((1, 2, 3)), rtol=0.05, atol=0)


def test_a_large_guidance_in_few_steps_amplifies_what_a_small_one_damps():
    """Why the default guidance is a share of the model's own: else, coloured noise."""
    gaps = {}
    for guidance in (1.8, 4.5):
        job = inverted(10, guidance, 1.0)
        noise = torch.randn(job.start.shape, generator=torch.Generator().manual_seed(0)).double()
        moved = job.denoise(job.start + 0.1 * noise.sign())
        gaps[guidance] = (moved - job.inversion.latents).abs().mean((1, 2, 3))
    assert (gaps[1.8] < 0.1).all() and (gaps[4.5] > 2 * gaps[1.8]).all()


def test_margins_rise_with_iterations_and_radius_and_more_by_the_full_gradient():
    small, large = search(radius=0.05, iterations=3), search(radius=0.2, iterations=3)
    skipped = search(radius=0.2, iterations=3, gradient="skip")
    assert (large[-1] > small[-1]).all() and (large[-1] > skipped[-1]).all()
    assert (large[-1] - large[0]).mean() > 2 * (skipped[-1] - skipped[0]).mean()
    assert (search(radius=0.0, iterations=0)[0] < 0).all()
