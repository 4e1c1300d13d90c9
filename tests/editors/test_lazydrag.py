"""LazyDrag on tiny random transformers: where latents begin, and what comes of it."""

import numpy as np
import pytest
import torch

import retour
import tiny
from editors import runs
from editors.dragged import edit, invert, mask, model, picture
from retour._inputs import masks_of
from retour.attention.control import AttentionControl
from retour.core.branches import Branch, Denoiser
from retour.core.control import Attending
from retour.core.loop import walk
from retour.core.registry import get
from retour.core.state import Inversion, State, stack
from retour.editors._drag_carry import shared
from retour.editors._drags import Drag
from retour.editors._track import OnTrack
from retour.editors.base import EditJob
from retour.editors.lazydrag import LazyDrag, LazyDragOptions
from retour.errors import RetourError

FAMILIES = ("sd3", "flux")
SOLVER = get("solver", "euler").make()


def start_of(inv, **options):
    """State that the run begins with, and the maps."""
    given = {"strength": 1.0, **{k: v for k, v in options.items() if k != "mask"}}
    editor = LazyDrag(LazyDragOptions(**given))
    area = masks_of(options.get("mask"), inv)
    den = retour.api._edit_denoiser(inv.model, inv, {"target": inv.prompts}, 1.0, True, None)
    job = EditJob(inv.model, inv, den.layout, {"target": inv.prompts}, inv.grid, area)
    replay = get("invert", inv.method).make(**inv.options).replay(inv)
    return editor.prepare(job, den, replay).state.x[den.layout["target"]], editor.maps(job)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_start_is_the_noise_moved(family):
    inv = invert(family)
    given = {"mask": mask(4, 0, 12, 8), "drags": "4,8>12,8", "mode": "move"}
    found, [m] = start_of(inv, **given, fill="noise")
    z = inv.noise[0]
    # Tokens are 4 pixels, two latent cells: the object moves by two tokens, four cells.
    assert torch.equal(found[0, :, 2:6, 4:8], z[:, 2:6, 0:4])
    gone = found[0, :, 2:6, 0:4]
    assert (gone - z[:, 2:6, 0:4]).abs().min() > 0  # fresh noise
    assert torch.equal(found[0, :, :2], z[:, :2]) and torch.equal(found[0, :, 6:], z[:, 6:])
    assert int(m.vacated.sum()) == 4


def test_a_null_drag_starts_where_the_inversion_ended():
    inv = invert()
    for options in ({}, {"drags": "4,8>4,8", "mask": mask(4, 0, 12, 8)}):
        assert torch.equal(start_of(inv, **options)[0], inv.noise)


def test_fresh_noise_is_seeded_and_shared_by_the_batch():
    inv = invert(images=[picture(0), picture(1)])
    given = {"mask": mask(4, 0, 12, 8), "drags": "4,8>12,8", "mode": "move", "fill": "noise"}
    first, again, other = (start_of(inv, **given, seed=s)[0] for s in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(first[0, :, 2:6, 0:4], first[1, :, 2:6, 0:4])


@pytest.mark.parametrize(("mode", "usual"), [("drag", "noise"), ("move", "around")])
def test_what_fills_depends_on_what_moves(mode, usual):
    inv = invert()
    given = {"mask": mask(0, 0, 12, 16), "drags": "2,6>14,6", "mode": mode}
    names = ("noise", "around", "neighbours")
    default, *others = (start_of(inv, **given, fill=f)[0] for f in (None, *names))
    assert torch.equal(default, others[names.index(usual)])
    for k, one in enumerate(others):
        assert not any(torch.equal(one, other) for other in others[:k])


def test_gaps_of_a_magnified_object_are_fresh_or_copies():
    inv = invert()
    given = {"mask": mask(4, 4, 12, 12), "drags": "7.5,7.5>7.5,7.5*2", "mode": "move"}
    given["reading"] = "tokens"
    fresh, [m] = start_of(inv, **given)
    copies, _ = start_of(inv, **given, gaps="copy")
    inside = m.gap.reshape(m.size).repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert int(m.gap.sum()) == 12 and bool((m.destination | ~m.gap).all())
    assert torch.equal(fresh[0][:, ~inside], copies[0][:, ~inside])
    assert bool((fresh[0] != copies[0])[:, inside].all())


def test_noise_that_is_shared_stays_white_and_adds_up():
    """Of n cells from one origin each has variance 1, none follows another, the sum is e sqrt n."""
    inv = invert()
    given = {"drags": "7.5,7.5>7.5,7.5*2", "mode": "move", "reading": "carried"}
    editor, job, _ = job_of(inv, mask(4, 4, 12, 12), **given)
    [m] = editor.cells(job)
    chosen = m.destination.nonzero().flatten()
    draws, generator = 4000, torch.Generator().manual_seed(3)
    own, fresh = torch.randn(2, len(m.source), draws, generator=generator, dtype=torch.float64)
    [found] = shared(own[None, m.source], fresh, m)  # Channels are so many draws.
    gap = found[chosen].cov() - torch.eye(len(chosen))
    assert float(gap.abs().max()) < 6 / draws**0.5
    for origin in m.source[chosen].unique():
        together = chosen[m.source[chosen] == origin]
        assert len(together) == 4
        torch.testing.assert_close(found[together].sum(0), 2 * own[origin])
    still = ~m.destination
    assert torch.equal(found[still], own[m.source][still])


def test_neighbours_fill_instead_of_noise():
    inv = invert()
    given = {"mask": mask(4, 0, 12, 8), "drags": "4,8>12,8", "mode": "move"}
    found, _ = start_of(inv, **given, fill="neighbours")
    again, _ = start_of(inv, **given, fill="neighbours", seed=1)
    assert torch.equal(found, again)
    # A cell of the first column: what is four cells below, and the moved object four to the right,
    # count a quarter of what is next to it above.
    above, right = inv.noise[0, :, 1, 0], found[0, :, 2, 4]
    below = inv.noise[0, :, 6, 0]
    wanted = (above + below / 4 + right / 4) / 1.5
    torch.testing.assert_close(found[0, :, 2, 0], wanted)


def test_what_is_around_fills_with_the_pictures_own_noise():
    inv = invert()
    given = {"mask": mask(4, 0, 12, 8), "drags": "4,8>12,8", "mode": "move"}
    found, [m] = start_of(inv, **given, fill="around")
    cells = found[0].flatten(1).T
    own = inv.noise[0].flatten(1).T
    touched = (m.vacated | m.destination).reshape(4, 4)
    touched = touched.repeat_interleave(2, 0).repeat_interleave(2, 1).flatten()
    gone = m.vacated.reshape(4, 4).repeat_interleave(2, 0).repeat_interleave(2, 1).flatten()
    equal = (cells[gone][:, None] == own[None]).all(-1)
    assert equal.any(1).all() and not (equal & touched[None]).any()
    other, _ = start_of(inv, **given, fill="around", seed=1)
    assert not torch.equal(found, other)


def test_what_moved_may_start_from_partly_fresh_noise_of_the_same_variance():
    inv = invert()
    given = {"mask": mask(4, 0, 12, 8), "drags": "4,8>12,8", "mode": "move", "fill": "noise"}
    plain, half, fresh = (start_of(inv, **given, renew=share)[0][0] for share in (0.0, 0.5, 1.0))
    wanted = 0.75**0.5 * plain + 0.5 * fresh
    torch.testing.assert_close(half[:, 2:6, 4:8], wanted[:, 2:6, 4:8])
    outside = torch.ones(8, 8, dtype=torch.bool)
    outside[2:6, 4:8] = False
    assert torch.equal(half[:, outside], plain[:, outside])
    other = start_of(inv, **given, renew=1.0, seed=1)[0][0]
    assert (fresh - other).abs()[:, 2:6, 4:8].min() > 0  # nothing of the origin is left


def test_partial_strength_fills_from_the_picture_around():
    inv = invert(strength=0.5)
    given = {"mask": mask(4, 0, 12, 8), "drags": "4,8>12,8", "mode": "move", "fill": "noise"}
    found, _ = start_of(inv, **given)
    noised = [start_of(inv, **given, seed=s)[0][0, :, 2:6, 0:4] for s in range(40)]
    mean = torch.stack(noised).mean(0)
    t = inv.grid.times[-1]
    alpha, sigma = inv.model.path.alpha(t), inv.model.path.sigma(t)
    above = alpha * inv.latents[0, :, 0, 0]
    assert float((torch.stack(noised).std(0) / sigma).mean()) == pytest.approx(1, abs=0.1)
    assert (mean[:, 0, 0] - above).abs().max() < 5 * float(sigma) and torch.isfinite(found).all()
    assert float(alpha) > 0.1


def sampled(family):
    """An inversion without any error: the way that Euler takes down from noise."""
    m = model(family)
    cond, grid = m.embed(["a red apple"]), m.grid(4)
    states = [State(runs.noise())]
    den = Denoiser(m, [Branch("source", cond)])
    walk(SOLVER, den, states[0], grid, down=True, observers=[lambda e: states.append(e.state)])
    named, empty = stack(states[::-1]), m.embed([""])
    return Inversion("euler", {}, m.name, m.fingerprint, grid, named, cond, empty, model=m)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("drags", ["", "4,8>4,8"])
def test_a_null_drag_with_the_source_prompt_reconstructs(family, drags):
    """To rounding, but for the appended copies, by which moved tokens weigh twice."""
    inv = sampled(family)
    found = edit(inv, drags=drags, mask=mask(4, 4, 12, 12), identity_until=0.0, blend_until=1.0)
    assert (found.latents - inv.latents).abs().max() <= 1e-5  # rotary angles are float32
    twice = edit(inv, drags=drags, mask=mask(4, 4, 12, 12), blend_until=1.0)
    free = edit(inv, drags="8,8>12,8", mask=mask(4, 4, 12, 12))
    gaps = [float((r.latents - inv.latents).norm()) for r in (found, twice, free)]
    assert gaps[0] < gaps[1] < gaps[2]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_controls_matter_and_so_does_their_end(family):
    inv = invert(family)
    given = {"drags": "5,5>9,5", "mask": mask(4, 4, 8, 8), "mode": "move", "band": 0}
    ends = [
        edit(inv, **given, **options).latents
        for options in (
            {},
            {"background": False},
            {"identity_until": 0.0},
            {"blend_max": 0.0},
            {"identity_until": 0.3},
            {"queries": "image"},
            {"fill": "noise"},
        )
    ]
    for k, end in enumerate(ends[1:], 1):
        assert (end - ends[0]).abs().max() > 1e-6, k


def test_only_single_stream_blocks_of_flux_are_controlled():
    editor = LazyDrag()
    assert all(n.startswith("single_") for n in editor._sites(model("flux")))
    sites = [s for s in model("sd3").attention_sites() if s.kind == "joint"]
    assert editor._sites(model("sd3")) == {s.name for s in sites}
    half = LazyDrag(LazyDragOptions(from_depth=0.5))
    assert half._sites(model("sd3")) == {s.name for s in sites if s.depth >= 0.5}


def test_cost_record_and_source():
    inv = invert()
    found = edit(inv, drags="4,8>12,8")
    assert found.record["nfe_edit"] == 8 and found.record["drags"] == [["4,8>12,8"]]
    guided = edit(inv, drags="4,8>12,8", guidance=3.0)
    assert guided.record["nfe_edit"] == 12  # the source stays one row
    assert torch.equal(found.source, inv.latents)
    assert "2509.12203" in retour.cite(found)


def test_each_image_has_its_own_drags():
    images, masks = [picture(0), picture(1)], [mask(4, 0, 12, 8), mask(0, 4, 8, 12)]
    inv = invert(images=images)
    drags = ["4,8>12,8", [Drag((8, 4), (8, 12))]]
    whole = edit(inv, drags=drags, mask=masks, mode="move")
    for k in range(2):
        given = drags[k]
        alone = edit(invert(images=images[k]), drags=given, mask=masks[k], mode="move")
        torch.testing.assert_close(whole.latents[k], alone.latents[0], rtol=0, atol=1e-9)


def test_points_are_pixels_of_the_users_picture():
    """64 x 32 pixels become 24 x 12, six tokens by three: the left half moves to the right."""
    large = picture(size=(16, 16)).resize((64, 32), 0)
    area = np.zeros((32, 64))
    area[:, :32] = 1
    given = {"drags": "13,14>45,14", "mode": "move", "mask": area, "reading": "tokens"}
    found, [m] = start_of(invert(images=large), **given)
    assert m.size == (3, 6) and found.shape[-2:] == (6, 12)
    whole = torch.arange(18).reshape(3, 6)
    assert torch.equal(m.source.reshape(3, 6)[:, 3:], whole[:, :3])
    assert torch.equal(m.vacated.reshape(3, 6)[:, :3], torch.ones(3, 3, dtype=torch.bool))


# --- What moved, read at its new place ------------------------------------------------------------


class Reads(AttentionControl):
    """The image tokens' values of the source row, call by call."""

    def __init__(self):
        self.calls = []

    def wants(self, site):
        return site.kind == "joint" and site.depth == 0

    def qkv(self, call, q, k, v):
        row = next(n for n, r in enumerate(call.rows) if r.branch == "source")
        self.calls.append(v[row][:, call.image])
        return q, k, v


def job_of(inv, area, **options):
    editor = LazyDrag(LazyDragOptions(**{"strength": 1.0, **options}))
    den = retour.api._edit_denoiser(inv.model, inv, {"target": inv.prompts}, 1.0, True, None)
    area = masks_of(area, inv)
    return editor, EditJob(inv.model, inv, den.layout, {"target": inv.prompts}, inv.grid, area), den


def test_keys_that_carry_no_rotation_are_read_where_they_stand_afterwards():
    """The default follows the model: FLUX moves keys, SD3 moves what is read."""
    for family, wanted in (("sd3", True), ("flux", False)):
        assert LazyDrag()._carries(model(family)) is wanted
    for reading, wanted in (("tokens", False), ("carried", True)):
        for family in FAMILIES:
            assert LazyDrag(LazyDragOptions(reading=reading))._carries(model(family)) is wanted
    # The paper starts from noise, and so does what follows it; else half of the way.
    for family, wanted in (("sd3", 10), ("flux", 20)):
        found = retour.edit(invert(family, steps=10), "a red apple", editor="lazydrag")
        assert found.record["nfe_edit"] == wanted


@pytest.mark.parametrize("right", [2, 6, -2])
def test_moves_by_half_a_token_are_made(right):
    """Two pixels are one latent cell, half a token: the tokens' map stands still or jumps."""
    inv = invert()
    x = 6 if right > 0 else 10
    given = {"drags": f"{x},8>{x + right},8", "mode": "move"}
    area, cells = mask(4, x - 4, 12, x + 2), right // 2
    low, high = (x - 4) // 2, (x + 2) // 2
    found, _ = start_of(inv, mask=area, **given)
    z = inv.noise[0]
    assert torch.equal(found[0, :, 2:6, low + cells : high + cells], z[:, 2:6, low:high])
    jumped, _ = start_of(inv, mask=area, **given, reading="tokens")
    assert not torch.equal(jumped, found)


def test_the_branch_that_is_read_carries_everything_at_every_level():
    """Bit for bit where whole cells moved; the picture's own around it; the clean end too."""
    inv = invert()
    area = mask(4, 0, 12, 8)
    editor, job, den = job_of(inv, area, drags="4,8>12,8", mode="move")
    track = editor._moved(job, inv.states["x"], inv.grid.times)
    own = inv.states["x"]
    torch.testing.assert_close(track[..., 2:6, 4:8], own[..., 2:6, 0:4], rtol=0, atol=1e-12)
    for outside in ((slice(0, 2), slice(None)), (slice(6, 8), slice(None))):
        torch.testing.assert_close(track[(..., *outside)], own[(..., *outside)], rtol=0, atol=1e-12)
    around = track[0][..., 2:6, 0:4]
    above, below = own[0][..., 1:2, 0:4], own[0][..., 6:7, 0:4]
    share = torch.tensor([0.8, 0.6, 0.4, 0.2]).double()[:, None]  # 1/d over the sum of both
    torch.testing.assert_close(around, share * above + (1 - share) * below)
    start = editor.prepare(job, den, get("invert", inv.method).make(**inv.options).replay(inv))
    assert torch.equal(start.state.x[den.layout["target"]], track[-1])
    assert torch.equal(start.state.x[den.layout["source"]], track[-1])


def test_attention_reads_the_object_at_its_new_place():
    """In every step the source row's tokens are those of the carried states."""
    inv = invert()
    given = {"drags": "4,8>12,8", "mode": "move"}
    area, seen = mask(4, 0, 12, 8), {}
    for reading in ("tokens", "carried"):
        editor, job, den = job_of(inv, area, reading=reading, **given)
        spy = Reads()
        replay = get("invert", inv.method).make(**inv.options).replay(inv)
        start = editor.prepare(job, den, replay)
        controls = [Attending(spy), editor.control(job)]
        end = walk(replay.solver, den, start.state, inv.grid, down=True, controls=controls).x
        assert torch.equal(end[den.layout["source"]], inv.latents)
        seen[reading] = spy.calls
    first = Reads()
    editor, job, den = job_of(inv, area, **given)
    track = editor._moved(job, inv.states["x"], inv.grid.times)
    moved = Inversion(**{**vars(inv), "states": {"x": track}})
    alone = Denoiser(inv.model, [Branch("source", inv.condition)])
    on = OnTrack(moved, watching=[first])
    walk(SOLVER, alone, State(track[-1]), inv.grid, down=True, controls=[on])
    for k, wanted in enumerate(first.calls):
        torch.testing.assert_close(seen["carried"][k], wanted, rtol=0, atol=1e-9)
        assert (seen["tokens"][k] - wanted).abs().max() > 1e-3


def test_a_scaled_object_is_read_between_cells_and_its_noise_stays_noise():
    inv = invert(strength=0.5)
    editor, job, _ = job_of(inv, mask(4, 4, 12, 12), drags="7.5,7.5>7.5,7.5*2", mode="move")
    clean = editor._moved(job, inv.states["x"][:1], inv.grid.times[:1])[0, 0]
    # The handle is at 3.5 cells, so cell 3 is read at 3.5 - 0.5 / 2.
    own = inv.latents[0]
    rows = 0.75 * own[:, 3] + 0.25 * own[:, 4]
    torch.testing.assert_close(clean[:, 3, 3], 0.75 * rows[:, 3] + 0.25 * rows[:, 4])
    [m] = editor.cells(job)
    assert bool(m.destination.all()) and int(m.gap.sum()) == 48
    stds = []
    for seed in range(30):
        editor, job, _ = job_of(
            inv,
            mask(4, 4, 12, 12),
            drags="7.5,7.5>7.5,7.5*2",
            mode="move",
            gaps="noise",
            seed=seed,
        )
        last = editor._moved(job, inv.states["x"][-1:], inv.grid.times[-1:])[0, 0]
        stds.append(last.flatten(1)[:, m.gap])
    sigma = float(inv.model.path.sigma(inv.grid.times[-1]))
    assert float(torch.stack(stds).std(0).mean()) == pytest.approx(sigma, rel=0.1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("reading", ["tokens", "carried"])
def test_a_part_of_the_way_starts_from_that_state(family, reading):
    """Half as many steps, from the picture moved at that level."""
    inv = invert(family)
    given = {"drags": "4,8>12,8", "mode": "move", "strength": 0.5, "reading": reading}
    found, _ = start_of(inv, mask=mask(4, 0, 12, 8), **given)
    z = inv.states["x"][2, 0]
    torch.testing.assert_close(found[0, :, 2:6, 4:8], z[:, 2:6, 0:4], rtol=0, atol=1e-12)
    torch.testing.assert_close(found[0, :, :2], z[:, :2], rtol=0, atol=1e-12)
    result = edit(inv, mask=mask(4, 0, 12, 8), **given)
    assert result.record["nfe_edit"] == 4 and torch.equal(result.source, inv.latents)
    given = {"strength": 0.5, "reading": reading, "identity_until": 0.0, "blend_until": 1.0}
    still = edit(sampled(family), **given)
    assert (still.latents - sampled(family).latents).abs().max() <= 1e-5


@pytest.mark.parametrize("method", ["edict", "direct", "ddim", "heun"])
def test_any_inversion_with_a_trajectory_serves(method):
    inv = invert(method=method, strength=1.0)
    found = edit(inv, drags="4,8>12,8", mask=mask(4, 0, 12, 8), mode="move")
    assert torch.isfinite(found.latents).all()
    assert (found.source - inv.latents).abs().max() < 1e-9


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"drags": "1,2"}, "write x,y>x,y"),
        ({"drags": "1,2>30,2"}, "30,2 lies outside"),
        ({"drags": "-1,2>3,2"}, "-1,2 lies outside"),
        ({"drags": "1,2>3,2*2"}, "only mode 'move' knows"),
        ({"drags": "1,2>3,2*0", "mode": "move"}, "scale of 0 or below"),
        ({"drags": "1,2>3,2", "mode": "move"}, "give a mask"),
        ({"drags": [Drag((1, 1), (2, 2)), "1,1>2,2"]}, "mix single drags"),
        ({"mode": "pull"}, "pull"),
        ({"band": -1}, "band is -1"),
        ({"renew": 2}, "renew is 2"),
        ({"strength": -0.1}, "strength is -0.1"),
        ({"identity_until": 1.5}, "identity_until is 1.5"),
    ],
)
def test_bad_options(options, says):
    with pytest.raises(RetourError, match=says):
        edit(invert(), **options)


def test_lists_for_a_batch_must_fit_it():
    inv = invert(images=[picture(0), picture(1)])
    with pytest.raises(RetourError, match="3 lists of drags for 2 images"):
        edit(inv, drags=["1,1>9,9"] * 3)


def test_a_unet_is_refused():
    inv = retour.invert(retour.load(tiny.sd1()), picture(), "a cat", method="uniinv", steps=2)
    with pytest.raises(RetourError, match="needs joint-attention"):
        edit(inv, drags="4,8>12,8")
