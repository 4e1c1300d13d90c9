"""Uniform cross-attention: the mean of the values at every pixel, in the rows that are named."""

import pytest
import torch

import retour
from attention.spies import Maps
from editors.runs import SOLVER, denoiser, model, noise
from retour.attention.hooks import hooked
from retour.attention.uniform import UniformMaps
from retour.core.branches import Branch, Denoiser
from retour.core.control import Attending
from retour.core.loop import walk
from retour.core.state import State

FAMILIES = ("sd1", "sd2", "sdxl")
T = 301.0
PROMPT = "a red apple"


def ask(family, prompts, *controls, x=None, scale=1.0, t=T):
    """Prediction of a denoiser over `prompts` (branch -> texts) under attention controls."""
    den = denoiser(family, prompts, scale)
    x = noise(len(den.branches)) if x is None else x
    with hooked(den, controls):
        return den(x, t).eps


def outputs(family, x, prompt=PROMPT):
    """Every cross-attention layer's module, and what it returned, (pixels, width)."""
    kept = []
    sites = [s for s in model(family).attention_sites() if s.kind == "cross"]
    handles = [
        s.module.register_forward_hook(lambda m, _, out: kept.append((m, out[0]))) for s in sites
    ]
    try:
        ask(family, {"source": [prompt]}, UniformMaps("source"), x=x)
    finally:
        for handle in handles:
            handle.remove()
    assert len(kept) == len(sites) > 3
    return kept


@pytest.mark.parametrize("family", FAMILIES)
def test_every_pixel_gets_the_projected_mean_of_the_values(family):
    """Whatever the heads, padding included, and whatever the queries."""
    text = model(family).embed([PROMPT]).tensors["embeds"].double()
    first, second = outputs(family, noise()), outputs(family, 3 * noise(seed=1) + 1)
    for (layer, out), (_, other) in zip(first, second, strict=True):
        wanted = layer.to_out[0](layer.to_v(text).mean(1))
        torch.testing.assert_close(out, wanted.expand_as(out), rtol=0, atol=1e-12)
        torch.testing.assert_close(other, out, rtol=0, atol=1e-12)


def test_maps_are_one_over_the_number_of_tokens():
    spy = Maps(("cross",))
    ask("sd1", {"source": [PROMPT]}, UniformMaps("source"), spy)
    assert spy.seen
    for _, probs in spy.seen:
        torch.testing.assert_close(probs, torch.full_like(probs, 1 / 16))


def test_prompts_matter_less_to_a_trained_network():
    """For nearly every pair of captions the noise differs less than under softmax maps."""
    net = retour.load("emoji-unet")
    prompts = [
        "a 3d render of a red apple on a sky blue background",
        "a noto style cartoon of a lion on a purple background",
        "a flat twemoji drawing of a cat on a pink background",
        "a 3d render of a penguin on an orange background",
        "a noto style cartoon of a rose on a light grey background",
    ]
    shape, eps = net.latent_shape(net.native, net.native), {}
    x = noise(size=shape[1:], channels=shape[0]).repeat(len(prompts), 1, 1, 1)
    for uniform in (True, False):
        den = Denoiser(net, [Branch("s", net.embed(prompts))])
        with hooked(den, [UniformMaps("s")] if uniform else []):
            eps[uniform] = den(x, 501.0).eps.flatten(1)
    near, far = (torch.pdist(eps[uniform]) for uniform in (True, False))
    assert float((near < far).double().mean()) >= 0.9


def test_prompts_with_the_same_mean_do_not_differ_at_all():
    """What one token gains another loses: softmax maps see it, uniform ones cannot."""
    den = denoiser("sd1", {"s": [PROMPT]})
    [branch] = den.branches
    plain = branch.condition.tensors["embeds"]
    shifted = plain.clone()
    gain = noise(size=(1, plain.shape[-1]), channels=1)[0, 0, 0].to(plain)
    shifted[:, 1] += gain
    shifted[:, 4] -= gain
    x, found = noise(), {}
    for name, embeds in (("plain", plain), ("shifted", shifted)):
        condition = branch.condition.with_tensors(embeds=embeds.double())
        den.branches = (Branch("s", condition),)
        for uniform in (True, False):
            with hooked(den, [UniformMaps("s")] if uniform else []):
                found[name, uniform] = den(x, T).eps
    # Tokens are float32: their sums differ by its rounding.
    torch.testing.assert_close(found["plain", True], found["shifted", True], rtol=0, atol=1e-6)
    assert not torch.allclose(found["plain", False], found["shifted", False], atol=1e-3)


def test_other_rows_attend_as_they_do():
    prompts = {"source": [PROMPT], "target": ["a cat"]}
    plain = ask("sd1", prompts, scale=5.0)
    mixed = ask("sd1", prompts, UniformMaps("source"), scale=5.0)
    assert torch.equal(mixed[1], plain[1])
    assert not torch.allclose(mixed[0], plain[0], atol=1e-3)
    assert torch.equal(ask("sd1", prompts, UniformMaps("nobody"), scale=5.0), plain)


def test_self_attention_is_untouched():
    before, after = Maps(("self",)), Maps(("self",))
    den = denoiser("sd1", {"source": [PROMPT]})
    for spy, controls in ((before, []), (after, [UniformMaps("source")])):
        walk(
            SOLVER, den, State(noise()), den.model.grid(1), down=True,
            controls=[Attending(*controls, spy)],
        )  # fmt: skip
    assert torch.equal(before.seen[0][1], after.seen[0][1])  # the first layer, before any text
    wants = UniformMaps("source").wants
    assert {s.kind for s in model("sd3").attention_sites() if wants(s)} == set()
    assert {s.kind for s in model("sd1").attention_sites() if wants(s)} == {"cross"}
