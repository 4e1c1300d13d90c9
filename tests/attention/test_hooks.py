"""Hooks: nothing to do changes nothing, controls see what they should, everything is put back."""

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxAttention

from attention.spies import AsControl, Blur, Maps, Spy
from editors.runs import SOLVER, denoiser, model, noise
from retour.attention.hooks import AttentionCall, AttentionControl, hooked, token_grid
from retour.core.branches import Branch, Denoiser, Rows
from retour.core.grid import Step
from retour.core.loop import walk
from retour.core.model import AttentionSite, Condition
from retour.core.path import FlowPath
from retour.core.state import State
from retour.errors import RetourError

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
    return walk(SOLVER, den, start, grid, down=True, controls=[AsControl(*controls)]).x


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


# --- Single layers of every make -----------------------------------------------------------------


class OneLayer:
    """A model that is one attention layer: latents in, latents out."""

    name, path, prediction = "one layer", FlowPath(), "velocity"

    def __init__(self, layer, kind, call):
        self.layer, self.call = layer.eval(), call
        self.site = AttentionSite("layer", layer, kind, "mid", 0, 0.0)

    def attention_sites(self):
        return [self.site]

    def network(self, x, t, condition):
        dtype = next(self.layer.parameters()).dtype
        with torch.no_grad():
            out = self.call(self.layer, x.to(dtype), condition.tensors["embeds"].to(dtype))
        return out.double()


def one_layer(layer, kind, call, controls, size=(4, 6), channels=8, step=None):
    text = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(3))
    branch = Branch("source", Condition({"embeds": text}, ("", "")))
    den = Denoiser(OneLayer(layer, kind, call), [branch])
    with hooked(den, controls) as hooks:
        hooks.step = step
        return den(noise(2, size=size, channels=channels), 0.5).eps


def flat(x):
    return x.flatten(2).transpose(1, 2)


def picture(tokens, x):
    return tokens.transpose(1, 2).reshape(x.shape)


def look(layer, x, text):
    return picture(layer(flat(x), encoder_hidden_states=text), x)


def masked(layer, x, text):
    mask = torch.zeros(2, 1, 5).to(x)
    mask[..., 3:] = -10000.0
    return picture(layer(flat(x), encoder_hidden_states=text, attention_mask=mask), x)


def test_whatever_the_layer_does_around_attention_stays():
    torch.manual_seed(0)
    common = {"query_dim": 8, "heads": 2, "dim_head": 4}
    texts = {"cross_attention_dim": 8}
    around = {"norm_num_groups": 4, "residual_connection": True, "rescale_output_factor": 2.0}
    made = [
        (Attention(**common, **around), "self", lambda layer, x, text: layer(x)),
        (Attention(**common, **texts, cross_attention_norm="layer_norm"), "cross", look),
        (Attention(**common, **texts), "cross", masked),
    ]
    for layer, kind, call in made:
        bare = one_layer(layer, kind, call, [])
        spy, maps = Spy(), Maps()
        assert torch.equal(one_layer(layer, kind, call, [spy]), bare)
        torch.testing.assert_close(one_layer(layer, kind, call, [maps]), bare, rtol=1e-5, atol=1e-6)
        assert len(spy.calls) == 1 and maps.seen[0][0].grid == (4, 6)
    assert maps.seen[0][1][..., 3:].abs().max() == 0  # the last layer's mask


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_maps_are_float32_at_least(dtype):
    layer = Attention(query_dim=8, heads=2, dim_head=4).to(dtype)

    def call(layer, x, text):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            return picture(layer(flat(x)), x)

    maps = Maps()
    one_layer(layer, "self", call, [maps])
    assert maps.seen[0][1].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_flux_puts_the_text_first():
    torch.manual_seed(0)
    layer = FluxAttention(query_dim=8, heads=2, dim_head=4, added_kv_proj_dim=8, bias=True)

    def call(layer, x, text):
        return picture(layer(flat(x), encoder_hidden_states=text)[0], x)

    maps = Maps()
    wanted = one_layer(layer, "joint", call, [])
    torch.testing.assert_close(
        one_layer(layer, "joint", call, [maps]), wanted, rtol=1e-5, atol=1e-6
    )
    assert (maps.seen[0][0].text, maps.seen[0][0].image) == (slice(0, 5), slice(5, 29))


def test_flux_single_blocks_read_one_sequence():
    torch.manual_seed(0)
    layer = FluxAttention(query_dim=8, heads=2, dim_head=4, pre_only=True, bias=True)

    def call(layer, x, text):
        return picture(layer(torch.cat([text, flat(x)], 1))[:, 5:], x)

    spy = Spy()
    wanted = one_layer(layer, "joint", call, [])
    assert torch.equal(one_layer(layer, "joint", call, [spy]), wanted)
    assert (spy.calls[0].text, spy.calls[0].image) == (slice(0, 5), slice(5, 29))


@pytest.mark.parametrize("scaled", [True, False])
def test_old_processors_are_read_through_their_twins(scaled):
    torch.manual_seed(0)
    layer = Attention(8, heads=2, dim_head=4, scale_qk=scaled, processor=AttnProcessor())
    processor = layer.processor

    def call(layer, x, text):
        return picture(layer(flat(x)), x)

    maps = Maps()
    got = one_layer(layer, "self", call, [maps])
    torch.testing.assert_close(got, one_layer(layer, "self", call, []), rtol=1e-5, atol=1e-6)
    assert maps.seen and layer.processor is processor


def test_a_processor_that_hides_its_attention_is_refused():
    class Hiding:
        def __call__(self, attn, hidden_states, *args, **kwargs):
            return hidden_states

    layer = Attention(query_dim=8, heads=2, dim_head=4, processor=Hiding())
    with pytest.raises(RetourError, match="layer 'layer' uses Hiding"):
        one_layer(layer, "self", lambda layer, x, text: picture(layer(flat(x)), x), [Spy()])


def test_a_compiled_layer_is_controlled_step_by_step():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = Attention(8, cross_attention_dim=8, heads=2, dim_head=4)

        def forward(self, x, text):
            return picture(self.attn(flat(x), encoder_hidden_states=text).sin(), x)

    torch.manual_seed(0)
    torch._dynamo.reset()
    net = Net()
    fast = torch.compile(net, backend="eager")
    for _ in range(2):
        for index in range(3):
            step = Step(index, 3, 1.0, 0.0, True)
            wanted = one_layer(net.attn, "cross", lambda _, *a: net(*a), [Blur()], step=step)
            got = one_layer(net.attn, "cross", lambda _, *a: fast(*a), [Blur()], step=step)
            assert torch.equal(got, wanted)
    bare = one_layer(net.attn, "cross", lambda _, *a: fast(*a), [])
    assert torch.equal(bare, one_layer(net.attn, "cross", lambda _, *a: net(*a), []))
    assert not torch.allclose(bare, got, atol=1e-3)
    torch._dynamo.reset()


@pytest.mark.parametrize("height, width", [(8, 8), (8, 12), (64, 96), (9, 12), (65, 33), (7, 10)])
def test_token_grids_follow_the_latents(height, width):
    h, w = height, width
    while min(h, w) > 2:
        assert token_grid(h * w, height, width) == (h, w)
        h, w = (h + 1) // 2, (w + 1) // 2


@pytest.mark.parametrize(
    "latent, tokens, factor, coarse",
    [
        ((64, 64), (64, 64), 1, False),
        ((64, 64), (32, 32), 2, True),
        ((64, 96), (8, 12), 8, True),
        ((65, 33), (33, 17), 2, True),
        ((16, 16), (8, 8), 2, True),
    ],
)
def test_resolutions_are_relative_to_the_latents(latent, tokens, factor, coarse):
    def at(place):
        site = AttentionSite("x", torch.nn.Identity(), "self", place, 0, 0.0)
        image = slice(0, tokens[0] * tokens[1])
        return AttentionCall(site, None, 0.5, Rows(), image, None, latent, 1)

    assert at("up").factor == factor and at("up").grid == tokens
    assert at("up").within(0.5) is coarse
    assert at("up").within(1.0) and at("block").within(0.5)
    assert not at("up").within(0.1)


def test_tokens_that_fit_no_grid_are_refused():
    with pytest.raises(RetourError, match="17 image tokens"):
        token_grid(17, 8, 8)
