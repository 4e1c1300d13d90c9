"""Feature hooks: nothing to do changes nothing, controls see what they should, all is put back."""

import pytest
import torch

import tiny
from attention.spies import Maps
from editors.runs import SOLVER, denoiser, model, noise
from retour.attention.features import FeatureControl, watched
from retour.attention.hooks import hooked
from retour.core.control import Attending, Chain, Control
from retour.core.grid import Step
from retour.core.loop import walk
from retour.core.state import State
from retour.models.load import load

FAMILIES = ("sd1", "sdxl", "sd3")
PROMPTS = {"source": ["a red apple"], "target": ["a green pear on a cat"]}


class Spy(FeatureControl):
    """Remembers every call and the features, unchanged."""

    def __init__(self, *kinds):
        self.kinds, self.seen = kinds, []

    def wants(self, site):
        return not self.kinds or site.kind in self.kinds

    def output(self, call, value):
        self.seen.append((call, value))
        return value


class Grown(FeatureControl):
    """Adds to the features, more in later steps."""

    def __init__(self, kind="attention", amount=1.0):
        self.kind, self.amount = kind, amount

    def wants(self, site):
        return site.kind == self.kind

    def output(self, call, value):
        return value + self.amount * (1 if call.step is None else call.step.position)


def predict(family, controls=(), size=(8, 8), x=None):
    """What the network says, as it says it: noise, or velocity."""
    den = denoiser(family, PROMPTS)
    x = noise(2, size=size) if x is None else x
    with watched(den, controls):
        found = den(x, model(family).grid(5).times[3])
    return found.velocity if model(family).prediction == "velocity" else found.eps


def forwards(m):
    return [vars(site.module).get("forward") for site in m.feature_sites()]


@pytest.mark.parametrize("family", FAMILIES)
def test_hooks_with_nothing_to_do_change_no_bit(family):
    spy = Spy()
    assert torch.equal(predict(family, [spy]), predict(family))
    assert [call.site.name for call, _ in spy.seen] == [
        site.name for site in model(family).feature_sites()
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_call_says_where_it_is_and_features_are_the_images(family):
    spy, m = Spy(), model(family)
    predict(family, [spy], (8, 12))
    for call, value in spy.seen:
        assert call.t == m.grid(5).times[3] and call.step is None and call.latent == (8, 12)
        assert [(r.branch, r.half) for r in call.rows] == [
            ("source", "uncond"), ("target", "uncond"), ("source", "cond"), ("target", "cond"),
        ]  # fmt: skip
        height, width = 8 // call.site.factor, 12 // call.site.factor
        places = value.shape[1] if value.ndim == 3 else value.shape[2] * value.shape[3]
        assert len(value) == 4 and places == height * width


def test_sites_are_numbered_and_named_as_attention_sites_are():
    for family in FAMILIES:
        sites, modules = model(family).feature_sites(), dict(model(family).net.named_modules())
        assert all(modules[site.name] is site.module for site in sites)
        for kind in {site.kind for site in sites}:
            same = [site for site in sites if site.kind == kind]
            assert [site.index for site in same] == list(range(len(same)))
            assert [site.depth for site in same] == [k / len(same) for k in range(len(same))]
        names = {site.name for site in sites if site.kind == "attention"}
        assert names == {site.name for site in model(family).attention_sites()}
    kinds = {site.kind for site in model("sd1").feature_sites()}
    assert kinds == {"resnet", "conv", "attention", "block"}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_blocks_image_features_decide_alone(family):
    last = model(family).feature_sites()[-1]

    class Flat(FeatureControl):
        def wants(self, site):
            return site.name == last.name

        def output(self, call, value):
            return torch.full_like(value, 0.1)

    flat = predict(family, [Flat()])
    torch.testing.assert_close(flat, predict(family, [Flat()], x=2 * noise(2)))
    assert last.kind == "block" and not torch.allclose(flat, predict(family), atol=1e-3)


@pytest.mark.parametrize("kind", ["resnet", "conv", "attention", "block"])
def test_every_kind_can_be_replaced(kind):
    assert not torch.allclose(predict("sd1", [Grown(kind)]), predict("sd1"), atol=1e-3)


def test_a_conv_lies_before_the_residual_and_the_resnet_after():
    """What is added to the second convolution of a block is added to what the block returns."""
    spy = Spy("resnet")
    predict("sd1", [Spy("resnet"), spy])
    grown = Spy("resnet")
    predict("sd1", [Grown("conv", 0.5), grown])
    before, after = spy.seen[0][1], grown.seen[0][1]
    torch.testing.assert_close(after, before + 0.5, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_forwards_come_back_after_an_exception(family):
    class Broken(FeatureControl):
        def output(self, call, value):
            raise RuntimeError("broken on purpose")

    m, den = model(family), denoiser(family, PROMPTS)
    inner = den.model
    with pytest.raises(RuntimeError, match="on purpose"), watched(den, [Broken()]):
        assert all(forward is not None for forward in forwards(m))
        den(noise(2), 0.5)
    assert forwards(m) == [None] * len(m.feature_sites())
    assert den.model is inner


def test_an_offloading_hooks_own_forward_runs_and_comes_back():
    site = next(s for s in model("sd1").feature_sites() if s.kind == "resnet")
    original = site.module.forward

    def moved(*args):
        return original(*args) + 0.5

    try:
        site.module.forward = moved
        bare = predict("sd1")
        assert torch.equal(predict("sd1", [Spy()]), bare)
        assert site.module.forward is moved
    finally:
        del site.module.forward
    assert not torch.equal(predict("sd1"), bare)


def test_modules_that_nobody_wants_are_left_alone():
    with watched(denoiser("sd1", PROMPTS), [Spy("conv")]):
        hooked_ = [forward is not None for forward in forwards(model("sd1"))]
    assert hooked_ == [site.kind == "conv" for site in model("sd1").feature_sites()]


def test_contexts_nest_outer_first():
    order = []

    class Note(FeatureControl):
        def __init__(self, name):
            self.name = name

        def wants(self, site):
            return site.kind == "conv" and site.index == 0

        def output(self, call, value):
            order.append((self.name, call.step))
            return value

    den = denoiser("sd1", PROMPTS)
    step = Step(0, 3, 1.0, 0.0, True)
    with watched(den, [Note("outer")]) as outer:
        outer.step = step
        with watched(den, [Note("inner"), Note("last")]):
            den(noise(2), 500.0)
        den(noise(2), 500.0)
    assert order == [("outer", step), ("inner", None), ("last", None), ("outer", step)]


def test_they_go_beside_attention_hooks():
    maps, spy, den = Maps(), Spy("attention"), denoiser("sd1", PROMPTS)
    with hooked(den, [maps]), watched(den, [spy]):
        den(noise(2), 500.0)
    assert [c.site.name for c, _ in maps.seen] == [c.site.name for c, _ in spy.seen]


def test_calls_of_other_denoisers_pass_untouched():
    den = denoiser("sd1", PROMPTS)
    other = denoiser("sd1", {"x": ["a red apple"], "y": ["a pear"]})
    bare, few = other(noise(2), 500.0).eps, den.only("source")(noise(1), 500.0).eps
    with watched(den, [Grown()]):
        assert torch.equal(other(noise(2), 500.0).eps, bare)
        assert torch.equal(den.only("source")(noise(1), 500.0).eps, few)
        assert not torch.allclose(den(noise(2), 500.0).eps[:1], few, atol=1e-3)


@pytest.mark.parametrize("family", ["sd1", "sd3"])
def test_gradients_flow_through_the_features(family):
    x = noise(2).requires_grad_()
    predict(family, x=x).square().sum().backward()
    plain = x.grad.clone()
    x.grad = None
    spy = Spy("block")
    predict(family, [spy], x=x).square().sum().backward()
    assert torch.equal(x.grad, plain)
    leaf = noise(2).requires_grad_()
    spy = Spy("block")
    predict(family, [spy], x=leaf)
    (slope,) = torch.autograd.grad(spy.seen[-1][1].square().sum(), leaf)
    assert float(slope.abs().max()) > 0


def test_a_checkpointed_block_is_seen_once_and_its_features_have_gradients():
    """Upstream, hooks fire again when a block is run again for its gradient."""
    slopes = []
    for checkpointed in (False, True):
        pipe = tiny.sd1()
        pipe.unet.double()
        if checkpointed:
            pipe.unet.enable_gradient_checkpointing()
            pipe.unet.train()
        m = load(pipe)
        den = denoiser("sd1", PROMPTS)
        den.model = m
        spy, x = Spy("resnet"), noise(2).requires_grad_()
        with watched(den, [spy]):
            den(x, 500.0)
            energy = sum(value.square().mean() for _, value in spy.seen)
            (slope,) = torch.autograd.grad(energy, x)
        assert len(spy.seen) == len([s for s in m.feature_sites() if s.kind == "resnet"])
        slopes.append(slope)
    torch.testing.assert_close(*slopes, rtol=1e-9, atol=1e-12)


class Featured(Control):
    """Feature controls as a run's control."""

    def __init__(self, *controls):
        self.controls = controls

    def features(self):
        return self.controls


def run(controls, steps=3, family="sd1"):
    den = denoiser(family, PROMPTS)
    start = State(noise(len(den.branches)))
    return walk(SOLVER, den, start, den.model.grid(steps), down=True, controls=controls).x


def test_a_run_hooks_them_and_tells_the_step():
    spy, maps = Spy("conv"), Maps(("self",))
    run([Chain([Featured(spy), Attending(maps)])])
    assert [call.step.position for call, _ in spy.seen[:: len(spy.seen) // 3]] == [0, 1, 2]
    assert {call.step for call, _ in spy.seen} == {call.step for call, _ in maps.seen}
    assert not torch.allclose(run([Featured(Grown())]), run([]), atol=1e-3)
    assert forwards(model("sd1")) == [None] * len(model("sd1").feature_sites())


def test_a_control_moves_the_state_with_the_denoiser_at_hand():
    """`move` sees the state after `before_step` and the denoiser that the solver is given."""
    seen = []

    class Moved(Control):
        def before_step(self, step, state, layout):
            return state.with_x(state.x + 1)

        def move(self, step, denoise, state, layout):
            seen.append((denoise, step.position))
            return state.with_x(state.x - 1)

    assert torch.allclose(run([Moved()]), run([]), rtol=0, atol=1e-12)
    assert [position for _, position in seen] == [0, 1, 2]
    assert all(callable(denoise) for denoise, _ in seen)


def test_compiled_modules_are_controlled_step_by_step_and_compiled_once():
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    m = model("sd1")
    block = m.net.down_blocks[0].resnets[0]
    site = next(s for s in m.feature_sites() if s.module is block)

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.block = block

        def forward(self, x, time):
            return self.block(x, time).sin()

    class One:
        """A model of one block, read and replaced at will."""

        name, path, prediction = "one", m.path, "eps"

        def __init__(self, call):
            self.call = call

        def attention_sites(self):
            return []

        def feature_sites(self):
            return [site]

        def network(self, x, t, condition):
            with torch.no_grad():
                time = torch.ones(len(x), block.time_emb_proj.in_features, dtype=x.dtype)
                return self.call(x, time)

    net = Net()
    fast = torch.compile(net, backend="eager")
    channels = block.in_channels

    def found(call, controls, position):
        den = denoiser("sd1", PROMPTS)
        den.model = One(call)
        with watched(den, controls) as hooks:
            hooks.step = Step(9 - position, 10, 500.0, 400.0, True)
            return den(noise(2, channels=channels), 500.0).eps

    for _ in range(5):
        for position in range(3):
            control = [Grown("resnet")]
            assert torch.equal(found(fast, control, position), found(net, control, position))
        assert torch.equal(found(fast, [], 0), found(net, [], 0))
    assert not torch.allclose(found(fast, [Grown("resnet")], 2), found(fast, [], 2), atol=1e-3)
    assert counters["stats"]["unique_graphs"] <= 4
    torch._dynamo.reset()
