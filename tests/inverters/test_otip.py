"""OTIP: when it is RF-Inversion, what its transport does to each token, where it may act."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from declarations import error, relative
from inverters.test_rf_inversion import DATA, back, invert, job
from problems import PATHS, ProblemModel, pictures
from retour.core.branches import Branch, Denoiser
from retour.core.grid import flow_grid
from retour.core.registry import get
from retour.errors import RetourError
from retour.inverters.otip import token_norm

PLAIN = {"clip": None, "respect_prompt": False}
PICTURES = ProblemModel(pictures(), PATHS["flow"], "velocity")


def options(**given):
    return get("invert", "otip").make(**given).options


def picture_job(images=2, grid=None):
    data = 0.3 * torch.randn(images, 3, 8, 8, generator=torch.Generator().manual_seed(2)).double()
    return job(PICTURES, data, flow_grid(28) if grid is None else grid)


def test_schedule_of_the_transport():
    """Cosine over the phase, a rise from nothing over the first twentieth of the steps."""
    made = options(transport=0.3, phase=0.3)
    for i in range(28):
        r = i / 28
        wanted = 0.15 * (1 + math.cos(math.pi * r / 0.3)) * min(1, r / 0.05) if r < 0.3 else 0
        assert made.carry(i, 28) == pytest.approx(wanted)
    assert made.carry(0, 28) == 0


def test_defaults_are_the_readme_s():
    made = options()
    assert (made.transport, made.phase, made.clip) == (0.3, 0.3, 10.0)
    assert made.respect_prompt is True and made.region is None
    assert (made.gamma, made.eta, made.stop) == (0.5, 0.9, 0.25)


def test_bare_transport_is_another_pull_schedule():
    """eta' = 1 - (1 - lambda)(1 - eta): the published numbers, and the same latents."""
    made = options()
    effective = [1 - (1 - made.carry(i, 28)) * (1 - made.pull(i, 28)) for i in range(28)]
    shown = [0.90, 0.92, 0.93, 0.92, 0.92, 0.91, 0.91, 0.02, 0.002, 0]
    assert effective[:10] == pytest.approx(shown, abs=6e-3)
    ours = back(invert("otip", **PLAIN), "green")
    plain = invert("rf-inversion")
    grid, model = plain.grid, plain.model
    denoise = Denoiser(model, [Branch("target", model.embed(["green"] * len(DATA)))])
    y = plain.noise
    for step in grid.walk(down=True):
        v = denoise(y, step.t).velocity
        pulled = v + effective[step.position] * ((y - DATA) / step.t - v)
        y = y + (step.s - step.t) * pulled
    assert relative(ours, y) < 1e-12


@pytest.mark.parametrize("given", [{"transport": 0.0}, {"phase": 0.0}])
def test_without_transport_it_is_rf_inversion_bit_for_bit(given):
    found, wanted = (
        back(invert(n, **o), "blue") for n, o in (("otip", given), ("rf-inversion", {}))
    )
    assert torch.equal(found, wanted)


def region_file(tmp_path, values):
    path = tmp_path / "region.png"
    Image.fromarray(np.asarray(values, np.uint8) * 255).save(path)
    return str(path)


def test_a_black_region_is_rf_inversion(tmp_path):
    path = region_file(tmp_path, np.zeros((8, 8)))
    found = back(invert("otip", picture_job(), region=path), "blue")
    assert relative(found, back(invert("rf-inversion", picture_job()), "blue")) < 1e-13


def guided(inversion, v, gap):
    """What the transport makes of a velocity in its fourth step of 28."""
    control = get("invert", "otip").make(**inversion.options).replay(inversion).control
    step = list(inversion.grid.walk(down=True))[3]
    layout = type("Layout", (), {"names": ("target",)})()
    return control.guide(v, gap, 1.0, step, layout), control.options.carry(3, 28)


def random_pair():
    generator = torch.Generator().manual_seed(1)
    v, gap = (torch.randn(2, 3, 8, 8, generator=generator).double() for _ in range(2))
    return v, 5 * gap


def test_outside_of_the_region_velocities_are_the_same_bits(tmp_path):
    values = np.zeros((8, 8))
    values[2:6, 4:] = 1
    inversion = invert("otip", picture_job(), region=region_file(tmp_path, values))
    assert inversion.extras["region"].shape == (28, 2, 1, 8, 8)
    v, gap = random_pair()
    moved, _ = guided(inversion, v, gap)
    inside = torch.tensor(values).bool()
    assert torch.equal(moved[..., ~inside], v[..., ~inside])
    assert (moved[..., inside] - v[..., inside]).abs().min() > 0


def test_token_norm_covers_two_by_two_cells_and_odd_edges():
    x = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(0)).double()
    found = token_norm(x)
    assert found.shape == (2, 1, 5, 4)
    assert float(found[1, 0, 2, 3]) == pytest.approx(float(x[1, :, 2:4, 2:4].norm()))
    assert float(found[0, 0, 4, 0]) == pytest.approx(float(x[0, :, 4:, :2].norm()))


@pytest.mark.parametrize("clip", [0.5, 10.0, None])
def test_the_clip_bounds_each_token_for_its_channels(clip):
    """10 of 64 channels are 10 sqrt(12/64) of the 12 that a token of three channels has."""
    inversion = invert("otip", picture_job(), clip=clip, respect_prompt=False, stop=0.0)
    v, gap = random_pair()
    moved, strength = guided(inversion, torch.zeros_like(v), 8 * gap)
    bound = math.inf if clip is None else strength * clip * math.sqrt(12 / 64)
    assert float(token_norm(moved).max()) <= bound * (1 + 1e-9)
    if clip is None:
        assert relative(moved, strength * 8 * gap) < 1e-12


def test_respecting_the_prompt_makes_the_transport_as_strong_as_the_velocity():
    inversion = invert("otip", picture_job(), clip=None, stop=0.0)
    v, gap = random_pair()
    moved, strength = guided(inversion, v, gap)
    wanted = v + strength * token_norm(v) / token_norm(gap) * (gap - v)
    assert relative(moved, wanted) < 1e-6
    # Where the picture is reached already, it does not overshoot.
    near, _ = guided(inversion, v, 1e-6 * gap)
    assert relative(near, 1e-6 * gap) < 1e-6


def test_it_reconstructs_no_worse_than_rf_inversion():
    plain, carried = (error(back(invert(n)), DATA) for n in ("rf-inversion", "otip"))
    assert carried <= plain


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"transport": 2.0}, "transport is 2.0"),
        ({"clip": 0.0}, "clip must be above 0"),
        ({"gamma": 2.0}, "gamma is 2.0"),
    ],
)
def test_bad_options(given, says):
    with pytest.raises(RetourError, match=says):
        options(**given)


def test_a_missing_region_is_refused_before_any_work():
    work = job()
    with pytest.raises(RetourError, match="nowhere"):
        invert("otip", work, region="nowhere.png")
    assert work.ledger.rows == 0
