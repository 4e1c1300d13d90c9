"""`retour.restore` and `retour.steer` as a user calls them."""

import json
from functools import lru_cache

import numpy as np
import pytest
import torch
from PIL import Image

import retour
import tiny
from problems import PATHS, ProblemModel, pictures
from retour.io import plain, read_record
from retour.privacy import load_classifier
from retour.restorers.operators import Grey, Inpaint, MotionBlur, SuperResolution
from retour.restorers.run import restore, steer
from retour.restorers.steering import Distance

RED = Image.new("RGB", (8, 8), (216, 51, 51))
HOLE = np.zeros((8, 8))
HOLE[2:6, 2:6] = 1


@lru_cache
def exact():
    return ProblemModel(pictures(8), PATHS["flow"], "velocity", default_steps=12)


@lru_cache
def network(family):
    return retour.load(tiny.PIPELINES[family]())


def test_a_hole_takes_the_colour_around_it():
    holed = np.asarray(RED).copy()
    holed[2:6, 2:6] = 255  # what the hole shows must not matter
    result = restore(exact(), Image.fromarray(holed), "inpaint", mask=HOLE, steps=12)
    pixels = np.asarray(result.image).astype(float)
    assert pixels[2:6, 2:6, 0].mean() > 150 > 110 > pixels[2:6, 2:6, 1:].mean()
    assert result.record["nfe"] == 12 and result.record["misfit"][0] < 0.02
    assert result.record["operator"] == {"name": "inpaint"}


def test_white_is_missing_and_black_is_known():
    """The published demos and the paper disagree about the mask's sides."""
    result = restore(exact(), RED, "inpaint", mask=HOLE, project=True)
    kept = np.asarray(result.image)[HOLE == 0]
    assert (kept == np.asarray(RED)[HOLE == 0]).all()
    assert torch.equal(result.observed[0, :, 2:6, 2:6], torch.zeros(3, 4, 4).double())


def test_a_small_picture_comes_back_larger():
    small = Image.new("RGB", (2, 2), (51, 204, 51))
    result = restore(exact(), small, SuperResolution(4))
    assert result.image.size == (8, 8) and result.original_size().size == (8, 8)
    assert np.asarray(result.image)[..., 1].mean() > np.asarray(result.image)[..., 0].mean() + 50


def test_a_grey_picture_is_coloured_as_it_is_told():
    grey = Image.new("L", (8, 8), 96)
    told = {
        colour: np.asarray(restore(exact(), grey, "colour", prompt=colour).image).mean((0, 1))
        for colour in ("red", "blue")
    }
    assert told["red"][0] > told["blue"][0] + 40 and told["blue"][2] > told["red"][2] + 40
    for mean in told.values():
        assert float(mean @ [0.299, 0.587, 0.114]) == pytest.approx(96, abs=4)


def test_without_a_prompt_one_is_proposed_from_the_filled_picture(monkeypatch):
    """The hole's grey is no part of what the proposer sees; "" tells nothing."""
    seen = []

    def guess(pictures):
        seen.extend(pictures)
        return ["red"] * len(pictures)

    monkeypatch.setattr("retour.restorers.run.propose", guess)
    result = restore(exact(), [RED, RED], "inpaint", mask=HOLE)
    assert result.record["prompts"] == ["red", "red"] and result.record["prompts_proposed"] is True
    assert result.record["steps"] == result.record["nfe"] == 100  # the paper's, for latent models
    assert all(np.array_equal(np.asarray(p), np.asarray(RED)) for p in seen) and len(seen) == 2
    told = restore(exact(), [RED, RED], "inpaint", mask=HOLE, prompt="red")
    assert torch.equal(told.latents, result.latents) and told.record["prompts_proposed"] is False
    assert restore(exact(), RED, "inpaint", mask=HOLE, prompt="").record["prompts"] == [""]
    assert len(seen) == 2


def test_measurements_as_they_are():
    operator = Grey()
    x = pictures(8).means[:1].expand(2, -1, -1, -1)
    y = operator.measure(x, 0.1, torch.Generator().manual_seed(0))
    result = restore(exact(), y, operator, prompt=["red", "red"])
    assert torch.equal(result.observed, y) and len(result.images) == 2


def test_a_batch_has_one_record_and_its_own_misfits():
    batch = [RED, Image.new("RGB", (8, 8), (51, 51, 216))]
    result = restore(exact(), batch, "inpaint", mask=HOLE)
    assert len(result.images) == len(result.record["misfit"]) == len(result.placements) == 2
    alone = restore(exact(), batch[1], "inpaint", mask=HOLE)
    torch.testing.assert_close(result.latents[1], alone.latents[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", sorted(tiny.PIPELINES))
@pytest.mark.parametrize("space", ["pixel", "latent"])
def test_every_family_restores(family, space, tmp_path, gradient):
    mask = np.zeros((32, 48))
    mask[8:16] = 1
    result = restore(network(family), gradient, "inpaint", mask=mask, steps=3, space=space)
    assert torch.isfinite(result.latents).all()
    assert result.original_size().size == gradient.size
    result.save(tmp_path / "a.png", keep_size=True)
    assert read_record(tmp_path / "a.png")["restorer"] == "flowchef"
    json.dumps(plain(result.record))
    assert "2412.00100" in retour.cite(result)


def test_projection_puts_the_measurement_back():
    y = SuperResolution(4).forward(torch.rand(1, 3, 16, 16, dtype=torch.float64) * 2 - 1)
    plain_, projected = (
        restore(network("sd1"), y, SuperResolution(4), steps=2, project=project)
        for project in (False, True)
    )
    assert plain_.record["misfit"][0] > 1e-3 > 1e-12 > projected.record["misfit"][0]


def test_steering_towards_a_class():
    """-log p(c|x) of an exact classifier of the mixture's colours."""

    def logits(images):
        means = pictures(8).means.float()[None]
        return -((images[:, None] - means) ** 2).flatten(2).mean(2) * 10

    for label in range(3):
        cost = lambda x, label=label: -logits(x).log_softmax(1)[:, label]  # noqa: E731
        result = steer(exact(), cost, kappa=0.1)
        free = steer(exact(), cost, kappa=0)
        assert result.record["costs"][0] < 0.1
        assert result.record["costs"][0] <= free.record["costs"][0] + 1e-9
    assert result.record["nfe"] == 12


def test_steering_by_a_classifier_is_steering_by_its_cross_entropy():
    """Which sees pictures in [0, 1]; the class by name or number, in the record too."""

    def logits(images):
        means = pictures(8).means.float()[None] / 2 + 0.5
        return -((images[:, None] - means) ** 2).flatten(2).mean(2) * 40

    names = pictures(8).names
    judge = load_classifier(logits, name="mine", labels=names)
    found = steer(exact(), classifier=judge, label=names[2], steps=6)
    assert (found.record["classifier"], found.record["label"]) == ("mine", names[2])

    def cost(images):
        return -logits(images / 2 + 0.5).double().log_softmax(1)[:, 2]

    wanted = steer(exact(), cost, steps=6)
    torch.testing.assert_close(found.latents, wanted.latents, rtol=0, atol=1e-9)
    again = steer(exact(), classifier=judge, label=2, steps=6)
    assert torch.equal(again.latents, found.latents)
    for label in range(3):
        made = steer(exact(), classifier=judge, label=label, steps=12, kappa=0.1).latents
        assert int(logits(made.float() / 2 + 0.5).argmax()) == label


@pytest.mark.slow
def test_the_embedded_classifier_steers_the_embedded_model():
    """Pictures of no prompt: what was seldom seen is seen; no gradient reaches the network."""
    judge, found = load_classifier("emoji-cnn"), {}
    for kappa in (0.0, 0.05):
        result = steer("emoji-mmdit", classifier=judge, label="cat", prompt=[""] * 4, kappa=kappa)
        found[kappa] = np.exp(-np.array(result.record["costs"])).mean()
    print("probability of a cat", found)
    assert found[0.0] < 0.2 and found[0.05] > 0.9


def test_steering_many_prompts_gives_each_its_own_noise():
    goal = torch.zeros(1, 3, 8, 8, dtype=torch.float64)
    result = steer(exact(), Distance(goal), prompt=["red", "red"], kappa=0.0, guidance=1.0)
    assert (result.latents[0] - result.latents[1]).abs().max() > 0.1
    held = steer(exact(), Distance(goal), prompt=["red", "red"], kappa=1.0, guidance=1.0)
    assert held.latents.abs().max() < 1e-12
    seen = []
    steer(exact(), Distance(goal), steps=3, observers=[lambda event: seen.append(event.step.index)])
    assert seen == [2, 1, 0]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: restore(exact(), RED, "inpant"), "did you mean 'inpaint'"),
        (lambda: restore(exact(), RED, "inpaint"), "needs a mask"),
        (lambda: restore(exact(), RED, "sr", mask=HOLE), "only 'inpaint' takes a mask"),
        (lambda: restore(exact(), RED, Inpaint(HOLE), mask=HOLE), "knows its own mask"),
        (lambda: restore(exact(), RED, "inpaint", mask=0 * HOLE), "black everywhere"),
        (lambda: restore(exact(), RED, "inpaint", mask=0 * HOLE + 1), "white everywhere"),
        (lambda: restore(exact(), [], "colour"), "no image"),
        (lambda: restore(exact(), RED, "colour", method="flowchief"), "did you mean 'flowchef'"),
        (lambda: restore(exact(), RED, "colour", kapa=1), "unknown option of 'flowchef' 'kapa'"),
        (lambda: restore(exact(), RED, "colour", steps=0), "at least 1, got 0"),
        (lambda: restore(exact(), RED, "colour", guidance=-1.0), "guidance is -1"),
        (lambda: restore(exact(), RED, "colour", prompt=["a", "b"]), "2 prompts for 1 images"),
        (lambda: restore(exact(), RED, MotionBlur(3), project=True), "no pseudo-inverse"),
        (lambda: restore(exact(), [RED, RED.resize((16, 8))], "colour"), "equal aspect ratio"),
        (lambda: restore(network("sd1"), torch.zeros(1, 3, 7, 7), "identity"), "multiples"),
        (lambda: restore(exact(), torch.full((1, 3, 8, 8), np.nan), "identity"), "NaN"),
        (lambda: steer(exact(), Distance(torch.zeros(1)), kappa=-1), "kappa is -1"),
        (lambda: steer(exact()), "a cost, or a classifier and the label"),
        (lambda: steer(exact(), classifier="emoji-cnn"), "a cost, or a classifier and the label"),
        (lambda: steer(exact(), classifier="emoji-cnn", label="cta"), "did you mean 'cat'"),
        (lambda: steer(exact(), lambda x: x), "a cost gives a number for each of 1 pictures, not"),
        (lambda: steer(exact(), lambda x: 3.0), "for each of 1 pictures, not float"),
        (lambda: steer(exact(), 3), "a cost is a function of pictures, not int"),
        (lambda: steer(exact(), lambda x: x.mean((1, 2, 3)), inner=0), "inner is 0"),
    ],
)
def test_bad_input_is_one_sentence(call, says):
    with pytest.raises(retour.RetourError, match=says) as caught:
        call()
    assert "\n" not in str(caught.value)
