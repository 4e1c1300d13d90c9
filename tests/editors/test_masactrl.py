"""MasaCtrl: whose keys and values, in which layers and steps, with which masks."""

from dataclasses import replace

import pytest
import torch

from attention.spies import Maps
from editors.runs import SOLVER, denoiser, edit, inversion, model, noise
from editors.shapes import layout
from retour.attention.control import AttentionCall, AttentionControl
from retour.core import registry
from retour.core.branches import Row, Rows, Wrapped
from retour.core.control import Attending, Chain, Control
from retour.core.grid import Step, part_of
from retour.core.loop import walk
from retour.core.state import State
from retour.editors._inject import lenders
from retour.editors.base import EditJob
from retour.editors.masactrl import (
    MasaCtrl,
    MasaCtrlOptions,
    MutualAttention,
    alike,
    chosen_layers,
)
from retour.editors.reprompt import Reprompt
from retour.errors import RetourError

FAMILIES = ("sd1", "sd3")
STEPS = 4
SOURCE = ["a red apple on a cat"]
TARGET = {"target": ("a photo of a green pear",)}
ALL = {"start": 0.0, "layers": "all", "coarsest": 0.0, "depth": 0.0}


def masactrl(**options):
    return MasaCtrl(MasaCtrlOptions(**options))


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
    return edit(family, masactrl(start=1.0), inv, TARGET)


class First:
    """An editor that runs other attention controls before another editor's."""

    source_branch = True

    def __init__(self, editor, *controls):
        self.editor, self.controls = editor, controls

    def control(self, job):
        return Chain([Attending(*self.controls), self.editor.control(job)])


@pytest.mark.parametrize("options", [ALL, {}])
def test_the_same_prompt_gives_the_source(family, inv, options):
    out = edit(family, masactrl(**options), inv, {"target": tuple(SOURCE)})
    close(out["target"], out["source"])


def test_no_steps_is_plain_guidance(family, inv, plain):
    close(plain["target"], edit(family, Reprompt(), inv, TARGET)["target"])
    assert not torch.allclose(plain["target"], plain["source"], atol=1e-2)


@pytest.mark.parametrize("options", [ALL, {}, {"masks": "apple,pear", **ALL}])
def test_the_source_never_notices(family, inv, plain, options):
    out = edit(family, masactrl(**options), inv, TARGET)
    close(out["source"], plain["source"])
    assert not torch.allclose(out["target"], plain["target"], atol=1e-3)


class Disturbed(AttentionControl):
    """Adds to keys and values of the image in one branch."""

    def __init__(self, branch):
        self.branch = branch

    def wants(self, site):
        return site.kind != "cross"

    def qkv(self, call, q, k, v):
        rows = torch.tensor([row.branch == self.branch for row in call.rows])
        added = torch.zeros_like(v)
        added[rows, :, call.image] = 0.5
        return q, k + added, v - added


def test_keys_and_values_of_the_target_do_not_matter_those_of_the_source_do(family, inv):
    editor = masactrl(**ALL)
    out = edit(family, editor, inv, TARGET)
    same = edit(family, First(editor, Disturbed("target")), inv, TARGET)
    assert torch.equal(same["target"], out["target"])
    other = edit(family, First(editor, Disturbed("source")), inv, TARGET)
    assert not torch.allclose(other["target"], out["target"], atol=1e-3)


class Seen(AttentionControl):
    """Remembers queries, keys and values."""

    def __init__(self):
        self.calls = []

    def qkv(self, call, q, k, v):
        self.calls.append((call, q, k, v))
        return q, k, v


def test_each_half_takes_the_sources_of_its_own_half(family, inv):
    before, after = Seen(), Seen()
    edit(family, First(masactrl(**ALL), before), inv, TARGET, extra=[Attending(after)])
    compared = 0
    for (call, q, k, v), (_, q2, k2, v2) in zip(before.calls, after.calls, strict=True):
        assert torch.equal(q, q2)
        if call.site.kind == "cross":
            assert torch.equal(k, k2) and torch.equal(v, v2)
            continue
        for half in ("uncond", "cond"):
            source, target = (call.rows.where(b, half)[0] for b in ("source", "target"))
            for old, new in ((k, k2), (v, v2)):
                assert torch.equal(new[target][:, call.image], old[source][:, call.image])
                assert torch.equal(new[source], old[source])
                if call.text is not None:
                    assert torch.equal(new[target][:, call.text], old[target][:, call.text])
        pair = call.rows.where("source").tolist()
        compared += not torch.equal(k[pair[0]], k[pair[1]])
    assert compared  # the two halves of the source do differ


def test_a_source_without_guidance_lends_its_only_row():
    rows = Rows([Row("target", "uncond", 0), Row("source", "cond", 0), Row("target", "cond", 0)])
    assert lenders(rows).tolist() == [1, 1, 1]
    both = Rows(Row(b, h, i) for h in ("u", "cond") for b in ("source", "t") for i in (0, 1))
    assert lenders(both).tolist() == [0, 1, 0, 1, 4, 5, 4, 5]
    assert lenders(Rows([Row("target", "cond", 0)])) is None


def test_under_the_empty_prompt_an_unguided_source_is_the_same(family):
    inv = inversion(family, [""], STEPS)
    guided = edit(family, masactrl(**ALL), inv, TARGET)
    unguided = edit(family, masactrl(source_guidance=1.0, **ALL), inv, TARGET)
    close(unguided["target"], guided["target"])


def test_the_empty_source_prompt_is_the_source_branchs_alone(family, inv, plain):
    out = edit(family, masactrl(start=1.0, source_prompt="empty"), inv, TARGET)
    empty = edit(family, masactrl(start=1.0), replace(inv, condition=inv.negative), TARGET)
    close(out["source"], empty["source"])
    close(out["target"], plain["target"])
    assert not torch.allclose(out["source"], plain["source"], atol=1e-3)


def test_control_begins_at_its_step_and_acts_in_fine_layers(family, inv):
    spy = Seen()
    edit(family, masactrl(start=0.5), inv, TARGET, extra=[Attending(spy)])
    acted = set()
    for call, _, k, _ in spy.calls:
        source, target = (call.rows.where(b, "cond")[0] for b in ("source", "target"))
        image = k[:, :, call.image]
        # Before the first step both branches are the same noise, and so are their first keys.
        equal = torch.equal(image[source], image[target])
        if call.site.kind != "cross" and call.step.position > 0 and equal:
            acted.add((call.step.position, call.site.place, call.site.name))
    assert {position for position, *_ in acted} == {2, 3}
    assert {place for _, place, _ in acted} == {"up" if family == "sd1" else "block"}


def test_four_of_fifty():
    """To the nearest step: with ten of them the target has one to itself."""
    starts = [round(MasaCtrlOptions().start * steps) for steps in (50, 25, 20, 10)]
    assert starts == [4, 2, 2, 1]
    assert [part_of(0.8, n) for n in (50, 5, 1)] == [40, 4, 0]


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("sd1", [f"up_blocks.{b}.attentions.{k}" for b in (2, 3) for k in range(3)]),
        ("sdxl", [f"up_blocks.1.attentions.{k}" for k in range(3)]),
        ("emoji", [f"up_blocks.2.attentions.{k}" for k in range(2)]),
    ],
)
def test_layers_are_the_papers_on_stable_diffusion(name, wanted):
    """Published: layers 10 to 15 of SD's 16; on SDXL, one of its demonstrations' choices, 64."""
    model_, options = layout(name), MasaCtrlOptions()
    chosen = chosen_layers(model_, options)
    control = MutualAttention(4, chosen, options.coarsest)
    rows = Rows([Row("source", "cond", 0), Row("target", "cond", 0)])
    factors, edge = model_.factors(), model_.edge
    found = []
    for site in model_.attention_sites():
        if site.kind == "self" and control.wants(site):
            pixels = (edge // factors[site.name]) ** 2
            call = AttentionCall(
                site,
                Step(0, 50, 1.0, 0.0, True),
                1.0,
                rows,
                slice(0, pixels),
                None,
                (edge, edge),
                1,
            )
            if control.active(call):
                found.append(site)
    assert list(dict.fromkeys(s.name.rsplit(".transformer", 1)[0] for s in found)) == wanted
    first = {"sd1": 10, "sdxl": 64, "emoji": 5}[name]
    assert [s.index for s in found] == list(range(first, first + len(found)))


@pytest.mark.parametrize("name", ["sd1", "sdxl", "emoji"])
def test_the_coarsest_of_several_resolutions_stays_free(name):
    """On the published networks the published rule leaves it free by itself."""
    model_ = layout(name)
    fine = chosen_layers(model_, MasaCtrlOptions())
    whole = chosen_layers(model_, MasaCtrlOptions(layers="decoder"))
    factors = model_.factors()
    left = {factors[n] for n in whole - fine}
    assert left == {max(factors[n] for n in whole)} and fine


def test_the_only_resolution_is_controlled():
    model_ = layout("single")
    whole = chosen_layers(model_, MasaCtrlOptions(layers="decoder"))
    assert chosen_layers(model_, MasaCtrlOptions()) == whole and len(whole) == 2


def test_a_transformer_controls_its_late_blocks_and_one_at_least():
    net = model("sd3")
    sites = net.attention_sites()
    order = [site.name for site in sites]
    for depth, wanted in ((0.0, order), (0.4, order[1:]), (0.7, order[2:]), (1.0, order[2:])):
        assert chosen_layers(net, MasaCtrlOptions(depth=depth)) == set(wanted)
    assert chosen_layers(net, MasaCtrlOptions(layers="all", depth=1.0)) == set(order)


# --- Masks ----------------------------------------------------------------------------------------


def test_masked_attention_is_the_sum_of_foreground_and_background():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(6, 3, generator=generator) for _ in range(3))
    target = torch.tensor([1, 1, 0, 0, 1, 0], dtype=torch.bool)
    source = torch.tensor([0, 1, 1, 1, 0, 0], dtype=torch.bool)
    logits = q @ k.T
    fore = logits[:, source].softmax(-1) @ v[source]
    back = logits[:, ~source].softmax(-1) @ v[~source]
    wanted = torch.where(target[:, None], fore, back)
    found = logits.masked_fill(~alike(target, source), -torch.inf).softmax(-1) @ v
    torch.testing.assert_close(found, wanted)


def test_a_side_without_pixels_restricts_nothing():
    empty = torch.zeros(3, dtype=torch.bool)
    assert alike(torch.tensor([True, False, True]), empty).tolist() == [[True] * 3] * 3


def test_the_users_mask_parts_the_image(family, inv):
    mask = torch.zeros(1, 1, 8, 8, dtype=torch.float64)
    mask[..., 4:] = 1
    spy = Maps(("self", "joint"))
    editor = masactrl(masks="given", **ALL)
    out = edit(family, editor, inv, TARGET, mask=mask, extra=[Attending(spy)])
    assert torch.isfinite(out["target"]).all()
    for call, probs in spy.seen:
        inside = torch.zeros(call.grid, dtype=torch.bool)
        inside[:, call.grid[1] // 2 :] = True
        inside = inside.flatten()
        target = call.image_to_image(probs[call.rows.where("target")])
        assert target[..., inside, :][..., ~inside].abs().max() == 0
        assert target[..., ~inside, :][..., inside].abs().max() == 0
        source = call.image_to_image(probs[call.rows.where("source")])
        assert source[..., inside, :][..., ~inside].abs().max() > 0


def test_a_mask_of_everything_is_no_mask(family, inv):
    whole = torch.ones(1, 1, 8, 8, dtype=torch.float64)
    masked = edit(family, masactrl(masks="given", **ALL), inv, TARGET, mask=whole)
    close(masked["target"], edit(family, masactrl(**ALL), inv, TARGET)["target"])


def test_words_make_masks_of_their_own(family, inv, plain):
    with_words = edit(family, masactrl(masks="apple,pear", **ALL), inv, TARGET)
    without = edit(family, masactrl(**ALL), inv, TARGET)
    assert torch.isfinite(with_words["target"]).all()
    assert not torch.allclose(with_words["target"], without["target"], atol=1e-4)


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ("given", "takes the edit's mask: give mask="),
        ("pear", "masks names 'pear', which is not in the prompt 'a red apple on a cat'"),
        ("apple,cat", "masks names 'cat', which is not in the prompt 'a photo of a green pear'"),
    ],
)
def test_masks_that_are_not_there_are_refused(masks, message):
    with pytest.raises(RetourError, match=message):
        edit("sd1", masactrl(masks=masks), inversion("sd1", SOURCE, 1), TARGET)


@pytest.mark.parametrize(
    "options", [{"start": 1.5}, {"coarsest": -0.1}, {"source_guidance": -1.0}, {"depth": 2.0}]
)
def test_malformed_options_are_refused_at_once(options):
    with pytest.raises(RetourError, match=f"{next(iter(options))} is"):
        masactrl(**options)


# --- Batches, further calls, nothing left ---------------------------------------------------------


@pytest.mark.parametrize("options", [ALL, {"masks": "a", **ALL}])
def test_many_targets_and_images_are_a_loop_over_them(family, options):
    sources = [SOURCE[0], "a photo of a blue cat"]
    targets = {"t0": ("a green apple", "a red cat"), "t1": ("a red pear", "a cat on a cat")}
    start, editor = noise(2, seed=3), masactrl(**options)
    both = edit(family, editor, inversion(family, sources, 3, start), targets)
    for image, source in enumerate(sources):
        one = inversion(family, [source], 3, start[image : image + 1])
        for branch, prompts in targets.items():
            alone = edit(family, editor, one, {"x": (prompts[image],)})
            close(both[branch][image : image + 1], alone["x"])


class Twice(Control):
    """Asks the network once more in every step, as gradient methods do."""

    def denoiser(self, step, denoise, layout):
        return Wrapped(denoise, lambda found, x, t: denoise(x, t))


def test_further_calls_of_the_network_shift_no_step(family, inv):
    """Upstream, steps are counted by calls."""
    editor = masactrl(start=0.5, layers="all")
    once, twice = (edit(family, editor, inv, TARGET, extra=e) for e in ([], [Twice()]))
    assert torch.equal(once["target"], twice["target"])


def test_a_climb_is_left_alone(family, inv):
    den = denoiser(family, {"source": SOURCE, **TARGET})
    job = EditJob(model(family), inv, den.layout, TARGET, inv.grid)
    controlled, bare = (
        walk(SOLVER, den, State(inv.latents).tile(2), inv.grid, down=False, controls=controls).x
        for controls in ([masactrl(**ALL).control(job)], [])
    )
    assert torch.equal(controlled, bare)


def test_nothing_is_left_on_the_model(family, inv):
    before = [s.module.processor for s in model(family).attention_sites()]
    edit(family, masactrl(masks="apple,pear"), inv, TARGET)
    after = [s.module.processor for s in model(family).attention_sites()]
    assert all(a is b for a, b in zip(before, after, strict=True))


def test_registered_with_its_facts():
    entry = registry.get("edit", "masactrl")
    assert entry.needs == {"attention"} and entry.factory.source_branch
    entry.make(start="0.1", layers="all", masks="apple", source_guidance="1", source_prompt="empty")
