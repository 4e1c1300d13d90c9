"""Uniform attention maps: two tracks up, and edits that one of them anchors."""

from dataclasses import replace

import pytest
import torch

import retour
from attention.spies import Maps
from editors.runs import SOLVER, denoiser
from inverters import paired
from inverters.pivots import PROMPTS, SOURCE, STEPS, TARGET, close, distance, invert, job
from retour import api
from retour.attention.uniform import UniformMaps
from retour.core.control import Attending
from retour.core.loop import walk
from retour.core.path import levels
from retour.core.registry import get
from retour.core.state import State
from retour.demo import examples
from retour.editors.uniform import held
from retour.errors import RetourError
from retour.solvers.ddim import DDIM, DDIMOptions

ENCODED = 1e-4  # the VAE is float32 here, and encodes a batch a little otherwise
ALL = {"mask_until": 1.0}
FAMILIES = ("sd1", "sd2", "sdxl")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_track_that_is_edited_is_the_base_inverters(family):
    inversion = invert("uniform-maps", family)
    assert torch.equal(inversion.states["x"], invert("ddim", family).states["x"])
    assert inversion.extras["uniform"].shape == inversion.states["x"].shape
    assert inversion.extras["anchor"].shape == inversion.states["x"][1:].shape


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reconstruction_takes_the_uniform_track(family):
    """Uniform maps, the null prompt and guidance 1 on both ways, whatever guidance is asked.

    As published, the anchors are this track's clean predictions on the way back.
    """
    inversion = invert("uniform-maps", family, anchor="returned")
    work = replace(job(inversion), condition=inversion.negative)
    work.controls = [Attending(UniformMaps("source"))]
    up = work.climb(DDIM(DDIMOptions("noisy")), inversion.grid, 1.0)["x"]
    assert torch.equal(up, inversion.extras["uniform"])
    down = work.descend(DDIM(DDIMOptions()), State(up[-1]), inversion.grid, 1.0)["x"]
    for step in inversion.grid.walk(down=True):
        x0 = held(inversion.model.path, step, down[step.index + 1], down[step.index])
        close(inversion.extras["anchor"][step.index], x0)
    for guidance in (None, 15.0):
        result = api.reconstruct(inversion, guidance=guidance)
        close(result.latents, down[0])
        assert result.record["nfe"] == STEPS


@pytest.mark.parametrize("family", FAMILIES)
def test_anchors_lead_the_inverted_states_back_to_the_data(family):
    """Each with the noise that its state implies: no network is asked on the way."""
    inversion = invert("uniform-maps", family)
    path, x = inversion.model.path, inversion.extras["uniform"][-1]
    for step in inversion.grid.walk(down=True):
        (alpha, sigma), (alpha_s, sigma_s) = (levels(path, t, x) for t in (step.t, step.s))
        clean = inversion.extras["anchor"][step.index]
        x = alpha_s * clean + sigma_s * (x - alpha * clean) / sigma
        close(x, inversion.extras["uniform"][step.index])
    close(x, inversion.latents)


def test_it_knows_no_prompt():
    one, two = (invert("uniform-maps", prompts=(p,)) for p in PROMPTS[:2])
    assert torch.equal(one.extras["uniform"], two.extras["uniform"])
    assert torch.equal(one.extras["anchor"], two.extras["anchor"])
    assert torch.equal(api.reconstruct(one).latents, api.reconstruct(two).latents)
    assert not torch.equal(one.noise, two.noise)


@pytest.mark.slow
def test_a_trained_network_returns_along_the_uniform_track():
    """Better than guided DDIM, and the better the more steps (first order: four times in squares).

    That it beats DDIM at guidance 1 with the source prompt is the paper's finding; a network whose
    captions say all that there is to see has its most certain way there.
    """
    pictures, errors = [examples()[0][name] for name in ("apple", "house")], {}
    net = retour.load("emoji-unet")
    for method, steps in (("ddim", 50), ("uniform-maps", 50), ("uniform-maps", 100)):
        images, prompts = ([picture[k] for picture in pictures] for k in (0, 1))
        inversion = retour.invert(net, images, prompts, method=method, steps=steps)
        back = api.reconstruct(inversion).latents
        errors[method, steps] = distance(back, inversion.latents)
    assert errors["uniform-maps", 50] < 0.5 * errors["ddim", 50]
    assert errors["uniform-maps", 100] < 0.5 * errors["uniform-maps", 50]


@pytest.mark.slow
def test_backgrounds_gain_the_more_steps_are_masked():
    """MasaCtrl on the shipped model, without the mask, in its last step, in its last two."""
    made = paired.inversion("uniform-maps", 14, 10)
    found = [paired.missed(made.with_options(mask_until=t), "masactrl") for t in (0.0, 0.1, 0.2)]
    print("background", found)
    assert found == sorted(found, reverse=True)


def test_without_a_mask_the_editor_is_what_it_was():
    for editor in ("p2p", "reprompt"):
        plain = retour.edit(invert("ddim"), TARGET, editor=editor)
        found = retour.edit(invert("uniform-maps", mask_until=0.0), TARGET, editor=editor)
        close(found.latents, plain.latents, 0.0 if editor == "p2p" else 1e-10)


@pytest.mark.parametrize("family", FAMILIES)
def test_edits_are_anchored_and_so_nearer_to_the_image(family):
    """With the same prompt nothing is edited: all but noise comes from the uniform track."""
    for anchor in ("inverted", "returned"):
        inversion = invert("uniform-maps", family, anchor=anchor, **ALL)
        same = retour.edit(inversion, SOURCE, editor="reprompt")
        assert not torch.allclose(same.latents, same.source, atol=1e-2)
        back = api.reconstruct(inversion).latents
        faithful = inversion.latents if anchor == "inverted" else back
        assert distance(same.latents, faithful) < distance(same.source, faithful)
    other = retour.edit(inversion, TARGET)
    assert not torch.allclose(other.latents, retour.edit(invert("ddim", family), TARGET).latents)


def test_the_source_row_is_carried_and_its_maps_are_its_own():
    """Edits run with softmax maps in every row; the editor need not ask for the source."""
    inversion, spy = invert("uniform-maps"), Maps(("cross",))
    result = retour.edit(inversion, TARGET, editor="reprompt")
    assert result.source is not None and result.record["nfe_edit"] == 4 * STEPS
    back = get("invert", "uniform-maps").make().replay(inversion)
    den = denoiser("sd1", {"source": [SOURCE], "target": [TARGET]})
    controls = [back.control, Attending(spy)]
    walk(SOLVER, den, back.state.tile(2), inversion.grid, down=True, controls=controls)
    uniform = [torch.allclose(p, torch.full_like(p, 1 / 16)) for _, p in spy.seen]
    assert uniform and not any(uniform)


def test_evaluations_are_counted():
    inversion = invert("uniform-maps")
    assert inversion.record["nfe"] == 2 * STEPS
    assert retour.edit(inversion, TARGET).record["nfe_edit"] == 4 * STEPS
    assert invert("uniform-maps", anchor="returned").record["nfe"] == 3 * STEPS


def test_direct_keeps_its_source_exactly():
    inversion = invert("uniform-maps", base="direct", clean_source=True, **ALL)
    result = retour.edit(inversion, TARGET)
    close(result.source, inversion.latents, 1e-12)
    plain = retour.edit(invert("direct"), TARGET)
    assert not torch.allclose(result.latents, plain.latents, atol=1e-3)


@pytest.mark.parametrize("base", ["negative-prompt", "null-text"])
def test_other_bases_return_their_own_way(base):
    inversion = invert("uniform-maps", base=base, mask_until=0.0)
    close(retour.edit(inversion, TARGET).latents, retour.edit(invert(base), TARGET).latents, 0.0)


def test_the_masks_options_matter_on_the_way_back_only():
    first = invert("uniform-maps").with_options(quantile=0.9, mask_until=1.0, dilation=0)
    second = invert("uniform-maps", quantile=0.9, mask_until=1.0, dilation=0)
    assert torch.equal(retour.edit(first, TARGET).latents, retour.edit(second, TARGET).latents)


def test_a_batch_is_a_loop_that_can_be_saved_and_picked(tmp_path):
    batch = invert("uniform-maps", images=2, **ALL)
    batch.save(tmp_path / "two.safetensors")
    loaded = retour.Inversion.load(tmp_path / "two.safetensors", batch.model)
    edited = retour.edit(loaded.take([1, 0]), TARGET)
    alone = retour.edit(invert("uniform-maps", **ALL), TARGET)
    close(edited.latents[1], alone.latents[0], ENCODED)
    back = api.reconstruct(loaded.take([1, 0]))
    close(back.latents[1], api.reconstruct(invert("uniform-maps", **ALL)).latents[0], ENCODED)


def test_joint_attention_is_refused():
    with pytest.raises(RetourError, match="'uniform-maps' needs cross-attention"):
        invert("uniform-maps", "sd3")


@pytest.mark.parametrize(
    ("option", "value"), [("quantile", 1.2), ("mask_until", -0.1), ("dilation", -1)]
)
def test_settings_out_of_range_are_refused(option, value):
    with pytest.raises(RetourError, match=f"{option} is {value}: choose a number"):
        invert("uniform-maps", **{option: value})
