"""LazyDrag's attention on tiny random transformers: what targets see, and when."""

import math

import pytest
import torch

from editors import runs
from retour.attention.control import AttentionCall, AttentionControl
from retour.core.branches import Rows
from retour.core.grid import Grid, Step, flow_grid
from retour.core.loop import walk
from retour.core.registry import get
from retour.core.state import State
from retour.editors._drag_attention import Background, Identity, Refinement, turned
from retour.editors._drag_map import DragMap, drag_map
from retour.editors._drags import Pull
from retour.editors._track import OnTrack

FAMILIES = ("sd3", "flux")
SIZE = (4, 4)
SOLVER = get("solver", "euler").make()


def still(background):
    """A map where nothing moves and `background` (N,) is background; the rest is transition."""
    none = torch.zeros(16, dtype=torch.bool)
    stay, weight = torch.arange(16), torch.zeros(16).double()
    here = torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0)).double()
    return DragMap(SIZE, stay, weight, none, none, ~background, background, none, here)


def joint(family):
    sites = [s for s in runs.model(family).attention_sites() if s.kind == "joint"]
    return frozenset(s.name for s in sites)


class Seen(AttentionControl):
    """What attention is given and gives, after the controls before this one."""

    def __init__(self):
        self.calls = []

    def wants(self, site):
        return site.kind == "joint"

    def qkv(self, call, q, k, v):
        self.calls.append([call, q, k, v])
        return q, k, v

    def output(self, call, out):
        self.calls[-1].append(out)
        return out


def run(family, controls, *, start=None, source="a red apple", target="a red apple", steps=3):
    """One target beside its source; the source starts from `noise()`, the target from `start`."""
    inv = runs.inversion(family, [source], steps)
    noise = inv.noise if start is None else start
    den = runs.denoiser(family, {"source": [source], "target": [target]}, 1.0)
    seen = Seen()
    state = State(torch.cat([inv.noise, noise]))
    track = OnTrack(inv, watching=[*controls, seen])
    end = walk(SOLVER, den, state, inv.grid, down=True, controls=[track])
    return end.x, seen.calls, inv


@pytest.mark.parametrize("family", FAMILIES)
def test_a_background_everywhere_is_the_sources_attention(family):
    """Image tokens bit for bit, in every block and step; and the output, the prompts being one."""
    everywhere = torch.ones(16, dtype=torch.bool)
    control = Background({("target", 0): still(everywhere)}, joint(family))
    start = runs.noise(seed=5)
    _, calls, _ = run(family, [control], start=start)
    assert len(calls) == 2 * 3
    for call, q, k, v, out in calls:
        for x in (q, k, v):
            assert torch.equal(x[0][:, call.image], x[1][:, call.image])
        assert (out[0] - out[1]).abs().max() < 1e-12
    _, free, _ = run(family, [], start=start)
    assert all((q[0] - q[1])[:, call.image].abs().max() > 1e-3 for call, q, *_ in free)


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_background_is_replaced_and_the_text_never(family):
    """FLUX joins the text first, SD3 last."""
    some = torch.zeros(16, dtype=torch.bool)
    some[3:9] = True
    control = Background({("target", 0): still(some)}, joint(family))
    _, calls, _ = run(family, [control], start=runs.noise(seed=5), target="a blue cat")
    for call, q, k, v, _ in calls:
        for x in (q, k, v):
            image, text = x[:, :, call.image], x[:, :, call.text]
            assert torch.equal(image[0][:, some], image[1][:, some])
            assert (image[0] - image[1])[:, ~some].abs().amax((0, 2)).min() > 1e-6
            assert (text[0] - text[1]).abs().max() > 1e-6


def moved(shift=(0, 1), band=1):
    area = torch.zeros(SIZE, dtype=torch.bool)
    area[1:3, 0:2] = True
    return drag_map(area, [Pull((1, 0), shift)], "move", band=band)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("queries", ["moved", "image"])
def test_origins_are_appended_and_open_to_the_allowed_queries_only(family, queries):
    found = moved()
    control = Identity({("target", 0): found}, joint(family), 1.0, queries)
    _, calls, _ = run(family, [control], start=runs.noise(seed=5))
    active = found.destination | found.transition
    for call, q, k, v, _ in calls:
        total = q.shape[-2]
        assert k.shape[-2] == v.shape[-2] == total + 16
        values = v[0][:, call.image][:, found.source]
        assert torch.equal(v[1][:, total:], values)
        logits = control.logits(call, torch.zeros(*q.shape[:-1], total + 16))
        opened = torch.isfinite(logits[:, 0, :, total:])
        assert not opened[0].any()  # the source sees nothing new
        assert not opened[1, call.text].any()
        looking = active if queries == "moved" else torch.ones_like(active)
        assert torch.equal(opened[1, call.image], looking[:, None] & active[None])
        assert torch.isfinite(logits[..., :total]).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_key_at_its_own_place_is_the_ordinary_key(family):
    """M(x) = x: taking the rotation off and putting it on again gives the key of the source."""
    found = still(torch.zeros(16, dtype=torch.bool))
    control = Identity({("target", 0): found}, joint(family), 1.0)
    _, calls, _ = run(family, [control], start=runs.noise(seed=5))
    for call, _, k, _, _ in calls:
        total = k.shape[-2] - 16
        torch.testing.assert_close(k[1][:, total:], k[0][:, call.image], rtol=0, atol=1e-6)


def test_a_moved_key_is_the_key_as_it_would_stand_there():
    """FLUX: rotated by the difference of places, whatever the key."""
    model = runs.model("flux")
    found = moved()
    control = Identity({("target", 0): found}, joint("flux"), 1.0)
    _, calls, _ = run("flux", [control])
    for call, q, k, _, _ in calls:
        assert call.rotary is not None and call.rotary[0].shape == (q.shape[-2], q.shape[-1])
        total = k.shape[-2] - 16
        bare = turned(k[0][:, :total][:, call.image], _part(call), back=True)
        wanted = turned(bare[:, found.source], _part(call))
        torch.testing.assert_close(k[1][:, total:], wanted, rtol=0, atol=1e-6)
        assert (k[1][:, total:] - k[0][:, call.image][:, found.source]).abs().max() > 1e-3
    assert model.attention_sites()[0].kind == "joint"


def _part(call):
    return tuple(part[call.image] for part in call.rotary)


def test_turning_is_a_rotation_and_back():
    x, angle = torch.randn(2, 3, 5, 8).double(), torch.rand(5, 4).double()
    cos, sin = (f(angle).repeat_interleave(2, -1) for f in (torch.cos, torch.sin))
    there = turned(x, (cos, sin))
    torch.testing.assert_close(turned(there, (cos, sin), back=True), x)
    torch.testing.assert_close(there.norm(dim=-1), x.norm(dim=-1))
    from diffusers.models.embeddings import apply_rotary_emb

    wanted = apply_rotary_emb(x.float(), (cos.float(), sin.float()))
    torch.testing.assert_close(there.float(), wanted, rtol=1e-5, atol=1e-5)


def test_duplicating_all_keys_and_values_changes_nothing():
    q, k, v = torch.randn(3, 1, 2, 6, 4).double()
    twice = [torch.cat([x, x], -2) for x in (k, v)]
    attend = torch.nn.functional.scaled_dot_product_attention
    torch.testing.assert_close(attend(q, *twice), attend(q, k, v), rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_are_blended_by_weight(family):
    found = moved()
    control = Refinement({("target", 0): found}, joint(family), 1.0, 1.0, 1.0)
    _, calls, _ = run(family, [control], start=runs.noise(seed=5))
    sure = found.weight == 1
    assert 0 < int(sure.sum()) < 16
    for call, *_, out in calls:
        image = out[:, :, call.image]
        assert torch.equal(image[1][:, sure], image[0][:, found.source[sure]])


def test_the_blends_weight_is_held_and_then_falls_to_nought():
    control = Refinement({}, frozenset(), 0.8, 0.2, 0.8)
    grid = flow_grid(50)
    weights = [control.weight(step) for step in grid.walk(down=True)]
    assert weights[:10] == [0.8] * 10 and weights[40:] == [0.0] * 10
    assert all(a > b for a, b in zip(weights[10:40], weights[11:41], strict=True))
    assert weights[25] == pytest.approx(0.4)
    # The limits do not divide by nothing.
    for hold, until in ((0.0, 0.0), (1.0, 1.0), (0.5, 0.5), (0.8, 0.2)):
        control = Refinement({}, frozenset(), 0.8, hold, until)
        assert all(math.isfinite(control.weight(step)) for step in grid.walk(down=True))


def test_controls_rest_on_the_way_up_and_after_their_part():
    step_up = Step(3, 4, 0.1, 0.2, False)
    late, early = Step(0, 4, 0.2, 0.1, True), Step(3, 4, 0.9, 0.8, True)
    site = runs.model("sd3").attention_sites()[0]

    def call(step):
        return AttentionCall(site, step, 0.5, Rows(), slice(0, 16), None, (8, 8), 2)

    for control in (
        Background({}, frozenset()),
        Identity({}, frozenset(), 0.5),
        Refinement({}, frozenset(), 1.0, 0.2, 0.5),
    ):
        assert not control.active(call(step_up)) and not control.active(call(None))
        assert control.active(call(early))
    assert Background({}, frozenset()).active(call(late))
    assert not Identity({}, frozenset(), 0.5).active(call(late))
    assert not Refinement({}, frozenset(), 1.0, 0.2, 0.5).active(call(late))


def test_grids_are_not_mixed_up():
    """A grid of one step has one part: holding everything holds it all."""
    [step] = Grid((0.0, 1.0)).walk(down=True)
    assert Refinement({}, frozenset(), 0.5, 0.2, 0.8).weight(step) == 0.5
