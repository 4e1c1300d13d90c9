"""The picture codec: shapes, scaling from the config, mode and not sample, precision."""

import pytest
import torch

import tiny
from retour.errors import RetourError
from retour.models.codec import Codec
from retour.models.load import load


def images(*size, count=3):
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("family", sorted(tiny.PIPELINES))
@pytest.mark.parametrize("size", [(16, 16), (8, 24)])
def test_shapes_and_types(family, size):
    model = load(tiny.PIPELINES[family]())
    latents = model.encode(images(*size))
    assert latents.shape == (3, *model.latent_shape(*size))
    assert latents.dtype == torch.float64 and not latents.requires_grad
    out = model.decode(latents)
    assert out.shape == (3, 3, *size) and out.dtype == torch.float32


@pytest.mark.parametrize("family", sorted(tiny.PIPELINES))
def test_scaled_posterior_mode(family):
    pipe = tiny.PIPELINES[family]()
    with torch.no_grad():
        posterior = pipe.vae.encode(images(16, 16)).latent_dist
    config = pipe.vae.config
    expected = (posterior.mode() - (config.shift_factor or 0)) * config.scaling_factor
    assert float(posterior.std.min()) > 0
    torch.testing.assert_close(load(pipe).encode(images(16, 16)).float(), expected)
    with torch.no_grad():
        decoded = pipe.vae.decode(posterior.mode()).sample
    torch.testing.assert_close(load(pipe).decode(expected), decoded, rtol=1e-5, atol=1e-5)


def test_latents_mean_and_std():
    pipe = tiny.sdxl()
    mean, std = [0.1, -0.2, 0.3, 0.0], [1.0, 2.0, 0.5, 3.0]
    plain = load(pipe).encode(images(16, 16)) / pipe.vae.config.scaling_factor
    pipe.vae.register_to_config(latents_mean=mean, latents_std=std)
    codec = Codec(pipe.vae)
    latents = codec.encode(images(16, 16))
    column = [torch.tensor(v, dtype=torch.float64).reshape(4, 1, 1) for v in (mean, std)]
    expected = (plain - column[0]) / column[1] * pipe.vae.config.scaling_factor
    torch.testing.assert_close(latents, expected)
    with torch.no_grad():
        decoded = pipe.vae.decode(plain.float()).sample
    torch.testing.assert_close(codec.decode(latents), decoded, rtol=1e-4, atol=1e-5)


def test_half_precision_vae_that_overflows_runs_in_float32():
    pipe = tiny.sdxl()
    pipe.vae.half()
    seen = []
    pipe.vae.encoder.register_forward_hook(lambda *args: seen.append(args[2].dtype))
    codec = Codec(pipe.vae)
    latents = codec.encode(images(16, 16))
    assert seen == [torch.float32] and pipe.vae.dtype == torch.float16
    twin = tiny.sdxl().vae
    twin.load_state_dict({k: v.float() for k, v in pipe.vae.state_dict().items()})
    assert torch.equal(latents, Codec(twin).encode(images(16, 16)))
    with pytest.raises(RetourError, match="force_upcast"):
        codec.decode(latents.requires_grad_())
    assert pipe.vae.dtype == torch.float16


def test_gradients_through_the_decoder():
    model = load(tiny.sd1())
    latents = model.encode(images(16, 16, count=1)).requires_grad_()
    (slope,) = torch.autograd.grad(model.decode(latents).square().sum(), latents)
    assert slope.dtype == torch.float64 and float(slope.abs().max()) > 0


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(3, 16, 16), r"\(B, 3, H, W\), got \(3, 16, 16\)"),
        (torch.zeros(1, 4, 16, 16), r"got \(1, 4, 16, 16\)"),
        (torch.zeros(1, 3, 16, 18), r"multiples of 4, got 18 x 16"),
    ],
)
def test_refusals(tensor, message):
    with pytest.raises(RetourError, match=message):
        load(tiny.sd1()).encode(tensor)
