"""Single layers of every make: what surrounds the attention stays, and the attention is found."""

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor
from diffusers.models.transformers.transformer_flux import FluxAttention

from attention.spies import Blur, Maps, Spy
from editors.runs import noise
from retour.attention.hooks import hooked
from retour.core.branches import Branch, Denoiser
from retour.core.grid import Step
from retour.core.model import AttentionSite, Condition
from retour.core.path import FlowPath
from retour.errors import RetourError


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
