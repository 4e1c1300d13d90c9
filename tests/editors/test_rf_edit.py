"""RF-Edit: what is shared, with whom, when; and that sharing with oneself is no change."""

from types import SimpleNamespace

import pytest
import torch

from editors.runs import SOLVER, denoiser, edit, inversion, model, noise
from retour.attention.control import AttentionControl
from retour.core.branches import Branch, Denoiser, Row, Rows
from retour.core.control import Control
from retour.core.grid import Grid
from retour.core.loop import walk
from retour.core.registry import get
from retour.core.state import Inversion, State, stack
from retour.editors.base import EditJob
from retour.editors.reprompt import Reprompt
from retour.editors.rf_edit import Giver, Sharing, last_layers
from retour.errors import RetourError
from retour.inverters.base import Job

STEPS = 5
SOURCE, TARGET = ["a red apple"], {"target": ("a green pear",)}
FAMILIES = ("sd1", "sd3", "flux")


def make(**options):
    return get("edit", "rf-edit").make(**options)


def inverted(family, method="rf-solver", steps=STEPS, sources=SOURCE, **options) -> Inversion:
    """A real inversion of random latents."""
    m = model(family)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    x = torch.cat([x / (k + 1) for k in range(len(sources))])
    job = Job(
        m, x, m.embed(sources), m.embed([""] * len(sources)), m.grid(steps), 5.0, torch.Generator()
    )
    return get("invert", method).make(**options).invert(job)


def run(inv, editor, scale=5.0, targets=TARGET, extra=()):
    """The way back of this inversion with its own solver."""
    m = inv.model
    replay = get("invert", inv.method).make(**inv.options).replay(inv)
    branches = [Branch(n, m.embed(list(p)), inv.negative, scale) for n, p in targets.items()]
    denoise = Denoiser(m, branches)
    job = EditJob(m, inv, denoise.layout, targets, inv.grid)
    control = editor.control(job)
    state = replay.state.tile(len(branches))
    controls = [replay.control, control, *extra]
    end = walk(replay.solver, denoise, state, inv.grid, down=True, controls=controls)
    return end.x, control, denoise.ledger


class Watch(Control):
    """Counts what the sharing keeps and what the target reads."""

    def __init__(self, sharing):
        self.sharing = sharing
        self.kept, self.read = [], []
        source_step, giver = sharing.source_step, sharing.giver
        qkv = giver.qkv

        def keep(step, ledger):
            turns = source_step(step, ledger)
            self.kept += [(step.index, n, name) for n, (_, vs) in enumerate(turns) for name in vs]
            return turns

        def give(call, q, k, v):
            self.read.append((call.step.index, call.site.name, id(giver.values)))
            return qkv(call, q, k, v)

        sharing.source_step, giver.qkv = keep, give


@pytest.mark.parametrize("family", FAMILIES)
def test_sharing_nothing_is_the_solver_alone_bit_for_bit(family):
    inv = inverted(family)
    plain, _, _ = run(inv, Reprompt())
    for options in ({"inject": 0.0}, {"blocks": 0.0}):
        assert torch.equal(run(inv, make(**options))[0], plain)
    assert not torch.equal(run(inv, make(inject=0.4, blocks=1.0))[0], plain)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("inject", [0.2, 0.6, 1.0])
@pytest.mark.parametrize("features", ["inversion", "matched"])
def test_two_n_m_values_are_kept_and_each_is_read_once(features, inject, shift, monkeypatch):
    inv = inverted("flux")
    times = inv.grid.times
    inv.grid = Grid(tuple(shift * t / (1 + (shift - 1) * t) for t in times))
    watched = []

    def control(self, job):
        watched.append(Watch(Sharing(job, self.options)))
        return watched[0].sharing

    monkeypatch.setattr(get("edit", "rf-edit").factory, "control", control)
    options = {"inject": inject, "features": features, "blocks": 1.0}
    _, _, ledger = run(inv, make(**options), scale=1.0)
    n, (watch,) = round(inject * STEPS), watched
    layers = 1  # of the tiny model's single blocks
    assert len(watch.kept) == len(set(watch.kept)) == 2 * n * layers
    assert len(watch.read) == len(set(watch.read)) == 2 * n * layers
    assert {index for index, *_ in watch.kept} == set(range(STEPS - n, STEPS))
    assert ledger.rows == 2 * STEPS + 2 * n


def test_the_last_18_of_38_single_blocks_of_flux():
    class Site:
        def __init__(self, name):
            self.name, self.kind, self.place = name, "joint", "block"

    class Flux:
        def attention_sites(self):
            double = [Site(f"transformer_blocks.{k}.attn") for k in range(19)]
            return double + [Site(f"single_transformer_blocks.{k}.attn") for k in range(38)]

    wanted = {f"single_transformer_blocks.{k}.attn" for k in range(20, 38)}
    assert last_layers(Flux(), make().options.blocks) == wanted


@pytest.mark.parametrize(("family", "kinds"), [("sd1", {"self"}), ("sd3", {"joint", "self"})])
def test_layers_of_other_families(family, kinds):
    sites = {s.name: s for s in model(family).attention_sites()}
    every = last_layers(model(family), 1.0)
    assert every == {n for n, s in sites.items() if s.kind in ("self", "joint")}
    assert {sites[n].kind for n in every} == kinds
    half = last_layers(model(family), 0.5)
    ordered = [n for n in sites if n in every]
    assert half == set(ordered[len(ordered) - round(len(ordered) / 2) :])


@pytest.mark.parametrize("tokens", ["all", "image"])
@pytest.mark.parametrize("family", FAMILIES)
def test_values_of_the_same_trajectory_change_nothing(family, tokens):
    """A pretended inversion that is the very descent: the hook alone is transparent."""
    inv = inversion(family, SOURCE, STEPS)
    inv.method, inv.options = "euler", {}
    same = {"target": tuple(SOURCE)}
    sharing = make(inject=1.0, blocks=1.0, features="matched", tokens=tokens)
    shared = edit(family, sharing, inv, same, scale=1.0)["target"]
    plain = edit(family, Reprompt(), inv, same, scale=1.0)["target"]
    # The track holds the way down at another guidance; only its first state is common.
    assert not torch.equal(shared, plain)
    inv = inversion_at_one(family)
    shared = edit(family, sharing, inv, same, scale=1.0)["target"]
    assert torch.equal(shared, inv.latents)
    other = edit(family, sharing, inv, TARGET, scale=1.0)["target"]
    assert not torch.equal(other, inv.latents)


def inversion_at_one(family) -> Inversion:
    """The track of the descent at guidance 1, as its own inversion."""
    m = model(family)
    grid, states = m.grid(STEPS), [State(noise())]
    den = denoiser(family, {"source": SOURCE}, 1.0)
    walk(SOLVER, den, states[0], grid, down=True, observers=[lambda e: states.append(e.state)])
    condition, negative = m.embed(SOURCE), m.embed([""])
    options = {"inversion_embedded": None}
    args = ("euler", options, m.name, m.fingerprint, grid, stack(states[::-1]))
    return Inversion(*args, condition, negative, model=m)


def test_time_of_the_first_values():
    """The paper's code: asked at the clean end, read at the noisy one; matched: where read."""
    inv = inverted("flux")
    heard = []
    network = inv.model.network

    def listen(x, t, condition):
        heard.append((len(x), round(float(t[0]), 9)))
        return network(x, t, condition)

    inv.model.network = listen
    try:
        for features in ("inversion", "matched"):
            heard.clear()
            run(inv, make(inject=0.2, features=features), scale=1.0)
            clean, noisy = inv.grid.times[-2:]
            first = clean if features == "inversion" else noisy
            middle = (clean + noisy) / 2
            assert [t for _, t in heard[:4]] == pytest.approx([first, middle, noisy, middle])
    finally:
        del inv.model.network


def test_the_source_s_numbers_are_those_of_the_inversion():
    """Its step up, taken again, ends in the stored state, bit for bit."""
    inv = inverted("flux")
    ends = []
    solver = type(get("solver", "midpoint").make())
    step = solver.step

    def remember(self, denoise, state, taken, path):
        after = step(self, denoise, state, taken, path)
        if not taken.down:
            ends.append((taken.index, after.x))
        return after

    solver.step = remember
    try:
        run(inv, make(inject=1.0))
    finally:
        solver.step = step
    assert [k for k, _ in ends] == [4, 3, 2, 1, 0]
    assert all(torch.equal(x, inv.states["x"][k + 1]) for k, x in ends)


def test_a_distilled_source_is_told_what_the_inversion_told_it():
    heard = []
    inv = inverted("flux")
    network = inv.model.network
    inv.model.network = lambda x, t, c: (
        heard.append(float(c.tensors["guidance"][0])) or network(x, t, c)
    )
    try:
        run(inv, make(inject=0.2), scale=1.0)
    finally:
        del inv.model.network
    assert heard == [1.0, 1.0] + [3.5] * (2 * STEPS)


@pytest.mark.parametrize("tokens", ["all", "image"])
def test_text_values_are_shared_unless_only_the_image_s_are(tokens):
    inv, seen = inverted("flux"), []
    editor = make(inject=0.2, blocks=1.0, tokens=tokens)

    class Spy(Control):
        def attention(self):
            class Last(AttentionControl):
                def qkv(self, call, q, k, v):
                    if call.step.position == 0 and call.site.name.startswith("single"):
                        seen.append((call, v))
                    return q, k, v

            return (Last(),)

    run(inv, Reprompt(), scale=1.0, extra=[Spy()])
    run(inv, editor, scale=1.0, extra=[Spy()])
    (call, own), (_, shared) = seen[0], seen[2]
    same = torch.isclose(own, shared, rtol=0, atol=1e-12).all(-1).all(0).all(0)
    assert not same[call.image].any()
    assert bool(same[call.text].all()) is (tokens == "image")


@pytest.mark.parametrize("method", ["euler", "heun", "fireflow", "edict", "ddim", "uniinv", "dpm"])
def test_any_solver_s_calls_find_their_counterparts(method):
    inv = inverted("sd1", method)
    plain, _, _ = run(inv, Reprompt())
    shared, control, _ = run(inv, make(inject=0.6, blocks=1.0))
    assert torch.isfinite(shared).all() and not torch.equal(shared, plain)
    assert control.giver.values == {}


def test_images_and_targets_keep_apart():
    """Each target image takes the values of its own source image."""
    sources = ["a red apple", "a cat"]
    inv = inverted("sd3", sources=sources)
    targets = {"target": ("a green pear", "a blue cat")}
    together, _, _ = run(inv, make(inject=0.4, blocks=1.0), targets=targets)
    for k in range(2):
        one = {"target": (targets["target"][k],)}
        alone, _, _ = run(inv.take([k]), make(inject=0.4, blocks=1.0), targets=one)
        torch.testing.assert_close(together[k : k + 1], alone, rtol=0, atol=1e-9)


def test_layers_get_their_processors_back():
    m = model("flux")
    before = [site.module.processor for site in m.attention_sites()]
    run(inverted("flux"), make(inject=0.4))
    assert [site.module.processor for site in m.attention_sites()] == before


@pytest.mark.parametrize("options", [{"inject": 1.5}, {"blocks": -1.0}, {"features": "mine"}])
def test_bad_options(options):
    with pytest.raises(RetourError):
        make(**options)


STRATEGIES = [f"{how}_{which}" for how in ("replace", "add") for which in "qkv"]


@pytest.mark.parametrize("family", FAMILIES)
def test_fireflow_s_strategies_share_what_their_names_say(family):
    """Nothing added is nothing changed; a double of oneself is no change where one replaces."""
    inv = inversion_at_one(family)
    same = {"target": tuple(SOURCE)}
    results = []
    for strategy in STRATEGIES:
        options = {"inject": 1.0, "blocks": 1.0, "features": "matched", "strategy": strategy}
        own = edit(family, make(**options), inv, same, scale=1.0)["target"]
        assert torch.equal(own, inv.latents) is strategy.startswith("replace")
        none = edit(family, make(**options, ratio=0.0), inv, same, scale=1.0)["target"]
        assert torch.equal(none, inv.latents) is strategy.startswith("add")
        results.append(edit(family, make(**options), inv, TARGET, scale=1.0)["target"])
    pairs = [(a, b) for k, a in enumerate(results) for b in results[:k]]
    assert not any(torch.equal(a, b) for a, b in pairs)


def test_what_is_given_is_weighed():
    q, k, v = torch.randn(3, 1, 1, 4, 2, generator=torch.Generator().manual_seed(0))
    kept = {"here": torch.ones(1, 1, 4, 2)}
    rows = Rows([Row("target", "cond", 0)])
    call = SimpleNamespace(rows=rows, site=SimpleNamespace(name="here"))
    for strategy, wanted in (("replace_k", 0.5 * kept["here"]), ("add_k", k + 0.5 * kept["here"])):
        giver = Giver(frozenset(kept), make(strategy=strategy, ratio=0.5).options)
        giver.values = kept
        found = giver.qkv(call, q, k, v)
        assert torch.equal(found[0], q) and torch.equal(found[2], v)
        assert torch.equal(found[1], wanted)
