"""The shipped models: plain diffusers loads them, and the declarations hold on real networks."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch

import declarations as claims
import retour
from declarations import denoiser, error, go, slope
from retour.api import encode
from retour.core.grid import lambda_grid
from retour.core.registry import Entry, entries
from retour.demo import examples
from retour.models.load import WEIGHTS

MODELS = sorted(retour.embedded())
PROMPT = "a 3d render of a red apple on a sky blue background"
EDIT = "a 3d render of a green apple on a sky blue background"


@lru_cache
def model(name: str, dtype: str = "float32"):
    return retour.load(name, dtype=dtype)


@lru_cache
def latents(name: str):
    return encode(model(name), [examples()[0]["apple"][0]])


def test_both_models_are_there():
    assert {"emoji-unet", "emoji-mmdit"} <= set(MODELS)


def test_plain_diffusers_loads_the_unet():
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(WEIGHTS / "emoji-unet")
    pipe.set_progress_bar_config(disable=True)
    picture = pipe(PROMPT, num_inference_steps=2, height=64, width=64).images[0]
    assert picture.size == (64, 64)


def test_plain_diffusers_loads_the_mmdit():
    from diffusers import StableDiffusion3Pipeline

    pipe = StableDiffusion3Pipeline.from_pretrained(WEIGHTS / "emoji-mmdit")
    pipe.set_progress_bar_config(disable=True)
    picture = pipe(PROMPT, num_inference_steps=2, height=64, width=64, max_sequence_length=1)
    assert picture.images[0].size == (64, 64)


@pytest.mark.parametrize("name", MODELS)
def test_direct_source_decodes_to_the_vae_reconstruction(name):
    picture, prompt = examples()[0]["apple"]
    inversion = retour.invert(model(name), picture, prompt, steps=10)
    result = retour.edit(inversion, EDIT, editor="p2p")
    found = model(name).decode(result.source)
    wanted = model(name).decode(encode(model(name), [picture]))
    assert (found - wanted).abs().max() <= 1e-5


def costly(entry: Entry):
    """A solver as a test's parameter, slow if it asks more than twice a step."""
    marks = [pytest.mark.slow] if entry.facts["nfe_per_step"] > 2 else []
    return pytest.param(entry, marks=marks, id=entry.name)


ALGEBRAIC = [e for e in entries("solver") if e.exact and "exact_to" not in e.facts]
ITERATING = [e for e in entries("solver") if e.exact and "exact_to" in e.facts]


@pytest.mark.parametrize("entry", [costly(e) for e in ALGEBRAIC])
@pytest.mark.parametrize("name", MODELS)
def test_exact_solvers_return_at_guidance_7_5(name, entry):
    """50 steps at guidance 7.5 with a float32 network and float64 state."""
    grid = model(name).grid(50)
    claims.assert_exact(entry, model(name), latents(name), grid, prompt=PROMPT, scale=7.5)


@pytest.mark.parametrize("entry", ITERATING, ids=lambda e: e.name)
@pytest.mark.parametrize("name", MODELS)
def test_iterating_solvers_return_at_the_model_s_guidance(name, entry):
    """What a step leaves over is amplified on the way back, and the more so by guidance."""
    net = model(name)
    grid, scale = net.grid(20), net.default_guidance
    claims.assert_exact(entry, net, latents(name), grid, prompt=PROMPT, scale=scale)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("entry", ALGEBRAIC, ids=lambda e: e.name)
@pytest.mark.parametrize("name", MODELS)
def test_exact_solvers_return_with_half_precision_networks(name, entry, dtype):
    half, grid = model(name, dtype), model(name).grid(50)
    claims.assert_exact(entry, half, latents(name), grid, prompt=PROMPT, scale=7.5)


def middle(path, steps):
    """A grid over a fiftieth of the path.

    A trained network's answer swings with its sinusoidal embedding of the time, within a few of its
    1,000 trained levels; a solver's order shows only where several steps fall on one swing. (Over
    most of the path, up to 64 steps, every second-order solver converges like 1/N.)
    """
    return lambda_grid(path, steps, 0.50 * path.t_noise, 0.52 * path.t_noise)


@lru_cache
def crossing(name: str, down: bool):
    """A float64 network, a point of a real trajectory, and where a fine grid leads from there."""
    net = model(name, "float64")
    denoise, path = denoiser(net, 1, PROMPT, 1.0), net.path
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)).double()
    start = path.add_noise(latents(name), noise, (0.52 if down else 0.50) * path.t_noise)
    [reference] = [e for e in entries("solver") if e.name == "heun"]
    goal = go(reference.make(), denoise, start, middle(path, 300), down=down).x
    return denoise, start, goal


@pytest.mark.slow
@pytest.mark.parametrize("down", [True, False], ids=["generation", "inversion"])
@pytest.mark.parametrize(
    "entry", [e for e in entries("solver") if e.order is not None], ids=lambda e: e.name
)
@pytest.mark.parametrize("name", MODELS)
def test_orders_hold_on_real_networks(name, entry, down):
    """On a stretch of a real trajectory, in a float64 network."""
    order = entry.order if down else entry.facts.get("inversion_order", entry.order)
    if order is None:
        pytest.skip("declares no order in this direction")
    steps, path = (16, 32, 64), model(name, "float64").path
    denoise, start, goal = crossing(name, down)
    # Exact solvers show a float32 network a rounded state, which leaves errors of about 1e-7.
    sharp = {"input_bits": None} if "input_bits" in vars(entry.make().options) else {}
    solver = entry.make(**entry.facts.get("tight", {}), **sharp)
    errors = [error(go(solver, denoise, start, middle(path, n), down=down).x, goal) for n in steps]
    assert abs(slope(steps, errors) - order) < 0.3


@pytest.mark.parametrize("name", MODELS)
def test_a_guess_of_the_prompt_is_said(name):
    picture, _ = examples()[0]["apple"]
    inversion = retour.invert(model(name), picture, steps=2)
    assert inversion.record["prompts_proposed"]
    assert "background" in inversion.prompts[0]
