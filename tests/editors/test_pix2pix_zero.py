"""pix2pix-zero: edit directions, and text attention held to the reconstruction's by gradients."""

from dataclasses import replace

import pytest
import torch

import retour.editors.pix2pix_zero as method
from attention.spies import Maps
from editors.runs import SOLVER, denoiser, edit, inversion, model, noise
from retour.core import registry
from retour.core.control import Attending, Control
from retour.core.loop import walk
from retour.core.state import State
from retour.editors._energy import descent, look
from retour.editors.base import EditJob
from retour.editors.pix2pix_zero import (
    TEXT,
    Pix2PixZero,
    Pix2PixZeroOptions,
    mean_embedding,
    mismatch,
    sentences,
)
from retour.editors.reprompt import Reprompt
from retour.errors import RetourError

FAMILIES = ("sd1", "sd3")
STEPS = 4
SOURCE = ["a red apple on a cat"]
TARGET = {"target": ("a photo of a green pear",)}


def zero(**options):
    return Pix2PixZero(Pix2PixZeroOptions(**options))


def close(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=1e-7, atol=1e-7)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def inv(family):
    return inversion(family, SOURCE, STEPS)


class Given(Control):
    """Conditions of the target, whatever they were."""

    def __init__(self, **given):
        self.given = given

    def branches(self, step, branches):
        return tuple(b if b.name == "source" else replace(b, **self.given) for b in branches)


@pytest.mark.parametrize("negative", ["source", "inversion"])
def test_rate_zero_is_guidance_with_the_shifted_embedding(family, inv, negative):
    """By hand: the source's embedding plus the difference of the means; the caption as negative."""
    m, ends = model(family), ("a cat|a photo of a cat", "a pear|a photo of a pear")

    def shifted(name):
        start, end = (m.embed(text.split("|")).tensors[name].mean(0) for text in ends)
        return {name: inv.condition.tensors[name] + end - start}

    given = {"condition": inv.condition.with_tensors(**shifted("embeds"))}
    if family == "sd3":
        given["condition"] = given["condition"].with_tensors(**shifted("pooled"))
    if negative == "source":
        given["uncond"] = inv.condition
    wanted = edit(family, Reprompt(), inv, TARGET, extra=[Given(**given)])["target"]
    options = {"source_sentences": ends[0], "target_sentences": ends[1], "negative": negative}
    found = edit(family, zero(rate=0.0, push=1.0, **options), inv, TARGET)["target"]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)  # of float32 embeddings
    other = edit(family, zero(rate=0.0, push=1.0, negative=negative), inv, TARGET)["target"]
    assert not torch.allclose(found, other, atol=1e-3)


def test_against_the_caption_targets_are_pushed_less(family, inv):
    """A quarter of the guidance beyond 1, which is 5 here: 2; none against the null prompt."""
    given = Given(uncond=inv.condition, scale=2.0)
    wanted = edit(family, Reprompt(), inv, TARGET, extra=[given])["target"]
    close(edit(family, zero(rate=0.0), inv, TARGET)["target"], wanted)
    found = [
        edit(family, zero(rate=0.0, negative="inversion", push=p), inv, TARGET)["target"]
        for p in (0.25, 1.0)
    ]
    assert torch.equal(*found)
    with pytest.raises(RetourError, match="push is 2"):
        zero(push=2.0)


def test_without_sentences_the_prompts_are_the_direction(family, inv):
    options = {"source_sentences": SOURCE[0], "target_sentences": TARGET["target"][0]}
    found, wanted = (edit(family, zero(**o), inv, TARGET)["target"] for o in (options, {}))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_means_of_sentences(inv, family):
    job = EditJob(model(family), inv, None, TARGET, inv.grid)
    assert sentences(" a cat| a red pear |") == ["a cat", "a red pear"]
    found = mean_embedding(job, "a cat|a red pear")["embeds"]
    parts = model(family).embed(["a cat", "a red pear"]).tensors["embeds"]
    torch.testing.assert_close(found, parts.mean(0, keepdim=True))


class Losses:
    """Watches every gradient step: loss before and after, gradient, where it was made."""

    def __init__(self, monkeypatch, rate=0.1):
        self.seen = []

        def watched(energy, x):
            values, slope = descent(energy, x)
            self.seen.append((values, energy(x - rate * slope), slope, x))
            return values, slope

        monkeypatch.setattr(method, "descent", watched)


@pytest.mark.parametrize("halves", ["cond", "both"])
def test_the_gradient_step_lowers_the_loss(family, inv, monkeypatch, halves):
    losses = Losses(monkeypatch)
    edit(family, zero(halves=halves), inv, TARGET)
    assert len(losses.seen) == STEPS
    lower = [bool((after < before).all()) for before, after, *_ in losses.seen]
    assert sum(lower) >= 0.9 * STEPS
    assert all(float(before) > 0 for before, *_ in losses.seen)


def test_the_state_moves_by_the_gradient(family, inv, monkeypatch):
    """The solver steps from, and the network is asked about, the moved latents."""
    losses, started = Losses(monkeypatch), []

    class Notes(Control):
        def after_step(self, step, state, before, layout):
            started.append(before.x[layout["target"]])
            return state

    edit(family, zero(), inv, TARGET, extra=[Notes()])
    for (_, _, slope, x), found in zip(losses.seen, started, strict=True):
        close(found, x - 0.1 * slope)


def test_reference_maps_are_those_of_a_reconstruction_of_its_own(family, inv, monkeypatch):
    """The published two passes: reconstruct with the caption, keep all maps, then edit."""
    stored = Maps(("cross", "joint"))
    den = denoiser(family, {"source": SOURCE}, scale=1.0)
    walk(SOLVER, den, State(inv.noise), inv.grid, down=True, controls=[Attending(stored)])
    first = {(c.step.t, c.site.name): c.image_to_text(probs) for c, probs in stored.seen}
    wanted = []
    real = mismatch

    def noted(found, reference):
        wanted.append(reference)
        return real(found, reference)

    monkeypatch.setattr(method, "mismatch", noted)
    edit(family, zero(), inv, TARGET)
    assert len(wanted) == STEPS
    for step, maps in zip(inv.grid.walk(down=True), wanted, strict=True):
        assert set(maps) == {name for t, name in first if t == step.t}
        for name, found in maps.items():
            close(found, first[step.t, name])


@pytest.mark.parametrize("halves", ["cond", "both"])
def test_the_gradient_is_the_losses(family, inv, monkeypatch, halves):
    """Central differences along a random direction (SD3's norms are float32 inside)."""
    kept = []

    def watched(energy, x):
        values, slope = descent(energy, x)
        if not kept:
            way = noise(len(x), seed=9)
            ahead, behind = (energy(x + h * way).sum() for h in (5e-3, -5e-3))
            kept.append(((ahead - behind) / 1e-2, (slope * way).sum()))
        return values, slope

    monkeypatch.setattr(method, "descent", watched)
    edit(family, zero(halves=halves), inv, TARGET)
    torch.testing.assert_close(*kept[0], rtol=1e-3, atol=0)


def test_both_halves_are_averaged(family, inv):
    """Two halves of the same prompt and negative prompt weigh like one."""
    same = {"target": ("a photo of a green pear",)}
    inv = replace(inv, condition=model(family).embed(same["target"]))
    found = [edit(family, zero(halves=h), inv, same)["target"] for h in ("cond", "both")]
    close(*found)


def test_the_loss_sums_places_and_averages_heads():
    found = {"a": torch.ones(2, 4, 3, 5), "b": torch.full((2, 1, 2, 2), 2.0)}
    wanted = {"a": torch.zeros(2, 4, 3, 5), "b": torch.zeros(2, 1, 2, 2)}
    assert mismatch(found, wanted).tolist() == [15 + 16, 15 + 16]


def test_the_same_prompt_stays_the_source(family, inv):
    out = edit(family, zero(), inv, {"target": tuple(SOURCE)})
    close(out["target"], out["source"])


def test_the_source_never_notices(family, inv):
    out = edit(family, zero(rate=1.0), inv, TARGET)
    close(out["source"], edit(family, zero(rate=0.0), inv, TARGET)["source"])
    strong = zero(rate=1.0, negative="inversion")
    close(edit(family, strong, inv, TARGET)["source"], inv.latents)


def test_many_targets_and_images_are_a_loop_over_them(family):
    sources = [SOURCE[0], "a photo of a blue cat"]
    targets = {"t0": ("a green apple", "a red cat"), "t1": ("a red pear", "a cat on a cat")}
    start, editor = noise(2, seed=3), zero(halves="both")
    both = edit(family, editor, inversion(family, sources, 3, start), targets)
    for image, source in enumerate(sources):
        one = inversion(family, [source], 3, start[image : image + 1])
        for branch, prompts in targets.items():
            alone = edit(family, editor, one, {"x": (prompts[image],)})
            close(both[branch][image : image + 1], alone["x"])


def test_what_it_costs(family, inv):
    """Reference and gradient 1 each; source 1 (2 guided), target 2."""
    for options, rows in (({}, 5), ({"negative": "inversion"}, 6), ({"rate": 0.0}, 3)):
        den = denoiser(family, {"source": SOURCE, **TARGET})
        job = EditJob(model(family), inv, den.layout, TARGET, inv.grid)
        state = State(inv.noise).tile(2)
        walk(SOLVER, den, state, inv.grid, down=True, controls=[zero(**options).control(job)])
        assert den.ledger.rows == rows * STEPS


def test_looking_leaves_nothing_and_records_a_graph_only_where_wanted(family, inv):
    m, den = model(family), denoiser(family, {"source": SOURCE})
    before = [s.module.processor for s in m.attention_sites()]
    maps, _ = look(den, [inv.condition], inv.noise, inv.grid.times[-1], TEXT)
    assert not any(value.requires_grad for value in maps.values())
    leaf = inv.noise.clone().requires_grad_()
    maps, _ = look(den, [inv.condition], leaf, inv.grid.times[-1], TEXT)
    assert all(value.requires_grad for value in maps.values())
    assert {s.name for s in m.attention_sites() if s.kind != "self"} == set(maps)
    assert all(a is s.module.processor for a, s in zip(before, m.attention_sites(), strict=True))


def test_a_direction_with_one_end_is_refused():
    with pytest.raises(RetourError, match="give both source_sentences and target_sentences"):
        zero(source_sentences="a cat")
    with pytest.raises(RetourError, match="rate is -1"):
        zero(rate=-1.0)


def test_registered_with_its_facts():
    entry = registry.get("edit", "pix2pix-zero")
    assert entry.needs == {"attention", "gradients"}
    entry.make(rate="0.2", source_sentences="a|b", target_sentences="c", halves="both")
