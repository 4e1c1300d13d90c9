"""Every adapter against its pipeline: same conditions, same samples, nothing changed."""

import copy

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FluxPipeline, PNDMScheduler

import retour
import tiny
from retour.core.model import Model, evaluate
from retour.core.path import levels
from retour.errors import RetourError
from retour.models.diffusers_flux import pack, positions, unpack
from retour.models.load import load

PROMPTS = ["a photo of a red apple", "a green pear on a blue background", "a cat"]
NEGATIVES = ["", "blue background", "a red cat"]
FAMILIES = sorted(tiny.PIPELINES)
STEPS = 5

# float32 networks and float32 samplers of diffusers, at most ten steps: some hundred roundings.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def pipe(family):
    return tiny.PIPELINES[family]()


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def walk(model, x, grid, conditions, guidance):
    """Deterministic steps down the grid with the simplest arithmetic."""
    positive, negative = conditions
    for step in grid.walk(down=True):
        cond = evaluate(model, x, step.t, positive)
        free = evaluate(model, x, step.t, negative)
        alpha, sigma = levels(model.path, step.s, x)
        x = alpha * (free.x0 + guidance * (cond.x0 - free.x0)) + sigma * (
            free.eps + guidance * (cond.eps - free.eps)
        )
    return x


def sample(pipe, x, guidance, prompts, **options):
    with torch.no_grad():
        return pipe(
            prompts,
            latents=x.to(pipe.vae.dtype),
            height=x.shape[-2] * 2,
            width=x.shape[-1] * 2,
            guidance_scale=guidance,
            output_type="latent",
            **options,
        ).images


def test_it_is_a_model(pipe):
    model = load(pipe)
    assert isinstance(model, Model)
    assert (model.native, model.multiple) == (16, 4)
    assert model.latent_shape(16, 24) == (4, 8, 12)
    assert model.device == torch.device("cpu")


def test_defaults_are_the_pipelines_own():
    found = {k: load(make()) for k, make in tiny.PIPELINES.items()}
    assert {k: (m.default_steps, m.default_guidance) for k, m in found.items()} == {
        "sd1": (50, 7.5),
        "sd2": (50, 7.5),
        "sdxl": (50, 5.0),
        "sd3": (28, 7.0),
        "flux": (28, 1.0),
    }
    kinds = {k: m.prediction for k, m in found.items()}
    assert kinds == {"sd1": "eps", "sd2": "v", "sdxl": "eps", "sd3": "velocity", "flux": "velocity"}


def test_conditions_equal_the_pipelines(family, pipe):
    model = load(pipe)
    condition, negative = model.embed(PROMPTS), model.embed(NEGATIVES)
    with torch.no_grad():
        if family in ("sd1", "sd2"):
            embeds, free = pipe.encode_prompt(PROMPTS, "cpu", 1, True, NEGATIVES)
            expected = {"embeds": (embeds, free)}
        elif family == "flux":
            both = [
                pipe.encode_prompt(p, None, max_sequence_length=24) for p in (PROMPTS, NEGATIVES)
            ]
            expected = {k: (both[0][i], both[1][i]) for i, k in enumerate(("embeds", "pooled"))}
        else:
            rest = {"prompt_3": None} if family == "sd3" else {}
            out = pipe.encode_prompt(PROMPTS, prompt_2=None, negative_prompt=NEGATIVES, **rest)
            expected = {"embeds": out[:2], "pooled": out[2:]}
    for name, (positive, free) in expected.items():
        assert torch.equal(condition.tensors[name], positive)
        # SDXL's "" is the pipeline's missing negative prompt, tested below.
        first = 1 if family == "sdxl" else 0
        torch.testing.assert_close(
            negative.tensors[name][first:], free[first:], rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("zeros", [True, False])
def test_empty_prompt_of_sdxl_follows_the_config(zeros):
    pipe = tiny.sdxl(force_zeros_for_empty_prompt=zeros)
    condition = load(pipe).embed(["", "a cat"])
    with torch.no_grad():
        _, embeds, _, pooled = pipe.encode_prompt(["a cat"], negative_prompt=None)
    assert bool((embeds == 0).all()) is zeros
    torch.testing.assert_close(condition.tensors["embeds"][:1], embeds)
    torch.testing.assert_close(condition.tensors["pooled"][:1], pooled)
    assert bool((condition.tensors["embeds"][1] != 0).any())


def test_sdxl_is_told_the_size():
    model = load(tiny.sdxl())
    sizes = model.embed(["a cat", "a pear"], size=(16, 24)).tensors["time_ids"]
    assert sizes.tolist() == [[16, 24, 0, 0, 16, 24]] * 2
    assert model.embed(["a cat"]).tensors["time_ids"].tolist() == [[16, 16, 0, 0, 16, 16]]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("to_one", [True, False])
def test_ddim_of_the_pipeline_is_reproduced(prediction, to_one):
    pipe = tiny.sd1(prediction_type=prediction, set_alpha_to_one=to_one)
    _assert_ddim(pipe, (8, 8))


# In linspace spacing diffusers steps to t - T // N, which is not its own next time.
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_ddim_spacings(spacing):
    _assert_ddim(tiny.sd2(timestep_spacing=spacing), (8, 12))


@pytest.mark.filterwarnings("ignore:The configuration file:FutureWarning")
def test_ddim_without_offset_ends_with_a_null_step():
    pipe = tiny.sd1(steps_offset=0)
    assert load(pipe).grid(STEPS).times[0] == 0
    _assert_ddim(pipe, (8, 8))


def test_ddim_of_zero_terminal_snr():
    pipe = tiny.sd2(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    assert float(pipe.scheduler.alphas_cumprod[-1]) == 0
    _assert_ddim(pipe, (8, 8))


def test_ddim_of_sdxl():
    pipe = tiny.sdxl()
    model = load(pipe)
    assert isinstance(pipe.scheduler, EulerDiscreteScheduler)
    twin = tiny.sdxl()
    twin.scheduler = DDIMScheduler.from_config(
        pipe.scheduler.config, clip_sample=False, set_alpha_to_one=True
    )
    _assert_ddim(twin, (12, 8), model)


def _assert_ddim(pipe, side, model=None):
    model = load(pipe) if model is None else model
    x, size = noise(3, 4, *side), (side[0] * 2, side[1] * 2)
    conditions = model.embed(PROMPTS, size=size), model.embed([""] * 3, size=size)
    ours = walk(model, x, model.grid(STEPS), conditions, 3.0)
    theirs = sample(pipe, x, 3.0, PROMPTS, num_inference_steps=STEPS)
    torch.testing.assert_close(ours.float(), theirs, **CLOSE)


@pytest.mark.parametrize("encoders", [(1, 2, 3), (1, 2)])
def test_euler_of_sd3_is_reproduced(encoders):
    pipe = tiny.sd3(encoders)
    model = load(pipe)
    x = noise(3, 4, 8, 12)
    conditions = model.embed(PROMPTS), model.embed([""] * 3)
    ours = walk(model, x, model.grid(STEPS), conditions, 3.0)
    sigmas = torch.linspace(1, 1 / STEPS, STEPS, dtype=torch.float64).tolist()
    theirs = sample(pipe, x, 3.0, PROMPTS, sigmas=sigmas, num_inference_steps=STEPS)
    torch.testing.assert_close(ours.float(), theirs, **CLOSE)
    expected = [*pipe.scheduler.sigmas.tolist()][::-1]
    assert model.grid(STEPS).times == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("scale", [1.0, 3.5, 6.0])
@pytest.mark.parametrize("side", [(8, 8), (8, 12)])
def test_euler_of_flux_is_reproduced(side, scale):
    """From the same noise, with the embedded scale as an input and no second row."""
    pipe = tiny.flux()
    model = load(pipe)
    model.embedded_guidance = scale
    x, size = noise(3, 4, *side), (side[0] * 2, side[1] * 2)
    conditions = (model.embed(PROMPTS, size=size),) * 2
    ours = walk(model, x, model.grid(STEPS, size=size), conditions, 1.0)
    theirs = sample_flux(pipe, x, guidance_scale=scale)
    torch.testing.assert_close(ours.float(), theirs, **CLOSE)
    expected = [*pipe.scheduler.sigmas.tolist()][::-1]
    assert model.grid(STEPS, size=size).times == pytest.approx(expected, abs=1e-6)


def sample_flux(pipe, x, **options):
    """What FluxPipeline makes of latents `x` (B, C, h, w), unpacked."""
    height, width = x.shape[-2] * 2, x.shape[-1] * 2
    packed = pipe._pack_latents(x.float(), *x.shape)
    with torch.no_grad():
        out = pipe(
            PROMPTS,
            latents=packed,
            height=height,
            width=width,
            max_sequence_length=tiny.LONG_TOKENS,
            num_inference_steps=STEPS,
            output_type="latent",
            **options,
        ).images
    return pipe._unpack_latents(out, height, width, pipe.vae_scale_factor)


def test_true_guidance_of_flux_is_a_second_row():
    pipe = tiny.flux()
    model = load(pipe)
    x = noise(3, 4, 8, 8)
    conditions = model.embed(PROMPTS), model.embed(["blue"] * 3)
    ours = walk(model, x, model.grid(STEPS), conditions, 3.0)
    theirs = sample_flux(pipe, x, negative_prompt=["blue"] * 3, true_cfg_scale=3.0)
    torch.testing.assert_close(ours.float(), theirs, **CLOSE)


def test_embedded_guidance_belongs_to_the_condition():
    model = load(tiny.flux())
    x, t = noise(2, 4, 8, 8), torch.tensor([0.5, 0.5])
    condition = model.embed(["a cat"] * 2)
    assert condition.tensors["guidance"].tolist() == [3.5, 3.5]
    told = condition.told(1.0)
    assert told.tensors["guidance"].tolist() == [1.0, 1.0]
    assert condition.told(None) is condition
    model.embedded_guidance = 1.0
    assert torch.equal(model.embed(["a cat"]).tensors["guidance"], told.tensors["guidance"][:1])
    assert (model.network(x, t, condition) - model.network(x, t, told)).abs().max() > 1e-3


def test_models_that_are_not_distilled_are_told_nothing():
    model = load(tiny.flux(distilled=False))
    condition = model.embed(["a cat"])
    assert "guidance" not in condition.tensors and condition.told(2.0) is condition
    assert model.network(noise(1, 4, 8, 8), torch.tensor([0.5]), condition).isfinite().all()


@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_flux_grid_is_shifted_by_the_size(kind):
    """mu is linear in the tokens; our grid is the scheduler's, fed linspace(1, 1/N, N) and mu."""
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    pipe = tiny.flux(time_shift_type=kind)
    model = load(pipe)
    for height, width in ((16, 16), (16, 32), (48, 16)):
        mu = calculate_shift(height * width // 16, 4, 64, 0.5, 1.15)
        sigmas = torch.linspace(1, 1 / STEPS, STEPS, dtype=torch.float64).tolist()
        pipe.scheduler.set_timesteps(sigmas=sigmas, mu=mu)
        expected = pipe.scheduler.sigmas.flip(0).tolist()
        found = model.grid(STEPS, size=(height, width)).times
        assert found == pytest.approx(expected, abs=1e-6)
    assert model.grid(STEPS) == model.grid(STEPS, size=(16, 16)) != model.grid(STEPS, size=(16, 32))


def test_flux_packs_as_its_pipeline_does():
    x = noise(2, 4, 8, 12)
    tokens = pack(x)
    assert torch.equal(tokens, FluxPipeline._pack_latents(x, 2, 4, 8, 12))
    assert torch.equal(unpack(tokens, 8, 12), x)
    expected = FluxPipeline._prepare_latent_image_ids(1, 4, 6, "cpu", torch.float32)
    assert torch.equal(positions(4, 6).float(), expected)


def test_flux_text_tokens_are_t5s():
    model = load(tiny.flux())
    tokens = model.tokens("a red apple")
    assert len(tokens.ids) == model.embed(["a cat"]).tensors["embeds"].shape[1] == tiny.LONG_TOKENS
    assert [word.tokens for word in tokens.words] == [(0,), (1,), (2,)]


def test_sd3_default_sigmas_are_shifted_twice_and_ours_are_not():
    pipe = tiny.sd3()
    pipe.scheduler.set_timesteps(STEPS)
    assert float(pipe.scheduler.sigmas[-2]) < 0.01 < 0.4 < load(pipe).grid(STEPS).times[1]


def test_sd3_dynamic_shift():
    pipe = tiny.sd3(
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=16,
        max_image_seq_len=64,
    )
    # 8 x 8 latents are 4 x 4 patches: exactly the base, mu = 0.5.
    pipe.scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], mu=0.5)
    expected = pipe.scheduler.sigmas.flip(0).tolist()
    assert load(pipe).grid(4).times == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("encoders", [(1,), (1, 3)])
def test_sd3_missing_encoders_leave_zeros(encoders):
    both, some = load(tiny.sd3((1, 2, 3))), load(tiny.sd3(encoders))
    full, part = both.embed(PROMPTS).tensors, some.embed(PROMPTS).tensors
    assert {k: v.shape for k, v in full.items()} == {k: v.shape for k, v in part.items()}
    clip = part["embeds"][:, : tiny.TOKENS]
    assert torch.equal(clip[..., : tiny.WIDTH], full["embeds"][:, : tiny.TOKENS, : tiny.WIDTH])
    assert not clip[..., tiny.WIDTH :].any() and not part["pooled"][:, tiny.WIDTH :].any()
    assert bool(part["embeds"][:, tiny.TOKENS :].any()) is (3 in encoders)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_network_equals_the_bare_call(family, pipe, dtype):
    pipe.to(dtype)
    model = load(pipe)
    x, t = noise(3, 4, 8, 8), torch.tensor([0.7, 0.31, 0.05], dtype=torch.float64)
    condition = model.embed(PROMPTS)
    given = {k: v.to(dtype) for k, v in condition.tensors.items()}
    with torch.no_grad():
        if family == "sd3":
            out = pipe.transformer(
                x.to(dtype), given["embeds"], given["pooled"], (t * 1000).float()
            ).sample
        elif family == "flux":
            ids = positions(4, 4).to(dtype), torch.zeros(tiny.LONG_TOKENS, 3, dtype=dtype)
            out = pipe.transformer(
                pack(x.to(dtype)),
                given["embeds"],
                given["pooled"],
                t.float(),
                *ids,
                guidance=torch.full((3,), 3.5),
            ).sample
            out = unpack(out, 8, 8)
        else:
            t = (t * 1000).round()
            added = {"text_embeds": given.get("pooled"), "time_ids": given.get("time_ids")}
            out = pipe.unet(x.to(dtype), t.long(), given["embeds"], added_cond_kwargs=added).sample
    ours = model.network(x, t, condition)
    assert ours.dtype == torch.float64
    assert torch.equal(ours, out.double())


def test_batch_equals_single_images(pipe):
    model = load(pipe)
    x, condition = noise(3, 4, 8, 8), model.embed(PROMPTS)
    t = torch.full((3,), 0.4 * model.path.t_noise)
    together = model.network(x, t, condition)
    for i in range(3):
        alone = model.network(x[i : i + 1], t[:1], condition.take([i]))
        torch.testing.assert_close(alone, together[i : i + 1], **CLOSE)


def test_output_depends_on_the_text_and_the_time(pipe):
    model = load(pipe)
    x, end = noise(1, 4, 8, 8), model.path.t_noise
    times = torch.tensor([end]), torch.tensor([end / 2])
    base = model.network(x, times[0], model.embed(["a red apple"]))
    for other in (
        model.network(x, times[0], model.embed(["a green apple"])),
        model.network(x, times[1], model.embed(["a red apple"])),
    ):
        assert float((base - other).std() / base.std()) > 1e-2


@pytest.mark.parametrize("make", [tiny.sd1, tiny.sd2, tiny.sdxl])
def test_clean_end_and_fractional_levels(make):
    model = load(make())
    x, condition = noise(1, 4, 8, 8), model.embed(["a cat"])
    values = [model.network(x, torch.tensor([t]), condition) for t in (-1.0, 0.0, 1.0, 0.5)]
    assert torch.equal(values[0], values[1])
    assert not torch.equal(values[1], values[3]) and not torch.equal(values[2], values[3])


def test_gradients_only_where_wanted(pipe):
    model = load(pipe)
    x, condition = noise(1, 4, 8, 8), model.embed(["a cat"])
    t = torch.tensor([0.5 * model.path.t_noise])
    assert not model.network(x, t, condition).requires_grad
    leaf = x.clone().requires_grad_()
    with torch.no_grad():
        assert not model.network(leaf, t, condition).requires_grad
    (slope,) = torch.autograd.grad(model.network(leaf, t, condition).sum(), leaf)
    assert float(slope.abs().max()) > 0
    embeds = condition.tensors["embeds"].double().requires_grad_()
    out = model.network(x, t, condition.with_tensors(embeds=embeds))
    assert float(torch.autograd.grad(out.sum(), embeds)[0].abs().max()) > 0


def test_attention_sites(family, pipe):
    sites = load(pipe).attention_sites()
    modules = dict(load(pipe).net.named_modules())
    assert all(modules[site.name] is site.module for site in sites)
    called = []
    for site in sites:
        site.module.register_forward_hook(lambda *_, name=site.name: called.append(name))
    model = load(pipe)
    model.network(noise(1, 4, 8, 8), torch.tensor([0.5]), model.embed(["a cat"]))
    assert called == [site.name for site in sites]
    assert {(site.place, site.kind) for site in sites} == (
        {("block", "joint"), ("block", "self")}
        if family == "sd3"
        else {("block", "joint")}
        if family == "flux"
        else {(place, kind) for place in ("down", "mid", "up") for kind in ("self", "cross")}
    )
    for kind in {site.kind for site in sites}:
        same = [site for site in sites if site.kind == kind]
        assert [site.index for site in same] == list(range(len(same)))
        assert [site.depth for site in same] == [k / len(same) for k in range(len(same))]


def state(pipe):
    """All that a pipeline is: weights, types, modes, processors, configs."""
    facts = {}
    for name, part in pipe.components.items():
        facts[name] = (id(part), copy.deepcopy(getattr(part, "config", None)))
        if isinstance(part, torch.nn.Module):
            for path, module in part.named_modules():
                facts[name, path] = (module.training, id(getattr(module, "processor", None)))
            for path, weight in part.named_parameters():
                facts[name, path] = (weight.dtype, weight.requires_grad, weight.detach().clone())
    facts["config"] = copy.deepcopy(dict(pipe.config))
    facts["timesteps"] = copy.deepcopy(vars(pipe.scheduler))
    return facts


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return str(a) == str(b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_pipeline_object_is_left_as_it_was(family, pipe, dtype):
    pipe.to(dtype)
    pipe.vae.train()
    before = state(pipe)
    model = load(pipe)
    model.grid(STEPS)
    model.decode(model.encode(torch.zeros(1, 3, 16, 16)))
    x, condition = noise(1, 4, 8, 8), model.embed(["a cat"])
    model.network(x, torch.tensor([0.5]), condition)
    assert model.tokens("a cat").words and model.attention_sites() and model.fingerprint
    assert same(before, state(pipe))


def test_schedulers_without_a_table_are_read_from_their_config():
    pipe = tiny.sd1()
    expected = load(pipe).path.abar
    del pipe.scheduler.alphas_cumprod
    assert torch.equal(load(pipe).path.abar, expected)
    pipe.scheduler = PNDMScheduler.from_config(pipe.scheduler.config)
    assert torch.equal(load(pipe).path.abar, expected)


def test_refusals_of_schedulers():
    with pytest.raises(RetourError, match="rescale_betas_zero_snr"):
        load(tiny.sd1(rescale_betas_zero_snr=True))
    pipe = tiny.sd1()
    pipe.scheduler = tiny.sd3().scheduler
    with pytest.raises(RetourError, match="tells no noise levels"):
        load(pipe)
    with pytest.raises(RetourError, match="at most the model's 1000 training steps, got 1001"):
        load(tiny.sd1()).grid(1001)
    pipe = tiny.sd3()
    pipe.scheduler = DDIMScheduler()
    with pytest.raises(RetourError, match="DDIMScheduler knows no flow"):
        load(pipe)
    pipe = tiny.flux()
    pipe.scheduler = DDIMScheduler()
    with pytest.raises(RetourError, match="DDIMScheduler knows no flow"):
        load(pipe)


def test_refusals_of_networks():
    pipe = tiny.sd1()
    pipe.vae.register_to_config(latent_channels=3)
    with pytest.raises(RetourError, match="4 input channels for latents of 3"):
        load(pipe)
    pipe = tiny.sd1()
    pipe.unet.register_to_config(time_cond_proj_dim=8)
    with pytest.raises(RetourError, match="LCM"):
        load(pipe)
    with pytest.raises(RetourError, match="sides up to 48, got 52 x 16"):
        load(tiny.sd3()).latent_shape(16, 52)
    pipe = tiny.flux()
    pipe.vae.register_to_config(latent_channels=3)
    with pytest.raises(RetourError, match="16 input channels for latents of 12"):
        load(pipe)
    pipe = tiny.flux()
    pipe.text_encoder_2 = None
    with pytest.raises(RetourError, match="lacks one of its two text encoders"):
        load(pipe)
    with pytest.raises(RetourError, match="multiples of 4, got 14 x 16"):
        load(tiny.flux()).latent_shape(16, 14)


def test_an_inversion_walks_the_grid_of_its_picture_s_size():
    pipe = tiny.flux()
    model = load(pipe)
    picture = torch.zeros(3, 16, 32).permute(1, 2, 0).numpy()
    inversion = retour.invert(model, picture, "a cat", method="euler", steps=3)
    height, width = (2 * side for side in inversion.latents.shape[-2:])
    assert height != width
    assert inversion.grid == model.grid(3, size=(height, width)) != model.grid(3)


@pytest.mark.parametrize(("embedded", "told"), [(1.0, 1.0), (None, 3.5), (0.0, 0.0)])
def test_the_way_up_tells_a_distilled_model_its_own_scale(embedded, told):
    model = load(tiny.flux())
    heard = []
    network = model.network
    model.network = lambda x, t, c: heard.append(c.tensors["guidance"].tolist()) or network(x, t, c)
    picture = torch.zeros(16, 16, 3).numpy()
    options = {"method": "euler", "steps": 2, "inversion_embedded": embedded}
    inversion = retour.invert(model, picture, "a cat", **options)
    assert heard == [[told]] * 2
    heard.clear()
    retour.edit(inversion, "a red cat", editor="reprompt")
    assert heard == [[3.5]] * 2
