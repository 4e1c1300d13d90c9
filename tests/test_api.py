"""The main job on tiny pipelines of every family: what invert, reconstruct and edit promise."""

from __future__ import annotations

import json
import warnings
from functools import lru_cache

import numpy as np
import pytest
import torch
from PIL import Image

import retour
import tiny
from retour import api
from retour.core.model import evaluate
from retour.core.registry import entries
from retour.solvers.implicit import ConvergenceWarning

SOURCE, TARGET = "a red apple on a blue background", "a green apple on a blue background"
FAMILIES = sorted(tiny.PIPELINES)


@lru_cache
def model(family: str = "sd1"):
    return retour.load(tiny.PIPELINES[family]())


@lru_cache
def wide():
    """A model in float64, where batch shapes make no visible difference."""
    return retour.load(tiny.sd1().to(torch.float64))


def picture(seed: int = 0, size: tuple[int, int] = (16, 16)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1] // 4, size[0] // 4, 3))
    return Image.fromarray(pixels.astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)


def invert(family: str = "sd1", **options):
    options = {"method": "direct", "steps": 4, "guidance": 5.0, **options}
    return retour.invert(model(family), picture(), SOURCE, **options)


def pairs():
    """Every inverter with every editor on one family in turn; both with a usual mate on all."""
    inverters, editors = entries("invert"), entries("edit")
    for i, method in enumerate(inverters):
        for k, editor in enumerate(editors):
            usual = editor.name == "p2p" or method.name == "direct"
            for family in FAMILIES if usual else [FAMILIES[(i + k) % len(FAMILIES)]]:
                yield pytest.param(
                    method, editor, family, id=f"{method.name}-{editor.name}-{family}"
                )


def called_too_early(*_):
    raise AssertionError("the network was called before everything was checked")


@pytest.mark.parametrize(("method", "editor", "family"), list(pairs()))
def test_every_pair_runs_or_is_refused(method, editor, family, monkeypatch):
    mask = np.zeros((16, 16))
    mask[4:12, 4:12] = 1

    def check(stand_in):
        with monkeypatch.context() as patch:
            patch.setattr(type(model(family)), "network", called_too_early)
            api.refuse_edit(stand_in, TARGET, editor=editor.name, mask=mask)

    possible = method.needs | editor.needs <= model(family).capabilities
    if not (possible and editor.requires <= method.provides):
        with pytest.raises(retour.RetourError, match="use "):
            retour.edit(invert(family, method=method.name), TARGET, editor=editor.name)
        with pytest.raises(retour.RetourError, match="use "):
            invert(family, method=method.name, check=check)
        return
    inversion = invert(family, method=method.name, check=check)
    result = retour.edit(inversion, TARGET, editor=editor.name, mask=mask)
    assert result.image.size == (16, 16)
    assert torch.isfinite(result.latents).all()
    json.dumps(retour.io.plain(result.record))


@pytest.mark.parametrize("method", [e for e in entries("invert") if e.exact], ids=lambda e: e.name)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("steps", [4, 5])
def test_exact_inverters_return_exactly(family, method, steps):
    """Those that iterate to what they declare, or they say that they failed."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        inversion = invert(family, method=method.name, steps=steps, strength=1.0)
    result = api.reconstruct(inversion)
    error = (result.latents - inversion.latents).norm() / inversion.latents.norm()
    failed = any(issubclass(warning.category, ConvergenceWarning) for warning in said)
    assert failed or error <= method.facts.get("exact_to", 1e-12)


def test_memory_layout_of_the_latents_does_not_reach_the_network():
    loaded = model()
    x = loaded.encode(torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16))
    condition = loaded.embed([SOURCE, TARGET])
    plain = evaluate(loaded, x.contiguous(), 1.0, condition)
    other = evaluate(loaded, x.contiguous(memory_format=torch.channels_last), 1.0, condition)
    assert torch.equal(plain.eps, other.eps)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", ["offset", "overwrite"])
def test_direct_source_is_the_vae_reconstruction(family, form):
    inversion = invert(family, form=form)
    result = retour.edit(inversion, TARGET, editor="p2p")
    assert (result.source - inversion.latents).abs().max() <= 1e-12
    whole = model(family).decode(result.source)
    assert (whole - model(family).decode(inversion.latents)).abs().max() <= 1e-5


@pytest.mark.parametrize("family", ["sd1", "sd2", "sd3"])
def test_stored_offsets_return_exactly_in_the_same_batch(family):
    """Stored offsets do not pull back: rounding of another batch shape may grow."""
    result = api.reconstruct(invert(family, form="two-pass"))
    assert (result.latents - result.inversion.latents).abs().max() <= 1e-12


@pytest.mark.parametrize("guidance", [1.0, 7.5, 15.0])
def test_direct_source_is_exact_at_any_guidance_where_ddim_drifts(guidance):
    direct = retour.edit(invert(guidance=guidance), TARGET)
    ddim = retour.edit(invert(method="ddim", guidance=guidance), TARGET)
    exact = direct.inversion.latents
    assert (direct.source - exact).abs().max() <= 1e-12
    if guidance > 1:
        assert (ddim.source - exact).abs().max() > 1e-2


def test_direct_leaves_the_target_alone():
    """With no attention control the target's latents do not depend on the offsets."""
    direct = invert()
    plain = invert(method="ddim")
    controls = {"cross_steps": 0.0, "self_steps": 0.0}
    first = retour.edit(direct, TARGET, editor="p2p", **controls)
    second = retour.edit(plain, TARGET, editor="p2p", **controls)
    assert torch.equal(first.latents, second.latents)


def test_direct_forms_agree():
    latents = [
        retour.edit(invert(form=form), TARGET).latents
        for form in ("offset", "two-pass", "overwrite")
    ]
    for other in latents[1:]:
        torch.testing.assert_close(other, latents[0], rtol=0, atol=2e-5)


def test_direct_offsets_close_the_gap_in_proportion():
    errors = []
    for scale in (0.0, 0.4, 0.8, 1.0):
        result = retour.edit(invert(scale=scale), TARGET)
        errors.append(float((result.source - result.inversion.latents).norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] <= 1e-12 * float(result.inversion.latents.norm())


@pytest.mark.parametrize(
    ("method", "options", "editor", "evaluations"),
    [
        ("direct", {}, "p2p", 5 * 4),
        ("direct", {"form": "two-pass"}, "p2p", 7 * 4),
        ("direct", {"form": "overwrite"}, "p2p", 4 * 4),
        ("direct", {}, "reprompt", 3 * 4),
        ("ddim", {}, "p2p", 5 * 4),
        ("edict", {"strength": 1.0}, "reprompt", 8 * 4),
        ("rf-solver", {}, "reprompt", 6 * 4),
    ],
)
def test_evaluations_are_counted(method, options, editor, evaluations):
    result = retour.edit(invert(method=method, **options), TARGET, editor=editor)
    assert result.record["nfe"] == evaluations


@pytest.mark.parametrize("method", [e.name for e in entries("invert")])
def test_batch_equals_loop(method):
    images, prompts = [picture(k) for k in range(3)], [SOURCE, "a cat", "a green pear"]
    batch = retour.invert(wide(), images, prompts, method=method, steps=3)
    edited = retour.edit(batch, TARGET)
    for k in range(3):
        alone = retour.invert(wide(), images[k], prompts[k], method=method, steps=3)
        torch.testing.assert_close(batch.noise[k], alone.noise[0], rtol=1e-9, atol=1e-9)
        one = retour.edit(alone, TARGET)
        torch.testing.assert_close(edited.latents[k], one.latents[0], rtol=1e-8, atol=1e-8)


def test_several_targets_of_one_image():
    inversion = retour.invert(wide(), picture(), SOURCE, steps=3)
    result = retour.edit(inversion, [TARGET, "a red pear on a blue background"])
    assert len(result.images) == len(result.placements) == 2
    one = retour.edit(inversion, "a red pear on a blue background")
    torch.testing.assert_close(result.latents[1], one.latents[0], rtol=1e-8, atol=1e-8)


def test_take_picks_images():
    batch = retour.invert(model(), [picture(0), picture(1)], [SOURCE, "a cat"], steps=3)
    picked = batch.take([1, 1, 0])
    assert picked.prompts == ("a cat", "a cat", SOURCE)
    assert torch.equal(picked.noise, batch.noise[[1, 1, 0]])


def test_saved_inversion_edits_alike(tmp_path):
    inversion = invert()
    inversion.save(tmp_path / "a.safetensors")
    loaded = retour.Inversion.load(tmp_path / "a.safetensors", model())
    assert torch.equal(retour.edit(loaded, TARGET).latents, retour.edit(inversion, TARGET).latents)
    with pytest.raises(retour.RetourError, match="was made with model"):
        retour.Inversion.load(tmp_path / "a.safetensors", model("sd2"))


@pytest.mark.parametrize("method", [e.name for e in entries("invert")])
def test_the_seed_decides_and_the_global_generator_does_not(method):
    runs = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        runs.append(retour.edit(invert(method=method), TARGET).latents)
    assert torch.equal(*runs)


def test_mask_keeps_the_background_of_the_latents():
    mask = np.zeros((16, 16))
    mask[:, 8:] = 1
    inversion = invert()
    result = retour.edit(inversion, "a cat", editor="reprompt", mask=mask)
    assert (result.latents - inversion.latents)[..., :4].abs().max() <= 1e-12
    assert (result.latents - inversion.latents)[..., 4:].abs().max() > 1e-2


def test_masks_may_be_truth_values():
    inversion, area = invert(), np.zeros((16, 16), bool)
    area[4:12, 4:12] = True
    made = [
        retour.edit(inversion, TARGET, mask=mask).latents for mask in (area, area.astype(float))
    ]
    assert torch.equal(*made)


def test_each_image_may_have_its_own_mask():
    left, right = np.zeros((16, 16)), np.zeros((16, 16))
    left[:, :8], right[:, 8:] = 1, 1
    batch = retour.invert(model(), [picture(0), picture(1)], SOURCE, steps=2)
    result = retour.edit(batch, "a cat", editor="reprompt", mask=[left, right])
    moved = (result.latents - batch.latents).abs().amax((1, 2))
    assert moved[0, 4:].max() <= 1e-12 < moved[0, :4].min()
    assert moved[1, :4].max() <= 1e-12 < moved[1, 4:].min()
    with pytest.raises(retour.RetourError, match="1 masks for 2 images"):
        retour.edit(batch, "a cat", editor="reprompt", mask=[left])


def test_non_square_image_returns_at_its_size():
    image = picture(size=(48, 24))
    inversion = retour.invert(model(), image, SOURCE, steps=3)
    result = retour.edit(inversion, TARGET)
    assert result.image.width > result.image.height
    assert result.original_size().size == (48, 24)


def test_record_and_citation():
    result = retour.edit(invert(), TARGET)
    record = result.record
    assert record["inverter"] == "direct" and record["editor"] == "p2p"
    assert record["targets"] == [TARGET] and record["prompts"] == [SOURCE]
    assert record["versions"]["torch"] == torch.__version__
    assert record["inversion"]["seed"] == 0
    text = retour.cite(result)
    assert "2310.01506" in text and "2208.01626" in text


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: invert(method="dirct"), "did you mean 'direct'"),
        (lambda: invert(steps=0), "at least 1, got 0"),
        (lambda: invert(steps=2000), "1000 training steps, got 2000"),
        (lambda: invert(guidance=float("nan")), "guidance is nan"),
        (lambda: invert(stride=3), "unknown option of 'direct' 'stride'"),
        (lambda: invert(form="both"), "both"),
        (lambda: retour.invert(model(), [], SOURCE), "no image"),
        (lambda: retour.invert(model(), picture(), [SOURCE, SOURCE]), "2 prompts for 1 images"),
        (lambda: retour.edit(invert(), [1]), "target must be a prompt"),
        (lambda: retour.edit(invert(), None), "target must be a prompt or a list of prompts"),
        (lambda: retour.edit(invert(), []), "there is no target"),
        (lambda: retour.invert(model(), picture(), 3), "prompt must be a prompt or a list"),
        (lambda: retour.edit("a.safetensors", TARGET), "begins with an inversion, .* not with str"),
        (lambda: retour.reconstruct(model()), "not with DiffusersUNet"),
        (lambda: invert(seed=2.0), "seed is 2.0: choose a whole number"),
        (lambda: retour.edit(invert(), TARGET, editor="p2pp"), "did you mean 'p2p'"),
        (lambda: retour.edit(invert(), TARGET, mask=np.zeros((16, 16))), "black everywhere"),
        (lambda: retour.edit(invert(), TARGET, editor="mask-blend"), "needs one"),
        (lambda: retour.cite("p3p"), "unknown"),
        (lambda: retour.methods(task="fly"), "unknown task"),
    ],
)
def test_bad_input_is_one_sentence(call, says):
    with pytest.raises(retour.RetourError, match=says) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_model_is_left_as_it_was():
    pipe = tiny.sd1()
    before = {name: id(module.processor) for name, module in _processors(pipe.unet)}
    loaded = retour.load(pipe)
    retour.edit(retour.invert(loaded, picture(), SOURCE, steps=2), TARGET, editor="p2p")
    assert {name: id(module.processor) for name, module in _processors(pipe.unet)} == before


def _processors(network):
    return [(n, m) for n, m in network.named_modules() if hasattr(m, "set_processor")]
