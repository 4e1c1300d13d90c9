"""OIR: what its card says proves an implementation right, and the traps that it names."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np
import pytest
import torch
from PIL import Image

import retour
import tiny
from problems import PATHS, Mixture, ProblemModel
from retour.core.path import Prediction
from retour.core.registry import get
from retour.core.state import State
from retour.editors import _oir_search as choice
from retour.editors._oir_candidates import join, refill, refill_table
from retour.editors._oir_masks import resized
from retour.editors._oir_way import Way
from retour.editors.oir import edit_objects
from retour.evaluate.suite import Suite

SOURCE, TARGET = "a red apple on a blue background", "a green pear on a blue background"
STEPS = 6


@lru_cache
def model(family="sd1"):
    return retour.load(tiny.PIPELINES[family]().to(torch.float64))


@lru_cache
def inverted(family="sd1", method="ddim", images=1, steps=STEPS):
    generator = torch.Generator().manual_seed(3)
    pictures = [torch.rand(3, 16, 16, generator=generator) for _ in range(images)]
    return retour.invert(model(family), pictures, SOURCE, method=method, steps=steps, guidance=4.0)


def brightness(pictures, phrase, mask):
    """A scorer that any picture can please."""
    return (pictures * mask).mean((1, 2, 3))


def at(**depths):
    """A scorer that likes one candidate: phrase -> its depth, if all depths are tried."""

    def scorer(pictures, phrase, mask):
        return torch.eye(len(pictures))[depths[phrase.replace(" ", "_")] - 1]

    return scorer


def square(top=4, left=4, size=8, whole=16):
    mask = torch.zeros(3, whole, whole)
    mask[:, top : top + size, left : left + size] = 1
    return mask


def way(inversion, scale=4.0):
    replay = get("invert", inversion.method).make(**inversion.options).replay(inversion)
    return Way(inversion.model, inversion, replay, scale)


def edit(target=TARGET, family="sd1", method="ddim", **options):
    options = {"scorer": brightness, "mask": square(), **options}
    return retour.edit(inverted(family, method), target, editor="oir", **options)


def close(found, wanted, tolerance=1e-9):
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance)


# --- Candidates -----------------------------------------------------------------------------------


def naive(path, condition, depths, keep_at=0):
    """Each candidate in a walk of its own: its end, and its state on the way."""
    ends, halfway = {}, {}
    for depth in depths:
        state = path.at(depth)
        if depth > keep_at > 0:
            state = path.down(state, condition, ["alone"], depth, keep_at)
            halfway[depth] = state
        ends[depth] = path.down(state, condition, ["alone"], min(depth, keep_at or depth), 0).x
    return ends, halfway


@pytest.mark.parametrize("steps", [6, 7])
@pytest.mark.parametrize("how", ["refill", "join", "join-2"])
def test_candidates_together_are_candidates_alone(how, steps):
    path = way(inverted(steps=steps))
    condition = path.embed(TARGET)
    calls = path.ledger.calls
    if how == "refill":
        found = refill(path, condition, keep_at=2)
        assert path.ledger.calls - calls == steps + 1
    else:
        batch = 25 if how == "join" else 2
        found = join(path, condition, range(1, steps + 1), keep_at=2, batch=batch)
        if how == "join":
            assert path.ledger.calls - calls == steps
    assert path.ledger.rows == steps * (steps + 1)
    ends, halfway = naive(path, condition, range(1, steps + 1), 2)
    assert sorted(found.ends) == sorted(ends) and sorted(found.halfway) == sorted(halfway)
    for depth in ends:
        close(found.ends[depth], ends[depth])
    for depth in halfway:
        close(found.halfway[depth].x, halfway[depth].x)


def test_parallel_candidates_in_single_precision():
    network = retour.load(tiny.sd1())
    inversion = retour.invert(network, torch.rand(3, 16, 16), SOURCE, method="ddim", steps=6)
    path = way(inversion)
    found = refill(path, path.embed(TARGET))
    ends, _ = naive(path, path.embed(TARGET), range(1, 7))
    assert all((found.ends[d] - ends[d]).abs().max() < 1e-4 for d in ends)


@pytest.mark.parametrize(("family", "method"), [("sd3", "ddim"), ("sd1", "edict"), ("sd1", "dpm")])
def test_candidates_of_other_solvers_and_flows(family, method):
    """Coupled partners and remembered steps come along; newcomers have none yet."""
    path = way(inverted(family, method).take([0]))
    condition, steps = path.embed(TARGET), path.steps
    found = join(path, condition, range(1, steps + 1), keep_at=2)
    ends, halfway = naive(path, condition, range(1, steps + 1))
    for depth in ends:
        close(found.ends[depth], ends[depth])
    assert sorted(found.halfway) == list(range(3, steps + 1))
    assert all(set(s.memory) == set(path.at(0).memory) for s in found.halfway.values())


def test_the_schedule_of_fifty():
    table = refill_table(50)
    assert len(table) == 25 and {len(row) for row in table} == {51}
    # Interval k is crossed from the (k+1)-th least noisy time.
    assert [k + 1 for k in table[0][:4]] == [1, 50, 49, 48]
    assert [k + 1 for k in table[1][:4]] == [2, 1, 49, 48]
    assert [k + 1 for k in table[24][:26]] == [*range(25, 0, -1), 26]
    runs = [list(range(m, -1, -1)) + list(range(49 - m, -1, -1)) for m in range(25)]
    assert table == runs


def test_every_depth_is_made_once_for_any_number_of_steps():
    for steps in range(1, 12):
        starts = []
        for row in refill_table(steps):
            starts += [row[0] + 1] + [b + 1 for a, b in zip(row, row[1:], strict=False) if a == 0]
        assert sorted(starts) == list(range(1, steps + 1))


def test_refill_refuses_other_solvers():
    with pytest.raises(retour.RetourError, match="'edict' comes back with EDICT: use schedule"):
        edit(method="edict", schedule="refill")


@pytest.mark.parametrize("method", ["virtual", "edit-friendly"])
def test_stochastic_ways_back_bring_their_noise_and_their_source(method):
    path = way(inverted(method=method))
    condition = path.embed(TARGET)
    found = join(path, condition, range(1, path.steps + 1)).ends
    ends, _ = naive(path, condition, range(1, path.steps + 1))
    for depth in ends:
        close(found[depth], ends[depth])
    several = edit_objects(inverted(method=method), OBJECTS, scorer=brightness, depth=0.5)
    assert torch.isfinite(several.latents).all()


@pytest.mark.parametrize("scale", [1.0, 4.0, 15.0])
def test_guidance_cancels_where_the_prompts_are_equal(scale):
    """The negative prompt is the source's, not an empty one."""
    path = way(inverted(), scale)
    plain = way(inverted(), 1.0)
    condition = path.embed(SOURCE)
    found = join(path, condition, [3, STEPS]).ends
    wanted = join(plain, condition, [3, STEPS]).ends
    for depth in (3, STEPS):
        close(found[depth], wanted[depth])


def test_levels_are_where_the_data_comes_back_worse_from_deeper():
    """Equal prompts: the error of the round trip grows with the depth (a scene in closed form)."""
    inversion = scene_inversion()
    path = way(inversion, 1.0)
    ends = join(path, path.embed(inversion.prompts[0]), range(1, path.steps + 1)).ends
    errors = [float((ends[d] - inversion.latents).square().mean()) for d in sorted(ends)]
    assert errors == sorted(errors) and errors[0] < errors[-1]
    assert not torch.equal(inversion.states["x"][1], inversion.states["x"][0])


# --- The choice -----------------------------------------------------------------------------------


def test_a_coarse_search_tries_fewer_depths_and_refines():
    whole, quick = edit(), edit(every=3)
    tried = [set(r.record["objects"][0]["objects"][0]["scores"]) for r in (whole, quick)]
    assert tried[0] == set(map(str, range(1, STEPS + 1)))
    best = quick.record["objects"][0]["objects"][0]["depth"]
    near = choice.near_depths(best, STEPS, 3)
    assert tried[1] >= {"1", "3", "6"} and tried[1] < tried[0] | {"0"}
    assert quick.record["nfe_edit"] <= whole.record["nfe_edit"]
    assert {str(d) for d in near} <= tried[1] or best not in (1, 3, 6)


def test_the_first_candidate_is_the_source_itself():
    found = edit(pairs=[("red apple", "green pear", square())], mask=None)
    first = found.record["objects"][0]["objects"][0]["scores"]
    assert first["1"][1] == 0 and all(pair[1] < 0 for d, pair in first.items() if d != "1")
    edited = edit(unedited_first=False).record["objects"][0]["objects"][0]["scores"]
    assert edited["1"][1] < 0


# --- One object -----------------------------------------------------------------------------------


def test_one_object_is_its_best_candidate():
    pairs = [("red apple", "green pear", square())]
    found = edit(pairs=pairs, mask=None, scorer=at(green_pear=4))
    assert found.record["objects"][0]["objects"][0]["depth"] == 4
    path = way(inverted())
    close(found.latents, join(path, path.embed(TARGET), [4]).ends[4])
    assert found.record["nfe_edit"] == STEPS * (STEPS + 1)


def test_the_edits_mask_keeps_the_background():
    for more in ({}, {"assemble": True}):
        found = edit(depth=1.0, **more)
        known = ~resized(square()[0], (8, 8))
        gap = (found.latents - inverted().latents).abs()
        assert gap[..., known].max() == 0 and gap[..., ~known].max() > 1e-2


def test_without_a_mask_attention_finds_one():
    found = edit(mask=None)
    assert found.record["nfe_edit"] == STEPS + STEPS * (STEPS + 1)
    assert found.record["objects"][0]["objects"][0]["pair"] == "a red apple -> a green pear"


@pytest.mark.parametrize("family", ["sd2", "sdxl", "sd3"])
def test_runs_on_every_family(family):
    found = edit(family=family, mask=None, every=2)
    assert torch.isfinite(found.latents).all() and found.record["nfe_edit"] > 0


def test_a_fixed_depth_needs_no_search():
    found = edit(depth=0.5)
    assert found.record["nfe_edit"] == 2 * STEPS // 2
    assert found.record["objects"][0]["objects"][0]["scores"] == {}


def test_schedules_give_the_same():
    close(edit(schedule="refill").latents, edit().latents)


# --- Several objects ------------------------------------------------------------------------------

LEFT, RIGHT = square(0, 0, 8), square(8, 8, 8)
OBJECTS = [("red apple", "green pear", LEFT), ("blue background", "red background", RIGHT)]


def several(pairs=OBJECTS, **options):
    options = {"scorer": at(green_pear=5, red_background=3), **options}
    return edit_objects(inverted(), pairs, **options)


def test_background_at_the_splice_is_the_sources_bit_for_bit():
    """r = q = 0: the final latents outside of all masks are the data's."""
    found = several(reassembly=0.0, reinversion=0.0)
    outside = ~(resized(LEFT[0], (8, 8)) | resized(RIGHT[0], (8, 8)))
    data = inverted().latents
    assert torch.equal(found.latents[..., outside], data[..., outside])
    assert not torch.equal(found.latents, data)


def test_objects_are_spliced_denoised_and_inverted_as_the_paper_says():
    r, q = 2, 1
    found = several(reassembly=r / STEPS, reinversion=q / STEPS)
    path, target = way(inverted()), "a green pear on a red background"
    state = path.at(r).x.clone()
    prompts = [TARGET, "a red apple on a red background"]
    depths = [o["depth"] for o in found.record["objects"][0]["objects"]]
    assert depths == [5, 3]
    assert [o["prompt"] for o in found.record["objects"][0]["objects"]] == prompts
    for depth, prompt, mask in zip(depths, prompts, (LEFT, RIGHT), strict=True):
        u = path.down(path.at(depth), path.embed(prompt), ["u"], depth, r).x
        state = torch.where(resized(mask[0], (8, 8)), u, state)
    up = path.up(State(state), r, r + q)
    close(found.latents, path.down(up, path.embed(target), ["all"], r + q, 0).x)
    assert found.record["targets"] == [target]
    assert found.record["nfe_edit"] == 2 * STEPS * (STEPS + 1) + q + 2 * (r + q)


def test_no_object_is_a_plain_way_up_and_down():
    r, q = 1, 1
    found = several([], target=TARGET, reassembly=r / STEPS, reinversion=q / STEPS)
    path = way(inverted())
    up = path.up(path.at(r), r, r + q)
    close(found.latents, path.down(up, path.embed(TARGET), ["all"], r + q, 0).x)
    assert found.record["objects"][0]["objects"] == []


@pytest.mark.parametrize("method", ["direct", "edict"])
def test_other_inverters_reassemble_too(method):
    inversion = inverted(method=method)
    found = edit_objects(inversion, OBJECTS, scorer=brightness, depth=0.5)
    assert torch.isfinite(found.latents).all()


@pytest.mark.parametrize("turn", [1, -1])
def test_the_deeper_object_wins_where_masks_overlap(turn):
    pairs = [(old, new, square(0, 0, 16)) for old, new, _ in OBJECTS][::turn]
    found = several(pairs, reassembly=0.0, reinversion=0.0)
    path = way(inverted())
    close(found.latents, join(path, path.embed(TARGET), [5]).ends[5])


def test_short_phrases_and_equal_targets_are_all_kept():
    """A phrase's length is no bound, a phrase no key."""
    pairs = [("a", "red", LEFT), ("on", "red", RIGHT), ("of", "red", square(0, 8, 8))]
    inversion = replace(
        inverted(), condition=model().embed(["a photo of a cat on a blue background"])
    )
    found = edit_objects(inversion, pairs, scorer=brightness, depth=0.9, reassembly=0.2)
    assert len(found.record["objects"][0]["objects"]) == 3


def test_a_depth_that_does_not_reach_the_splice_is_said():
    with pytest.warns(UserWarning, match="it starts from depth 3"):
        found = several(depth=1 / STEPS, reassembly=2 / STEPS)
    assert torch.isfinite(found.latents).all()


def test_a_batch_does_what_its_images_do_alone():
    batch = inverted(images=2)
    targets = [TARGET, "a cat on a blue background"]
    options = {"editor": "oir", "scorer": brightness, "mask": square()}
    together = retour.edit(batch, targets, **options)
    for k, target in enumerate(targets):
        alone = retour.edit(batch.take([k]), target, **options)
        close(together.latents[k], alone.latents[0])
        mine = together.record["objects"][k]["objects"][0]["depth"]
        assert mine == alone.record["objects"][0]["objects"][0]["depth"]


def test_several_targets_of_one_image():
    targets = [TARGET, "a cat on a blue background"]
    options = {"editor": "oir", "scorer": brightness, "mask": square()}
    found = retour.edit(inverted(), targets, **options)
    close(found.latents[1], retour.edit(inverted(), targets[1], **options).latents[0])


def test_the_record_holds_words_not_masks():
    found = several(depth=0.5, scorer=brightness)
    text = json.dumps(retour.io.plain(found.record))
    assert found.record["editor_options"]["pairs"] == (
        "red apple -> green pear",
        "blue background -> red background",
    )
    assert found.record["editor_options"]["scorer"] == "brightness" and len(text) < 20_000


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"pairs": "cat"}, "write old phrase -> new phrase"),
        ({"pairs": [("cat",)]}, "give \\(old phrase, new phrase, mask\\)"),
        ({"pairs": "red -> green @ none.png"}, "there is no file 'none.png'"),
        ({"pairs": "banana -> pear"}, "'banana', which is not in the source prompt"),
        ({"pairs": "red -> green; blue -> red", "phrase": "x"}, "phrase is for one object"),
        ({"pairs": "red -> green; blue -> red", "assemble": False}, "2 objects need assemble"),
        ({"schedule": "refill", "every": 5}, "leave every at 1"),
        ({"every": 0}, "every is 0"),
        ({"depth": 1.5}, "depth is 1.5"),
        ({"scorer": "nowhere"}, "scorer is 'nowhere'"),
        ({"assemble": True, "reassembly": 0.9, "reinversion": 0.5}, "do not fit in 6 steps"),
        ({"pairs": [("red", "green", torch.zeros(3, 16, 16))]}, "black everywhere"),
        ({"mask": None, "pairs": "on -> in"}, "nothing says where 'on -> in' is"),
    ],
)
def test_bad_options(options, says):
    with pytest.raises(retour.RetourError, match=says):
        edit(**options)


# --- A scene in closed form -----------------------------------------------------------------------


@dataclass
class Scenes:
    """Three upright strips that are independent: two objects and a ground between them.

    A strip's mixture lies around flat colours; a prompt names the component of each strip.
    """

    strips: tuple[Mixture, ...]
    names: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    widths: tuple[float, ...] = ()
    means: torch.Tensor = field(default_factory=lambda: torch.zeros(1))

    def log_weights(self, prompt=""):
        return torch.cat([strip.log_weights(prompt) for strip in self.strips])

    def predict(self, x, alpha, sigma, logs):
        counts = [len(strip.names) for strip in self.strips]
        parts = [
            strip.predict(part, alpha, sigma, log)
            for strip, part, log in zip(
                self.strips, x.split(4, -1), logs.split(counts, -1), strict=True
            )
        ]
        faces = [torch.cat([getattr(p, f) for p in parts], -1) for f in ("x0", "eps")]
        return Prediction(*faces)


def strip(names, colours, width):
    means = torch.tensor(colours, dtype=torch.float64).reshape(-1, 3, 1, 1).expand(-1, 3, 12, 4)
    return Mixture(names, (1 / len(names),) * len(names), means, (width,) * len(names))


RED, PINK, GREEN, GREY = (0.8, -0.7, -0.7), (0.8, -0.2, -0.2), (-0.7, 0.8, -0.7), (0.1, 0.1, 0.2)
SCENES = Scenes(
    (
        strip(("red", "pink"), (RED, PINK), 0.08),
        strip(("grey", "white"), (GREY, (0.9, 0.9, 0.9)), 0.3),
        strip(("ruby", "lime"), (RED, GREEN), 0.08),
    )
)
ONLY = (slice(0, 4), slice(4, 8), slice(8, 12))


@lru_cache
def scene_inversion():
    network = ProblemModel(SCENES, PATHS["discrete"], native=12)
    generator = torch.Generator().manual_seed(1)
    spread = torch.cat([torch.full((4,), w) for w in (0.05, 0.3, 0.05)])
    flat = torch.stack([torch.tensor(c) for c in (RED, GREY, RED)], -1).repeat_interleave(4, -1)
    picture = flat[:, None] + spread * torch.randn(3, 12, 12, generator=generator)
    picture = (picture.clamp(-1, 1) + 1) / 2
    return retour.invert(network, picture, "red grey ruby", method="ddim", steps=20, guidance=4.0)


COLOURS = {"pink": PINK, "lime": GREEN}


def nearness(pictures, phrase, mask):
    """How near the masked pixels are to the phrase's colour, 1 at it."""
    gap = (pictures - torch.tensor(COLOURS[phrase])[:, None, None]).square().sum(1)
    return torch.exp(-4 * (gap * mask).sum((1, 2)) / mask.sum())


def part(k):
    mask = torch.zeros(3, 12, 12)
    mask[..., ONLY[k]] = 1
    return mask


PAIRS = [("red", "pink", part(0)), ("ruby", "lime", part(2))]


def test_fit_grows_and_likeness_falls_with_the_depth():
    """In the closed form both are strict; an easy object needs less depth than a hard one."""
    found = edit_objects(scene_inversion(), PAIRS, scorer=nearness, guidance=2.0)
    easy, hard = found.record["objects"][0]["objects"]
    for thing in (easy, hard):
        table = [thing["scores"][k] for k in sorted(thing["scores"], key=int)]
        assert table[-1][0] > table[0][0] + 0.3
        kept = [pair[1] for pair in table]
        assert kept == sorted(kept, reverse=True)
        assert 1 < thing["depth"] < 20
    assert easy["depth"] < hard["depth"]


def test_objects_of_their_own_depths_beat_one_depth_for_all():
    """On the objects at least as good as the best single depth, on the ground better."""
    inversion = scene_inversion()
    path = way(inversion, 2.0)
    ends = join(path, path.embed("pink grey lime"), range(1, 21)).ends
    found = edit_objects(inversion, PAIRS, scorer=nearness, guidance=2.0)

    def judge(latents):
        pictures = inversion.model.decode(latents)
        masks = [part(0)[0], part(2)[0]]
        fit = [nearness(pictures, p, m) for p, m in zip(("pink", "lime"), masks, strict=True)]
        change = (latents - inversion.latents)[..., ONLY[1]].square().mean()
        return float(sum(fit)) / 2, float(change)

    mine, others = judge(found.latents), [judge(x) for x in ends.values()]
    assert mine[0] > 0.5
    assert not any(fit >= mine[0] and change <= mine[1] for fit, change in others)


# --- The embedded network -------------------------------------------------------------------------


def rising(values):
    """Spearman's correlation with the order given."""
    return float(np.corrcoef(np.argsort(np.argsort(values)), np.arange(len(values)))[0, 1])


@pytest.mark.slow
def test_depth_trades_likeness_for_fit_on_a_real_network():
    """Colours of the paired set: fit up, likeness down, the best depth mostly inside.

    That colours need less depth than shapes holds in closed form (above), not here: four colours
    took 5, 6, 5, 5 of 8 steps, four exchanged things 5, 7, 5, 3. The flat colour of what fills a
    small picture is settled as early as its shape.
    """
    network, steps = retour.load("emoji-unet"), 8
    items = [i for i in Suite.paired() if i.kind == "change_attribute_color"][:3]
    fits, likeness, depths = [], [], []
    for item in items:
        inversion = retour.invert(network, item.image, item.source, method="ddim", steps=steps)
        mask = Image.fromarray(item.mask())
        for target in (item.target, item.source):
            found = retour.edit(inversion, target, editor="oir", mask=mask, unedited_first=False)
            thing = found.record["objects"][0]["objects"][0]
            table = [thing["scores"][str(d)] for d in range(1, steps + 1)]
            likeness.append(rising([kept for _, kept in table]))
            if target == item.target:
                fits.append(rising([fit for fit, _ in table]))
                depths.append(thing["depth"])
    assert np.mean(fits) > 0.5
    assert np.mean(likeness) < -0.9
    assert np.mean([1 < depth < steps for depth in depths]) > 0.5
