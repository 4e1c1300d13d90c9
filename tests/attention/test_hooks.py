"""Hooks: nothing to do changes nothing, controls see what they should, everything is put back."""

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0

from attention.spies import Blur, Maps, Spy
from editors.runs import SOLVER, denoiser, model, noise
from retour.attention.control import AttentionControl
from retour.attention.hooks import hooked
from retour.core.control import Attending
from retour.core.grid import Step
from retour.core.loop import walk
from retour.core.state import State

FAMILIES = ("sd1", "sdxl", "sd3", "flux")
PROMPTS = {"source": ["a red apple"], "target": ["a green pear on a cat"]}


def processors(m):
    return [site.module.processor for site in m.attention_sites()]


def predict(family, controls=(), size=(8, 8), x=None):
    den = denoiser(family, PROMPTS)
    x = noise(2, size=size) if x is None else x
    t = model(family).grid(5).times[3]
    with hooked(den, controls):
        return den(x, t).eps


@pytest.mark.parametrize("family", FAMILIES)
def test_hooks_with_nothing_to_do_change_no_bit(family):
    spy = Spy()
    assert torch.equal(predict(family, [spy]), predict(family))
    assert len(spy.calls) == len(model(family).attention_sites())


@pytest.mark.parametrize("family", FAMILIES)
def test_explicit_maps_change_only_rounding(family):
    maps = Maps()
    got, wanted = predict(family, [maps], (8, 12)), predict(family, size=(8, 12))
    torch.testing.assert_close(got, wanted)
    for _, probs in maps.seen:
        torch.testing.assert_close(probs.sum(-1), torch.ones_like(probs.sum(-1)))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_call_says_where_it_is(family):
    maps, m = Maps(), model(family)
    predict(family, [maps], (8, 12))
    length = m.embed(["a"]).tensors["embeds"].shape[1]
    assert [call.site.name for call, _ in maps.seen] == [s.name for s in m.attention_sites()]
    for call, probs in maps.seen:
        assert call.grid in ((8, 12), (4, 6))
        assert call.factor == 8 // call.grid[0]
        assert call.t == m.grid(5).times[3]
        assert call.heads == probs.shape[1]
        assert [(r.branch, r.half) for r in call.rows] == [
            ("source", "uncond"), ("target", "uncond"), ("source", "cond"), ("target", "cond"),
        ]  # fmt: skip
        assert (call.text is None) == (call.site.kind == "self")
        if call.text is not None:
            assert call.image_to_text(probs).shape[-2:] == (call.pixels, length)
        if call.site.kind != "cross":
            assert call.image_to_image(probs).shape[-2:] == (call.pixels, call.pixels)


def test_a_block_is_replaced_out_of_place():
    maps = Maps(("joint",))
    predict("sd3", [maps])
    call, probs = maps.seen[0]
    before = probs.clone()
    block = torch.full_like(call.image_to_text(probs), 7.0)
    changed = call.with_block(probs, block, call.text)
    assert torch.equal(probs, before)
    assert torch.equal(call.image_to_text(changed), block)
    assert torch.equal(call.image_to_image(changed), call.image_to_image(probs))
    assert torch.equal(changed[..., call.text, :], probs[..., call.text, :])


@pytest.mark.parametrize("family", ["sd1", "sd3"])
def test_every_stage_can_be_replaced(family):
    class Values(AttentionControl):
        def qkv(self, call, q, k, v):
            return q, k, torch.zeros_like(v)

    class Output(AttentionControl):
        def output(self, call, out):
            return torch.zeros_like(out)

    class Logits(AttentionControl):
        def logits(self, call, logits):
            return torch.zeros_like(logits)

    class Probs(AttentionControl):
        def probs(self, call, probs):
            return torch.full_like(probs, 1 / probs.shape[-1])

    bare = predict(family)
    silent = predict(family, [Values()])
    torch.testing.assert_close(silent, predict(family, [Output()]))
    flat = predict(family, [Logits()])
    torch.testing.assert_close(flat, predict(family, [Probs()]))
    assert not torch.allclose(bare, silent, atol=1e-3)
    assert not torch.allclose(bare, flat, atol=1e-3)


def test_inactive_controls_leave_the_fused_kernel():
    class Asleep(Blur):
        def active(self, call):
            return False

    assert torch.equal(predict("sd1", [Asleep()]), predict("sd1"))


@pytest.mark.parametrize("family", FAMILIES)
def test_processors_come_back_after_an_exception(family):
    class Broken(AttentionControl):
        def probs(self, call, probs):
            raise RuntimeError("broken on purpose")

    before = processors(model(family))
    den = denoiser(family, PROMPTS)
    inner = den.model
    with pytest.raises(RuntimeError, match="on purpose"), hooked(den, [Broken()]):
        assert all(p is not q for p, q in zip(processors(inner), before, strict=True))
        den(noise(2), 0.5)
    assert all(p is q for p, q in zip(processors(inner), before, strict=True))
    assert den.model is inner


def test_layers_that_nobody_wants_are_left_alone():
    before = processors(model("sd1"))
    with hooked(denoiser("sd1", PROMPTS), [Spy(("cross",))]):
        kept = [p is q for p, q in zip(processors(model("sd1")), before, strict=True)]
    assert kept == [site.kind == "self" for site in model("sd1").attention_sites()]


class Own(torch.nn.Module):
    """A user's processor with weights."""

    def __init__(self):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor(1.5))
        self.inner = AttnProcessor2_0()

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        out = self.inner(attn, hidden_states, encoder_hidden_states, attention_mask)
        return self.gain * out


def test_a_users_own_processor_runs_and_comes_back():
    module = model("sd1").attention_sites()[1].module
    default, own = module.processor, Own()
    try:
        module.set_processor(own)
        keys = list(module.state_dict())
        bare = predict("sd1")
        assert torch.equal(predict("sd1", [Spy()]), bare)
        assert module.processor is own and list(module.state_dict()) == keys
    finally:
        module.set_processor(default)
    assert not torch.equal(predict("sd1"), bare)


def test_contexts_nest_outer_first():
    order = []

    class Note(AttentionControl):
        def __init__(self, name):
            self.name = name

        def qkv(self, call, q, k, v):
            order.append((self.name, call.site.index, call.step))
            return q, k, v

        def wants(self, site):
            return site.kind == "cross" and site.index == 0

    den = denoiser("sd1", PROMPTS)
    before = processors(model("sd1"))
    with hooked(den, [Note("outer")]) as outer:
        outer.step = Step(0, 3, 1.0, 0.0, True)
        middle = processors(model("sd1"))
        with hooked(den, [Note("inner"), Note("last")]):
            den(noise(2), 500.0)
        assert all(p is q for p, q in zip(processors(model("sd1")), middle, strict=True))
        den(noise(2), 500.0)
    assert [name for name, *_ in order] == ["outer", "inner", "last", "outer"]
    assert [step is None for *_, step in order] == [False, True, True, False]
    assert all(p is q for p, q in zip(processors(model("sd1")), before, strict=True))


def test_calls_of_other_denoisers_pass_untouched():
    den = denoiser("sd1", PROMPTS)
    other = denoiser("sd1", {"x": ["a red apple"], "y": ["a pear"]})
    bare = other(noise(2), 500.0).eps
    with hooked(den, [Blur()]):
        assert torch.equal(other(noise(2), 500.0).eps, bare)
        few = den.only("source")(noise(1), 500.0).eps
    assert torch.equal(few, den.only("source")(noise(1), 500.0).eps)


@pytest.mark.parametrize("family", ["sd1", "sd3"])
def test_gradients_flow_through_the_maps(family):
    grads = []
    for controls in ([], [Spy()], [Maps()]):
        x = noise(2).requires_grad_()
        predict(family, controls, x=x).square().sum().backward()
        grads.append(x.grad)
    assert torch.equal(grads[0], grads[1])
    torch.testing.assert_close(grads[0], grads[2])


def run(den, controls, steps=3):
    grid = den.model.grid(steps)
    start = State(noise(len(den.branches)))
    return walk(SOLVER, den, start, grid, down=True, controls=[Attending(*controls)]).x


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd1", "sd3"])
def test_compiled_networks_are_controlled_step_by_step(family, monkeypatch):
    m = model(family)
    eager = run(denoiser(family, PROMPTS), [Blur()])
    bare = run(denoiser(family, PROMPTS), [])
    torch._dynamo.reset()
    monkeypatch.setattr(m, "run", torch.compile(m.net, backend="eager"))
    with torch.no_grad():
        torch.testing.assert_close(run(denoiser(family, PROMPTS), [Blur()]), eager)
        torch.testing.assert_close(run(denoiser(family, PROMPTS), []), bare)
    assert not torch.allclose(eager, bare, atol=1e-3)
    torch._dynamo.reset()
