"""Plug-and-Play: what is plugged in, where, when, and from which latents."""

from dataclasses import replace
from functools import lru_cache

import pytest
import torch

import retour
from editors.runs import edit, inversion, model, noise
from editors.shapes import layout
from retour.attention.control import AttentionControl
from retour.attention.features import FeatureControl
from retour.core import registry
from retour.core.branches import Wrapped
from retour.core.control import Attending, Control
from retour.demo import examples
from retour.editors._inject import attention_after, decoder_site
from retour.editors.base import EditJob
from retour.editors.pnp import PlugAndPlay, PnPOptions, _Plugs
from retour.editors.reprompt import Reprompt
from retour.errors import RetourError

FAMILIES = ("sd1", "sd3")
STEPS = 5
SOURCE = ["a red apple on a cat"]
TARGET = {"target": ("a photo of a green pear",)}


def pnp(**options):
    return PlugAndPlay(PnPOptions(**options))


def close(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=1e-7, atol=1e-7)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def inv(family):
    return inversion(family, SOURCE, STEPS)


@pytest.fixture(scope="module")
def plain(family, inv):
    return edit(family, Reprompt(), inv, TARGET)["target"]


def test_no_steps_is_plain_guidance(family, inv, plain):
    close(edit(family, pnp(features=0.0, attention=0.0), inv, TARGET)["target"], plain)


@pytest.mark.parametrize("options", [{"features": 0.0}, {"attention": 0.0}, {}])
def test_each_injection_matters(family, inv, plain, options):
    out = edit(family, pnp(**options), inv, TARGET)
    assert not torch.allclose(out["target"], plain, atol=1e-4)


class Stands(Control):
    """Notes where the source stands before and after each step."""

    def __init__(self):
        self.before, self.after = {}, {}

    def move(self, step, denoise, state, layout):
        self.before[step.index + 1] = state.x[layout["source"]]
        return state

    def after_step(self, step, state, before, layout):
        self.after[step.index] = state.x[layout["source"]]
        return state


def test_the_source_is_the_inverted_latent_of_the_step(family, inv):
    """All N+1 of them, from pure noise on: upstream one baseline starts a step too late."""
    stands = Stands()
    edit(family, pnp(), inv, TARGET, extra=[stands])
    assert sorted(stands.before) == list(range(1, STEPS + 1))
    for places in (stands.before, stands.after):
        for place, x in places.items():
            assert torch.equal(x, inv.states["x"][place])


class Looks(AttentionControl, FeatureControl):
    """Remembers queries, keys, values and features."""

    def __init__(self):
        self.attended, self.featured = [], []

    def wants(self, site):
        return True

    def active(self, call):
        return True

    def qkv(self, call, q, k, v):
        self.attended.append((call, q, k, v))
        return q, k, v

    def output(self, call, value):
        if hasattr(call, "heads"):
            return value
        self.featured.append((call, value))
        return value


class Looking(Attending):
    def features(self):
        return self.attention()


def plugged(family, inv, **options):
    """(feature sites and their steps, attention layers and their steps) in which rows are equal."""
    looks = Looks()
    edit(family, pnp(**options), inv, TARGET, extra=[Looking(looks)])
    features, layers = set(), set()
    for call, value in looks.featured:
        assert [(r.branch, r.half) for r in call.rows] == [
            ("target", "uncond"), ("source", "cond"), ("target", "cond"),
        ]  # fmt: skip
        if torch.equal(value[0], value[1]) and torch.equal(value[2], value[1]):
            features.add((call.site.name, call.step.position))
    for call, q, k, v in looks.attended:
        if call.site.kind != "cross" and call.step.position > 0:
            image = [x[:, :, call.image] for x in (q, k, v)]
            equal = [torch.equal(x[0], x[1]) and torch.equal(x[2], x[1]) for x in image]
            assert not equal[2] and equal[0] == equal[1]
            if equal[0]:
                layers.add((call.site.name, call.step.position))
    return features, layers


def test_features_and_attention_are_plugged_in_their_steps_and_places(family, inv):
    features, layers = plugged(family, inv)
    later = {name for name, position in features if position > 0}
    assert {position for name, position in features if name in later} >= {1, 2, 3}
    assert max(position for _, position in features) == 3  # 0.8 of 5 steps
    assert max(position for _, position in layers) == 1  # 0.5 of 5 steps
    if family == "sd1":
        assert later == {"up_blocks.1.resnets.0.conv2"}
        assert {name.split(".trans")[0] for name, _ in layers} == {
            f"up_blocks.1.attentions.{k}" for k in (0, 1)
        }
    else:
        assert later == {"transformer_blocks.0.attn2"}
        assert {name for name, _ in layers} == {"transformer_blocks.1.attn"}


def test_the_source_sees_the_empty_prompt(family, inv):
    """Whatever the source prompt was: only the trajectory of the inversion counts."""
    other = replace(inv, condition=model(family).embed(["a blue cat"]))
    first, second = (edit(family, pnp(), i, TARGET)["target"] for i in (inv, other))
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("name", "wanted", "layers"),
    [
        ("sd1", "1.resnets.1", ["1.1", "1.2", "2.0", "2.1", "2.2", "3.0", "3.1", "3.2"]),
        ("sdxl", "0.resnets.1", ["0.1", "0.2", "1.0", "1.1", "1.2"]),
        ("emoji", "1.resnets.0", ["1.0", "1.1", "2.0", "2.1"]),
    ],
)
def test_layers_are_the_papers_on_stable_diffusion(name, wanted, layers):
    """Decoder layer 4 and the attention of layers 4 to 11."""
    chosen = layout(name)
    site = decoder_site(chosen, (chosen.edge, chosen.edge), "conv", joint="attention", depth=0.4)
    assert site.name == f"up_blocks.{wanted}.conv2"
    found = [name.split(".") for name in attention_after(chosen, site)]
    assert list(dict.fromkeys(f"{name[1]}.{name[3]}" for name in found)) == layers


def test_the_chosen_attention_starts_at_the_chosen_block():
    inv = inversion("sd1", SOURCE, 1)
    job = EditJob(model("sd1"), inv, None, TARGET, inv.grid)
    plugs = _Plugs(job, PnPOptions())
    assert plugs.plugs.site == "up_blocks.1.resnets.0.conv2"
    wanted = [s.name for s in model("sd1").attention_sites() if plugs.structure.wants(s)]
    assert wanted == [f"up_blocks.1.attentions.{k}.transformer_blocks.0.attn1" for k in (0, 1)]


def test_a_model_without_features_is_refused():
    class Bare:
        name = "bare"

        def feature_sites(self):
            return []

    with pytest.raises(RetourError, match="'bare' offers no features of its decoder"):
        decoder_site(Bare(), (8, 8), "conv", joint="attention", depth=0.4)


def test_a_negative_prompt_of_its_own(family, inv, plain):
    class Blue(Control):
        def branches(self, step, branches):
            blue = model(family).embed(["a blue cat"])
            return tuple(replace(b, uncond=blue) for b in branches)

    wanted = edit(family, Reprompt(), inv, TARGET, extra=[Blue()])["target"]
    found = edit(family, pnp(features=0.0, attention=0.0, negative="a blue cat"), inv, TARGET)
    close(found["target"], wanted)
    assert not torch.allclose(wanted, plain, atol=1e-3)


def test_many_targets_and_images_are_a_loop_over_them(family):
    sources = [SOURCE[0], "a photo of a blue cat"]
    targets = {"t0": ("a green apple", "a red cat"), "t1": ("a red pear", "a cat on a cat")}
    start = noise(2, seed=3)
    both = edit(family, pnp(), inversion(family, sources, 3, start), targets)
    for image, source in enumerate(sources):
        one = inversion(family, [source], 3, start[image : image + 1])
        for branch, prompts in targets.items():
            alone = edit(family, pnp(), one, {"x": (prompts[image],)})
            close(both[branch][image : image + 1], alone["x"])


class Twice(Control):
    """Asks the network once more in every step, as gradient methods do."""

    def denoiser(self, step, denoise, layout):
        return Wrapped(denoise, lambda found, x, t: denoise(x, t))


def test_further_calls_of_the_network_shift_no_step(family, inv):
    once, twice = (edit(family, pnp(), inv, TARGET, extra=e) for e in ([], [Twice()]))
    assert torch.equal(once["target"], twice["target"])


def test_nothing_is_left_on_the_model(family, inv):
    m = model(family)
    before = [s.module.processor for s in m.attention_sites()]
    edit(family, pnp(), inv, TARGET)
    assert all(a is b.module.processor for a, b in zip(before, m.attention_sites(), strict=True))
    assert not any("forward" in vars(s.module) for s in m.feature_sites())


# --- On the shipped model -------------------------------------------------------------------------


@lru_cache
def emoji(method, steps):
    pictures, prompts = zip(*[examples()[0][name] for name in ("apple", "cat")], strict=True)
    m = retour.load("emoji-unet")
    return retour.invert(m, list(pictures), prompts, method=method, steps=steps, guidance=7.5)


def test_the_way_back_of_the_inverter_does_not_matter():
    """The editor needs the trajectory, which Direct Inversion and DDIM inversion share."""
    target = "a 3d render of a green apple on a sky blue background"
    found = [retour.edit(emoji(m, 3), target, editor="pnp") for m in ("direct", "ddim")]
    assert torch.equal(found[0].latents, found[1].latents)
    assert [f.record["nfe_edit"] for f in found] == [9, 9]
    assert torch.equal(found[1].source, emoji("ddim", 3).latents)


def test_the_same_prompt_comes_back_nearer_with_everything_plugged():
    """Measured 0.67 of the error at 10 steps, 0.53 at 30 steps and guidance 3."""
    inv, errors = emoji("ddim", 10), []
    for fraction in (1.0, 0.0):
        options = {"features": fraction, "attention": fraction}
        found = retour.edit(inv, list(inv.prompts), editor="pnp", **options).latents
        errors.append(float((found - inv.latents).square().mean()))
    assert errors[0] < 0.8 * errors[1], errors


def test_registered_with_its_facts():
    entry = registry.get("edit", "pnp")
    assert entry.needs == {"attention", "features"} and entry.requires == {"trajectory"}
    entry.make(features="0.7", attention=0.3, negative="ugly, blurry")
    with pytest.raises(RetourError, match="features is 1.5: choose a number from 0 to 1"):
        entry.make(features=1.5)
