"""SCA on the embedded UNet and classifiers; slow."""

from functools import lru_cache

import numpy as np
import pytest

import retour
from retour.demo import examples
from retour.evaluate.stats import paired_difference
from retour.privacy.base import WayBack

NAMES = ("apple", "cat", "butterfly", "rose", "house", "ghost")
pytestmark = pytest.mark.slow


@lru_cache
def model():
    return retour.load("emoji-unet")


def shown():
    pictures = examples()[0]
    return [pictures[n][0] for n in NAMES], [pictures[n][1] for n in NAMES]


@lru_cache
def attacked(inverter):
    images, prompts = shown()
    options = {"inverter": inverter, "iterations": 3, "reference": 16384}
    return retour.attack(model(), images, list(NAMES), prompt=prompts, **options)


def measured(inverter, name):
    return [r["distances"]["adversarial"][name] for r in attacked(inverter).record["results"]]


@pytest.mark.parametrize("steps", [5, 10, 20])
def test_unchanged_latents_give_the_image(steps):
    """A float32 network rounds, and differently in the inversion's one large batch."""
    images, prompts = shown()
    inversion = retour.invert(
        model(),
        images[:2],
        prompts[:2],
        method="sde-dpm",
        steps=steps,
        guidance=4.5,
        inversion_guidance=4.5,
        strength=1.0,
    )
    assert (WayBack(inversion)(inversion.noise) - inversion.latents).abs().max() <= 1e-4


def test_both_classifiers_are_right_before():
    for one, name in zip(attacked("sde-dpm").record["results"], NAMES, strict=True):
        assert one["was_right"]
        assert {p["label"] for p in one["predictions"]["reconstruction"].values()} == {name}


def test_margins_rise():
    trace = attacked("sde-dpm").found.trace
    assert (trace.amax(0) >= trace[0]).all() and (trace.amax(0) - trace[0]).mean() > 0.3


def test_pictures_stay_nearer_than_on_ddim_latents():
    """PSNR and structure, picture by picture, with intervals that exclude zero."""
    for name, sign in (("psnr", 1), ("structure", -1)):
        gap = paired_difference(measured("sde-dpm", name), measured("ddim", name))
        assert gap.apart and np.sign(gap.mean) == sign, name
