"""Virtual inversion: a source that needs no network, and targets corrected by what it says."""

import pytest
import torch
from diffusers import LCMScheduler

import declarations as claims
import retour
from inverters.jobs import job, tiny_model, tiny_picture
from problems import PATHS, ProblemModel, mixture, points
from retour import api
from retour.core.branches import Branch, Denoiser
from retour.core.grid import Grid
from retour.core.loop import walk
from retour.core.path import DiscreteVP, levels
from retour.core.registry import get
from retour.core.state import State

KINDS = {"vp": "eps", "discrete": "v", "flow": "velocity", "ve": "x0"}
each_path = pytest.mark.parametrize("path", KINDS)


def make(**options):
    return get("invert", "virtual").make(**options)


def model(path="discrete"):
    return ProblemModel(mixture(), PATHS[path], KINDS[path])


def returned(inversion, targets, scale=3.0, observers=(), controls=()):
    """Walk down with the source and one branch for each target prompt."""
    net, images = inversion.model, inversion.images
    branches = [Branch("source", inversion.condition, inversion.negative, scale)]
    for k, prompt in enumerate(targets):
        condition = net.embed([prompt] * images)
        branches.append(Branch(f"target{k}", condition, inversion.negative, scale))
    replay = get("invert", inversion.method).make(**inversion.options).replay(inversion)
    denoiser = Denoiser(net, branches)
    state = replay.state.tile(len(branches))
    end = walk(
        replay.solver,
        denoiser,
        state,
        inversion.grid,
        down=True,
        controls=[replay.control, *controls],
        observers=observers,
    )
    return dict(denoiser.layout.split(end.x))


@each_path
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_the_source_points_to_its_data_all_the_way(path, eta):
    work = job(model(path), steps=6, guidance=3.0)
    inversion = make(eta=eta).invert(work)
    assert work.ledger.rows == 0
    x, where = inversion.states["x"], PATHS[path]
    assert torch.equal(x[0], points(2))
    for state, t in zip(x[1:], inversion.grid.times[1:], strict=True):
        alpha, sigma = levels(where, t, state)
        noise = (state - alpha * points(2)) / sigma
        back = state - sigma * noise
        assert claims.relative(back, alpha * points(2)) < 1e-6 or float(alpha) == 0
    seen = []
    returned(inversion, ["green"], observers=[lambda e: seen.append(e.state.x[:2])])
    track = torch.stack([x[-1], *seen]).flip(0)
    assert claims.relative(track, x) < 1e-12
    assert torch.equal(track[0], points(2))


@each_path
@pytest.mark.parametrize("steps", [1, 2, 9])
def test_the_source_prompt_at_the_source_guidance_is_the_source(path, steps):
    """For any noise, any number of steps; equal guidance, no attention control."""
    for seed in (0, 1):
        inversion = make().invert(job(model(path), images=1, steps=steps, seed=seed))
        gaps = []
        ends = returned(
            inversion,
            ["red"],
            scale=1.0,
            observers=[lambda e, gaps=gaps: gaps.append(e.state.x[1] - e.state.x[0])],
        )
        assert claims.relative(ends["target0"], points(1)) < 1e-12
        assert len(gaps) == steps and torch.stack(gaps).abs().max() < 1e-12 * PATHS[path].t_noise


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl", "sd3"])
def test_that_holds_on_untrained_networks(family):
    inversion = retour.invert(
        tiny_model(family), tiny_picture(), "a cat", method="virtual", steps=4, guidance=1.0
    )
    result = retour.edit(inversion, "a cat", editor="reprompt")
    assert (result.latents - inversion.latents).abs().max() < 1e-5
    assert torch.equal(api.reconstruct(inversion).latents, inversion.latents)


def test_targets_follow_the_papers_update():
    """z0_tgt = z0 + [(x_t - x_s) - s (e_t - e_s)] / a, direction e_t - e_s + e_cons, shared n."""
    net, eta = model(), 0.3
    inversion = make(eta=eta).invert(job(net, images=1, steps=5))
    grid, path, z0 = inversion.grid, net.path, inversion.latents
    x_s = x_t = inversion.noise
    red, green = (
        Branch(p, net.embed([p]), net.embed([""]), w) for p, w in (("red", 1.0), ("green", 3.0))
    )
    for step in grid.walk(down=True):
        a_t, a_p = path.alpha(step.t) ** 2, path.alpha(step.s) ** 2
        e_s, e_t = (Denoiser(net, [b])(x, step.t).eps for b, x in ((red, x_s), (green, x_t)))
        e_cons = (x_s - a_t.sqrt() * z0) / (1 - a_t).sqrt()
        z0_tgt = z0 + ((x_t - x_s) - (1 - a_t).sqrt() * (e_t - e_s)) / a_t.sqrt()
        noise = inversion.extras["noise"][step.index]
        var = eta * (1 - a_p)
        rest = ((1 - a_p) - var).sqrt()
        x_t = a_p.sqrt() * z0_tgt + rest * (e_t - e_s + e_cons) + var.sqrt() * noise
        x_s = a_p.sqrt() * z0 + rest * e_cons + var.sqrt() * noise
    found = returned(inversion, ["green"])
    assert claims.relative(found["target0"], x_t) < 1e-11
    assert claims.relative(x_t, z0_tgt) < 1e-12, "the last step lands on clean data"


def test_without_correction_it_is_consistency_sampling():
    """At eta = 1 every step resamples all noise around the predicted data."""
    net = model()
    inversion = make().invert(job(net, images=1, steps=4))
    x, noise = inversion.noise, inversion.extras["noise"]
    denoise = claims.denoiser(net, 1, "green")
    for step in inversion.grid.walk(down=True):
        alpha, sigma = levels(net.path, step.s, x)
        x = alpha * denoise(x, step.t).x0 + sigma * noise[step.index]
    control = claims.Given(list(noise.flip(0)))
    found = walk(
        make().solver(),
        denoise,
        State(inversion.noise),
        inversion.grid,
        down=True,
        controls=[control],
    ).x
    assert claims.relative(found, x) < 1e-12


def test_that_is_diffusers_sampler_of_consistency_models():
    """Its boundary condition is scaled away: it is a distilled network's own business."""
    scheduler = LCMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        original_inference_steps=50, timestep_scaling=1e9,
    )  # fmt: skip
    scheduler.set_timesteps(6)
    net = ProblemModel(mixture(), DiscreteVP(scheduler.alphas_cumprod), "eps")
    grid = Grid((net.path.t_clean, *scheduler.timesteps.flip(0).tolist()))
    draw = torch.Generator().manual_seed(3)
    noises = [torch.randn(4, 2, 1, 1, generator=draw, dtype=torch.float64) for _ in range(6)]
    denoise, again = claims.denoiser(net, 4, "green"), torch.Generator().manual_seed(3)
    x = points()
    for t in scheduler.timesteps:
        x = scheduler.step(denoise(x, float(t)).eps, t, x, generator=again).prev_sample
    given = [claims.Given(noises)]
    found = walk(make().solver(), denoise, State(points()), grid, down=True, controls=given).x
    assert claims.relative(found, x) < 1e-6


def test_guidance_moves_the_target_away_from_the_source():
    net = model()
    inversion = make().invert(job(net, images=1, steps=8))
    moved = [
        float((returned(inversion, ["green"], scale=w)["target0"] - points(1)).norm())
        for w in (1.0, 2.0, 4.0, 8.0)
    ]
    assert moved == sorted(moved) and moved[0] < moved[-1]


def test_prompts_that_are_farther_off_move_the_target_farther():
    """From "red": to red or green, to green, without guidance."""
    inversion = make().invert(job(model(), images=1, steps=8))
    ends = returned(inversion, ["red", "red green", "green"], scale=1.0)
    moved = [float((end - points(1)).norm()) for name, end in ends.items() if name != "source"]
    assert moved[0] < 1e-9 < moved[1] < moved[2]


def test_all_branches_share_the_noise():
    inversion = make().invert(job(model(), images=1, steps=6))
    ends = returned(inversion, ["green", "green"])
    assert torch.equal(ends["target0"], ends["target1"])


def test_clean_data_is_never_asked_about():
    asked = []
    net = model()
    bare = net.network
    net.network = lambda x, t, c: asked.append(float(t.min())) or bare(x, t, c)
    inversion = make().invert(job(net, images=1, steps=6))
    returned(inversion, ["green"])
    assert inversion.grid.times[0] == PATHS["discrete"].t_clean
    assert float(PATHS["discrete"].sigma(min(asked))) > 0 and min(asked) > 0


def test_the_start_is_pure_noise_or_noised_data():
    """Images differ in the second only; both share their noise."""
    pure = make().invert(job(model(), images=2, steps=10))
    assert torch.equal(pure.noise[0], pure.noise[1])
    short = make(strength=0.5).invert(job(model(), images=2, steps=10))
    alpha, sigma = levels(PATHS["discrete"], short.grid.times[-1], short.noise)
    assert short.grid.steps == 5 and float(alpha) > 0.4
    noise = (short.noise - alpha * points(2)) / sigma
    assert claims.relative(noise[0], noise[1]) < 1e-12


@pytest.mark.parametrize("editor", ["reprompt", "p2p", "mask-blend"])
def test_every_editor_gets_a_source_branch(editor):
    mask = torch.zeros(16, 16).numpy()
    mask[:, 8:] = 1
    inversion = retour.invert(tiny_model(), tiny_picture(), "a cat", method="virtual", steps=3)
    result = retour.edit(inversion, "a pear", editor=editor, mask=mask)
    assert torch.equal(result.source, inversion.latents)
    assert torch.equal(result.latents[..., :4], inversion.latents[..., :4])
    assert result.record["nfe"] == 3 * 3


def test_eta_is_checked():
    with pytest.raises(retour.RetourError, match="eta"):
        make(eta=1.2)
