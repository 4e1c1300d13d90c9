"""Fixed-point inversion: exact at the guidance inverted at, on every path, at the cost counted."""

import warnings

import pytest
import torch

import retour
from inverters.jobs import job, tiny_model, tiny_picture
from inverters.searched import FLOW, MODEL, invert, returned, rms, samples
from problems import points
from retour import api
from retour.core.control import Control
from retour.core.registry import get
from retour.solvers.implicit import ConvergenceWarning

SOURCE, TARGET = "a red apple on a blue background", "a green apple on a blue background"


@pytest.mark.parametrize("model", [MODEL, FLOW], ids=["vp", "flow"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_round_trip_is_exact_at_the_guidance_of_the_way_back(model, guidance):
    found = invert("fixed-point", points(), model=model, guidance=guidance, steps=25)
    assert found.guidance == guidance
    assert returned(found, guidance) < 1e-4
    assert returned(invert("ddim", points(), model=model, steps=25), guidance) > 1e-2


def test_exact_at_another_guidance_if_asked():
    found = invert("fixed-point", points(), guidance=3.0, steps=25, inversion_guidance=1.0)
    assert returned(found, 1.0) < 1e-4 and returned(found, 3.0) > 1e-2


def test_it_finds_the_noise_of_generated_data():
    noise, x = samples(20)
    for method, least, most in (("fixed-point", 0, 1e-5), ("ddim", 1e-2, 1)):
        assert least < rms(invert(method, x).noise - noise) < most


def test_residuals_are_kept_and_met():
    found = invert("fixed-point", points(), guidance=3.0, steps=25)
    assert found.extras["residual"].shape == (25, 4)
    assert found.record["worst_residual"] == float(found.extras["residual"].max()) <= 1e-6


def test_a_failure_is_said_once_and_the_image_still_comes_near():
    with pytest.warns(ConvergenceWarning) as said:
        found = invert("fixed-point", points(), guidance=7.5, steps=5)
    assert len(said) == 1
    assert (found.extras["residual"] > 1e-6).any() and torch.isfinite(found.noise).all()


def test_evaluations_are_counted():
    """One to start, one to check, one for each update; twice that with guidance."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        for guidance, rows in ((1.0, 1), (3.0, 2)):
            for n in (0, 1, 2):
                options = {"iterations": n, "tolerance": 0.0, "guidance": guidance}
                found = invert("fixed-point", points(), steps=5, **options)
                assert found.record["nfe"] == 5 * rows * (2 + n)


def test_strength_walks_a_part():
    found = invert("fixed-point", points(), steps=20, strength=0.5)
    assert found.grid.steps == 10 and returned(found) < 1e-5


class Count(Control):
    """Counts the steps that it sees."""

    def __init__(self):
        self.steps = 0

    def after_step(self, step, state, before, layout):
        self.steps += 1
        return state


def test_other_controls_take_part():
    work, count = job(MODEL, images=2, steps=5), Count()
    work.controls = [count]
    get("invert", "fixed-point").make().invert(work)
    assert count.steps == 5


def test_saved_with_its_residuals(tmp_path):
    model = tiny_model("sd3")
    made = retour.invert(model, tiny_picture(), SOURCE, method="fixed-point", steps=4, guidance=2.0)
    made.save(tmp_path / "a.safetensors")
    loaded = retour.Inversion.load(tmp_path / "a.safetensors", model)
    assert torch.equal(loaded.extras["residual"], made.extras["residual"])
    first, second = (retour.edit(i, TARGET, editor="reprompt").latents for i in (made, loaded))
    assert torch.equal(first, second)


def test_an_edit_with_the_source_prompt_returns_the_image():
    model = tiny_model("sd3", wide=True)
    made = retour.invert(model, tiny_picture(), SOURCE, method="fixed-point", steps=6, guidance=3.0)
    assert made.record["worst_residual"] <= 1e-6
    same = retour.edit(made, SOURCE, editor="reprompt").latents
    assert rms(same - made.latents) < 1e-4 * rms(made.latents)
    assert torch.equal(api.reconstruct(made).latents, same)
