"""Null-text inversion on every family: what is learned, where it goes, and what stays as it was."""

import logging
from dataclasses import replace

import pytest
import torch

import retour
from attention.spies import Spy
from editors.runs import model
from inverters.pivots import FREE, SOURCE, STEPS, TARGET, close, distance, invert, job
from retour import api
from retour.core.control import Attending
from retour.demo import examples
from retour.errors import RetourError
from retour.inverters._pivotal import Plan, Tuning

FAMILIES = ("sd1", "sd2", "sdxl", "sd3")
FLOAT32 = 1e-4  # embeddings are learned in float32 here; test_pivotal has the float64 case
SHORT = {"inner_steps": 2, "lr": 0.05}


def gap(inversion, **settings):
    """How far the reconstruction is from the data."""
    return distance(api.reconstruct(inversion, **settings).latents, inversion.latents)


@pytest.mark.parametrize("family", FAMILIES)
def test_guided_sampling_comes_nearer_to_the_image(family):
    learned = invert("null-text", family, **SHORT)
    embeds = learned.negative.tensors["embeds"]
    assert learned.extras["uncond"].shape == (STEPS, *embeds.shape)
    assert gap(learned) < 0.9 * gap(invert("ddim", family))


def test_no_inner_steps_is_plain_guidance_bit_for_bit():
    idle, plain = invert("null-text", inner_steps=0), invert("ddim")
    assert torch.equal(api.reconstruct(idle).latents, api.reconstruct(plain).latents)
    assert torch.equal(retour.edit(idle, TARGET).latents, retour.edit(plain, TARGET).latents)


@pytest.mark.parametrize("family", ["sd1", "sd3"])
def test_the_way_back_is_the_way_that_was_learned(family):
    """Embeddings are kept by interval, clean first: any other order of them would miss."""
    inversion = invert("null-text", family, **SHORT)
    pivot = inversion.states["x"]
    found = Tuning(job(inversion), inversion.grid, pivot, "uncond", Plan(2, 0.05, 0.5, 1e-5, 2e-5))
    close(api.reconstruct(inversion).latents, found.each_step().states[0])
    turned = {**inversion.extras, "uncond": inversion.extras["uncond"].flip(0)}
    other = api.reconstruct(replace(inversion, extras=turned)).latents
    assert not torch.allclose(other, found.each_step().states[0], atol=1e-4)


def test_at_guidance_one_nothing_is_learned():
    learned, plain = invert("null-text", guidance=1.0), invert("ddim", guidance=1.0)
    null = learned.negative.tensors["embeds"].to(learned.extras["uncond"])
    assert torch.equal(learned.extras["uncond"], null.expand_as(learned.extras["uncond"]))
    assert torch.equal(api.reconstruct(learned).latents, api.reconstruct(plain).latents)


def test_both_branches_or_the_source_alone_return_with_it():
    """Without attention control the branches do not meet: single-branch mixes the other two."""
    both = retour.edit(invert("null-text", **SHORT), TARGET, **FREE)
    single = retour.edit(invert("null-text", variant="single-branch", **SHORT), TARGET, **FREE)
    plain = retour.edit(invert("ddim"), TARGET, **FREE)
    close(single.source, both.source)
    close(single.latents, plain.latents)
    assert not torch.allclose(both.latents, plain.latents, atol=1e-3)
    assert not torch.allclose(both.source, plain.source, atol=1e-3)


def test_one_embedding_for_all_intervals():
    learned = invert("null-text", variant="global", **SHORT)
    embeds = learned.extras["uncond"]
    assert torch.equal(embeds, embeds[:1].expand_as(embeds))
    assert gap(learned) < gap(invert("ddim"))


def test_only_the_sequence_embeddings_are_learned():
    """SDXL's pooled embeddings and sizes stay those of the null prompt."""
    inversion = invert("null-text", "sdxl", **SHORT)
    seen = []
    retour.edit(inversion, TARGET, observers=[lambda e: seen.append((e.step, e.denoiser.branches))])
    for step, branches in seen:
        assert {b.name for b in branches} == {"source", "target"}
        for branch in branches:
            found, null = branch.uncond.tensors, inversion.negative.tensors
            assert torch.equal(found["embeds"], inversion.extras["uncond"][step.index])
            assert all(torch.equal(found[k], null[k]) for k in ("pooled", "time_ids"))


@pytest.mark.parametrize(
    ("variant", "tuning"), [("per-step", 1 + 4 + 1), ("single-branch", 6), ("global", 1 + 4 + 2)]
)
def test_evaluations_are_counted(variant, tuning):
    inversion = invert("null-text", inner_steps=4, stop=0.0, slack=0.0, variant=variant)
    assert inversion.record["nfe"] == STEPS * (1 + tuning)
    assert retour.edit(inversion, TARGET).record["nfe_edit"] == STEPS * 4


def test_a_batch_is_a_loop_that_can_be_saved_and_picked(tmp_path):
    batch = invert("null-text", images=2, **SHORT)
    batch.save(tmp_path / "two.safetensors")
    loaded = retour.Inversion.load(tmp_path / "two.safetensors", batch.model)
    edited = retour.edit(loaded.take([1, 0, 1]), TARGET)
    alone = retour.edit(invert("null-text", prompts=(SOURCE,), **SHORT), TARGET)
    close(edited.latents[1], alone.latents[0], FLOAT32)
    close(edited.latents[0], edited.latents[2])


def test_weights_and_processors_are_left_as_they_were():
    net = model("sd1").net
    net.zero_grad()  # Other tests share it.
    before = [s.module.processor for s in model("sd1").attention_sites()]
    needs = [p.requires_grad for p in net.parameters()]
    invert("null-text", inner_steps=1)
    assert all(p.grad is None for p in net.parameters())
    assert [p.requires_grad for p in net.parameters()] == needs
    after = [s.module.processor for s in model("sd1").attention_sites()]
    assert all(a is b for a, b in zip(before, after, strict=True))


def test_attention_control_sleeps_while_embeddings_are_learned():
    """A control given for the inversion sees the walk up, and nothing of the optimisation."""
    spy = Spy()
    invert("null-text", controls=(Attending(spy),), **SHORT)
    sites = len(model("sd1").attention_sites())
    assert len(spy.calls) == STEPS * sites and not any(c.step.down for c in spy.calls)


def test_another_guidance_than_the_learned_one_is_told(caplog):
    inversion = invert("null-text", **SHORT)
    with caplog.at_level(logging.WARNING):
        api.reconstruct(inversion)
        assert not caplog.records
        api.reconstruct(inversion, guidance=2.0)
    assert "learned at guidance 5 and are used at 2" in caplog.text


def test_a_float16_network_is_refused_before_the_walk(monkeypatch):
    """In that type the gradients vanish, and the loss would stay flat without a word."""

    def never(*_):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(type(model("sd1")), "dtype", torch.float16)
    monkeypatch.setattr(type(model("sd1")), "network", never)
    with pytest.raises(RetourError, match="float16.*dtype='float32'"):
        invert("null-text", steps=1)


@pytest.mark.parametrize("option", ["inner_steps", "lr", "stop", "slack"])
def test_negative_settings_are_refused(option):
    with pytest.raises(RetourError, match=f"{option} is -1: choose a number of at least 0"):
        invert("null-text", **{option: -1})


@pytest.mark.slow
def test_a_trained_network_returns_to_the_image_at_high_guidance():
    """The more inner steps the nearer, a tenth of DDIM's error, and near that of guidance 1."""
    pictures = [examples()[0][name] for name in ("apple", "house")]
    net, gaps = retour.load("emoji-unet"), []
    images, prompts = ([picture[k] for picture in pictures] for k in (0, 1))
    for inner in (0, 1, 3, 10):
        inversion = retour.invert(
            net, images, prompts, method="null-text", steps=25, guidance=7.5,
            inner_steps=inner, stop=0.0, slack=0.0,
        )  # fmt: skip
        gaps.append(gap(inversion))
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] <= 0.1 * gaps[0]
    assert gaps[-1] <= 3 * gap(inversion, guidance=1.0)
