"""Prompt-to-Prompt: the identities that an implementation must meet, on UNet and MM-DiT."""

import json

import pytest
import torch

from attention.spies import Maps
from editors.runs import SOLVER, denoiser, edit, inversion, model, noise
from retour.attention.store import AttentionStore
from retour.core import registry
from retour.core.branches import Wrapped
from retour.core.control import Attending, Chain, Control
from retour.core.loop import walk
from retour.core.state import State
from retour.editors.align import align
from retour.editors.base import EditJob
from retour.editors.p2p import P2POptions, PromptToPrompt
from retour.editors.reprompt import Reprompt
from retour.errors import RetourError

FAMILIES = ("sd1", "sd3")
STEPS = 4
SOURCE = ["a red apple on a cat"]
LONGER = {"target": ("a photo of a red pear on a cat",)}
SAME_COUNT = {"target": ("a green apple on a cat",)}
ALL_ON = {"cross_steps": 1.0, "self_steps": 1.0}


def p2p(**options):
    return PromptToPrompt(P2POptions(**options))


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
    """Both branches without any control, in one batch."""
    return edit(family, p2p(cross_steps=0, self_steps=0), inv, LONGER)


@pytest.mark.parametrize(
    "options",
    [
        ALL_ON,
        {"mode": "refine", "blend": "apple"},
        {"mode": "replace", "cross_steps": "0.2-0.8,apple:0.5", "blend": "auto"},
    ],
)
def test_the_same_prompt_gives_the_source(family, inv, options):
    out = edit(family, p2p(**options), inv, {"target": tuple(SOURCE)})
    close(out["target"], out["source"])


def test_no_steps_is_plain_guidance(family, inv, plain):
    alone = edit(family, Reprompt(), inv, LONGER)
    close(plain["target"], alone["target"])
    assert not torch.allclose(plain["target"], plain["source"], atol=1e-2)


@pytest.mark.parametrize("options", [ALL_ON, {"reweight": "pear:3", "blend": "apple,pear"}])
def test_the_source_never_notices(family, inv, plain, options):
    out = edit(family, p2p(**options), inv, LONGER)
    close(out["source"], plain["source"])
    close(out["source"], inv.latents)
    assert not torch.allclose(out["target"], plain["target"], atol=1e-3)


def words(family, prompt):
    return model(family).tokens(prompt)


def last_maps(family, inv, options, targets):
    """Text blocks of all coarse layers and steps after the control: (source, target, call)."""
    spy = Maps(("cross", "joint"))
    edit(family, p2p(**options), inv, targets, extra=[Attending(spy)])
    for call, probs in spy.seen:
        source, target = (call.rows.where(b, "cond")[0] for b in ("source", "target"))
        maps = call.image_to_text(probs)
        yield maps[source], maps[target], call


def test_aligned_tokens_carry_the_source_maps(family, inv):
    old, new = words(family, SOURCE[0]), words(family, LONGER["target"][0])
    found = align(old, new, "refine")
    kept = found.kept.bool().nonzero()[:, 0]
    own = (~found.kept.bool()).nonzero()[:, 0]
    assert len(own) == 4 + (family == "sd3") * 4  # "photo of ... a pear", once per encoder
    for source, target, _ in last_maps(family, inv, {**ALL_ON, "mode": "refine"}, LONGER):
        assert torch.equal(target[..., kept], source[..., found.matrix[:, kept].argmax(0)])
        assert not torch.allclose(target[..., own], source[..., own], atol=1e-4)


def test_stored_maps_of_aligned_tokens_are_equal(family, inv):
    store = AttentionStore()
    options = {**ALL_ON, "mode": "refine"}
    edit(family, p2p(**options), inv, LONGER, extra=[Attending(store)])
    found = align(words(family, SOURCE[0]), words(family, LONGER["target"][0]), "refine")
    kept = found.kept.bool().nonzero()[:, 0]
    source, target = store.maps("source", 0), store.maps("target", 0)
    assert torch.equal(target[..., kept], source[..., found.matrix[:, kept].argmax(0)])


def test_unaligned_tokens_carry_the_networks_own_maps(inv, family):
    before, after = Maps(("cross", "joint")), Maps(("cross", "joint"))
    first = [Attending(before)]
    targets, editor = LONGER, p2p(mode="refine", cross_steps=1.0, self_steps=0)
    found = align(words(family, SOURCE[0]), words(family, LONGER["target"][0]), "refine")
    own = (found.kept == 0).nonzero()[:, 0]

    class Both:
        source_branch = True

        def control(self, job):
            return Chain([*first, editor.control(job)])

    edit(family, Both(), inv, targets, extra=[Attending(after)])
    for (call, old), (_, new) in zip(before.seen, after.seen, strict=True):
        row = call.rows.where("target", "cond")
        old, new = call.image_to_text(old[row]), call.image_to_text(new[row])
        assert torch.equal(old[..., own], new[..., own])


def test_reweighting_scales_the_column_exactly(family, inv):
    """Of a kept word (apple), and of one whose tokens share the old word's map (green)."""
    old, new = words(family, SOURCE[0]), words(family, SAME_COUNT["target"][0])
    matrix = align(old, new, "replace").matrix.double()
    scale = torch.ones(len(new.ids), dtype=torch.float64)
    scale[[*new.words[1].tokens, *new.words[2].tokens]] = 2.5
    assert (matrix.amax(0) < 1).any()
    options = {**ALL_ON, "mode": "replace", "reweight": {"green": 2.5, "apple": 2.5}}
    for source, target, _ in last_maps(family, inv, options, SAME_COUNT):
        torch.testing.assert_close(target, source @ matrix * scale, rtol=1e-12, atol=0)
        whole = matrix.amax(0) == 1
        inherited = source[..., matrix.argmax(0)] * scale
        assert torch.equal(target[..., whole], inherited[..., whole])


def test_self_attention_is_copied_in_its_window_at_coarse_layers(family, inv):
    spy = Maps(("self", "joint"))
    editor = p2p(cross_steps=0, self_steps="0.25-0.5")
    edit(family, editor, inv, LONGER, extra=[Attending(spy)])
    copied = set()
    for call, probs in spy.seen:
        source, target = (call.rows.where(b, "cond") for b in ("source", "target"))
        maps = call.image_to_image(probs)
        # Before the first step both branches are the same noise, and so are their first maps.
        if call.step.position > 0 and torch.equal(maps[source], maps[target]):
            copied.add((call.step.position, call.factor))
    assert copied == {(1, 2)}


def test_many_targets_and_images_are_a_loop_over_them(family):
    sources = [SOURCE[0], "a photo of a blue cat"]
    targets = {
        "t0": ("a green apple on a cat", "a photo of a red cat"),
        "t1": ("a photo of a red pear on a cat", "a cat"),
    }
    start = noise(2, seed=3)
    editor = p2p(reweight="red:2", blend="auto", cross_steps="0.5,cat:0.25")
    both = edit(family, editor, inversion(family, sources, 3, start), targets)
    for image, source in enumerate(sources):
        one = inversion(family, [source], 3, start[image : image + 1])
        for branch, prompts in targets.items():
            editor_one = p2p(
                reweight="red:2" if "red" in prompts[image] else None,
                blend="auto",
                cross_steps="0.5,cat:0.25",
            )
            alone = edit(family, editor_one, one, {"x": (prompts[image],)})
            close(both[branch][image : image + 1], alone["x"])
            close(both["source"][image : image + 1], alone["source"])


def test_one_sided_guidance_rows_are_enough(family, inv):
    """At scale 1 there are no unconditional rows; the control still acts."""
    out = edit(family, p2p(**ALL_ON), inv, {"target": tuple(SOURCE)}, scale=1.0)
    close(out["target"], out["source"])


class Twice(Control):
    """Asks the network once more in every step, as gradient methods do."""

    def denoiser(self, step, denoise, layout):
        return Wrapped(denoise, lambda found, x, t: denoise(x, t))


def test_further_calls_of_the_network_shift_no_step(family, inv):
    """Upstream, steps are counted by calls. The blend's maps are seen twice: the same mean."""
    editor = p2p(cross_steps=0.5, self_steps=0.5, blend="pear")
    once, twice = (edit(family, editor, inv, LONGER, extra=e) for e in ([], [Twice()]))
    assert torch.equal(once["target"], twice["target"])


def test_nothing_is_renormalised(family, inv):
    """Rows of a scaled map do not sum to one."""
    options = {**ALL_ON, "mode": "refine", "reweight": {"red": 3.0, "cat": 3.0, "pear": 3.0}}
    sums = [target.sum(-1) for _, target, _ in last_maps(family, inv, options, LONGER)]
    assert max(float(s.max()) for s in sums) > 1.05


def test_nothing_is_left_on_the_model(family, inv):
    before = [s.module.processor for s in model(family).attention_sites()]
    edit(family, p2p(blend="apple"), inv, SAME_COUNT)
    after = [s.module.processor for s in model(family).attention_sites()]
    assert all(a is b for a, b in zip(before, after, strict=True))


def test_registered_with_its_facts():
    entry = registry.get("edit", "p2p")
    assert entry.needs == {"attention"} and entry.factory.source_branch
    entry.make(cross_steps="0.8", self_steps="0.1-0.4", reweight="red:2", blend="none")
    entry.make(cross_steps={"default_": (0, 0.8), "red": 0.1}, reweight={"red": 2}, blend=None)
    json.dumps(entry.describe())
    assert not registry.get("edit", "reprompt").factory.source_branch


@pytest.mark.parametrize(
    "options, message",
    [
        ({"cross_steps": 1.5}, "cross_steps is 1.5: give a fraction of the steps from 0 to 1"),
        ({"self_steps": "0.6-0.2"}, "self_steps is .*0.6.*0.2"),
        ({"self_steps": "often"}, "self_steps is 'often'"),
        ({"cross_steps": "0.2,0.4"}, "cross_steps is '0.2,0.4'"),
        ({"reweight": "red"}, "reweight has 'red': give word:number"),
        ({"reweight": "red:much"}, "reweight has 'red:much'"),
        ({"self_max": 2}, "self_max is 2: choose a number from 0 to 1"),
    ],
)
def test_malformed_options_are_refused_at_once(options, message):
    with pytest.raises(RetourError, match=message):
        p2p(**options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"mode": "replace"}, "'replace' pairs words one to one, but .* has 6 words and .* has 9"),
        ({"reweight": "gren:2"}, "reweight names the word 'gren', which is not in 'a photo of"),
        ({"cross_steps": "0.4,appel:0.1"}, "cross_steps names the word 'appel'"),
        ({"blend": "pear,cat"}, "blend names the word 'pear'"),
        ({"blend": "dog"}, "blend names the word 'dog'"),
    ],
)
def test_words_that_no_prompt_holds_are_refused(options, message):
    inv = inversion("sd1", SOURCE, 1)
    with pytest.raises(RetourError, match=message):
        edit("sd1", p2p(**options), inv, LONGER)


def test_a_climb_is_left_alone(family, inv):
    """Schedules count from the noisy end of a descent: on the way up the control sleeps."""
    den = denoiser(family, {"source": SOURCE, **LONGER})
    job = EditJob(model(family), inv, den.layout, LONGER, inv.grid)
    start = State(inv.latents).tile(2)
    controlled, bare = (
        walk(SOLVER, den, start, inv.grid, down=False, controls=controls).x
        for controls in ([p2p(**ALL_ON).control(job)], [])
    )
    assert torch.equal(controlled, bare)
