"""Recorded noise: both stochastic inverters, their statistics and their round trips."""

import pytest
import torch

import declarations as claims
import retour
from inverters.jobs import job, reconstructed, tiny_model, tiny_picture
from problems import PATHS, ProblemModel, gaussian, mixture, points, stable_diffusion_path
from retour import api
from retour.core.grid import lambda_grid
from retour.core.loop import walk
from retour.core.registry import get
from retour.core.state import State
from retour.inverters._noise_maps import GivenNoise, record, scattered

SOLVERS = {"ddpm": {"eta": 1.0}, "ddpm-0.4": {"eta": 0.4}, "sde-dpm": {}}
METHODS = ["edit-friendly", "sde-dpm"]
each_solver = pytest.mark.parametrize("name", SOLVERS)


def solver(name, **options):
    return get("solver", name.split("-0")[0]).make(**SOLVERS[name], **options)


def model(path="vp", kind="v"):
    return ProblemModel(mixture(), PATHS[path], kind)


def replayed(work, stochastic, x, extras, scale):
    inversion = work.pack(
        "edit-friendly", get("invert", "edit-friendly").options(), work.grid, {"x": x}, **extras
    )
    control = GivenNoise(inversion, scale)
    end = walk(
        stochastic, work.denoiser(scale), State(x[-1]), work.grid, down=True, controls=[control]
    )
    return end.x


@each_solver
@pytest.mark.parametrize("path, kind", [("vp", "eps"), ("flow", "velocity"), ("discrete", "v")])
@pytest.mark.parametrize("steps", [5, 20])
def test_the_sampler_walks_through_the_recorded_states(name, path, kind, steps):
    for scale in (1.0, 7.5):
        work = job(model(path, kind), steps=steps)
        x, extras = record(work, solver(name), work.grid, scale)
        assert claims.relative(replayed(work, solver(name), x, extras, scale), points(2)) < 1e-12


def test_another_rule_in_the_last_step_loses_the_source():
    """First order at the end of the sampler only, as in published code."""
    work = job(model(), steps=10)
    x, extras = record(work, solver("sde-dpm"), work.grid, 1.0)
    matched = replayed(work, solver("sde-dpm"), x, extras, 1.0)
    mixed = replayed(work, solver("sde-dpm", lower_order_final=True), x, extras, 1.0)
    assert claims.relative(matched, points(2)) < 1e-12
    assert claims.relative(mixed, points(2)) > 1e-4
    x, extras = record(work, solver("sde-dpm", lower_order_final=True), work.grid, 1.0)
    mirrored = replayed(work, solver("sde-dpm", lower_order_final=True), x, extras, 1.0)
    assert claims.relative(mirrored, points(2)) < 1e-12


def test_states_are_noised_independently_with_the_right_spread():
    path = PATHS["discrete"]
    data = torch.zeros(1, 4, 64, 64, dtype=torch.float64)
    work = job(ProblemModel(gaussian(4), path, "eps"), latents=data, steps=6)
    x = scattered(work, work.grid)
    assert torch.equal(x[0], data)
    noises = (
        x[1:, 0] / torch.stack([path.sigma(t) for t in work.grid.times[1:]])[:, None, None, None]
    )
    count = noises[0].numel()
    cross = torch.corrcoef(noises.flatten(1))
    assert (noises.flatten(1).var(1) - 1).abs().max() < 6 * (2 / count) ** 0.5
    assert (cross - torch.eye(6)).abs().max() < 6 / count**0.5
    straight = scattered(work, work.grid, alike=True)
    line = (
        (straight[1:, 0])
        / torch.stack([path.sigma(t) for t in work.grid.times[1:]])[:, None, None, None]
    )
    assert (line - line[0]).abs().max() < 1e-12


@each_solver
def test_maps_are_wider_than_noise_and_neighbours_are_negatively_correlated(name):
    """What makes them edit-friendly; a sampler's own noise is white."""
    path = stable_diffusion_path()
    data = 0.5 * torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(3)).double()
    means = torch.zeros(1, 4, 32, 32, dtype=torch.float64)
    net = ProblemModel(type(gaussian())(("thing",), (1.0,), means, (0.5,)), path, "eps")
    work = job(net, latents=data, steps=20)
    _, extras = record(work, solver(name), work.grid, 1.0)
    z = extras["noise"][1:, 0].flatten(1)
    assert (z.var(1) > 1).all()
    neighbours = torch.stack([torch.corrcoef(z[k : k + 2])[0, 1] for k in range(len(z) - 1)])
    assert (neighbours < 0).all()


def test_clean_ends_keep_an_offset_in_place_of_noise():
    work = job(model("flow", "velocity"), steps=4)
    _, extras = record(work, solver("ddpm"), work.grid, 1.0)
    assert (extras["noise"][0] == 0).all() and (extras["noise"][1:] != 0).all()
    assert (extras["offset"][0] != 0).all() and (extras["offset"][1:] == 0).all()
    work = job(model("vp"), steps=4)
    assert set(record(work, solver("ddpm"), work.grid, 1.0)[1]) == {"noise"}


def test_all_predictions_are_made_in_one_call():
    work = job(model(), steps=10)
    record(work, solver("sde-dpm"), work.grid, 7.5)
    assert (work.ledger.calls, work.ledger.nfe(2)) == (1, 20)


def test_sampling_with_fresh_noise_is_not_the_source():
    work = job(model(), steps=10)
    x, extras = record(work, solver("ddpm"), work.grid, 1.0)
    fresh = {"noise": torch.randn_like(extras["noise"])}
    assert claims.relative(replayed(work, solver("ddpm"), x, fresh, 1.0), points(2)) > 1e-2


# --- Through the whole job ------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl", "sd3"])
@pytest.mark.parametrize("guidance", [1.0, 3.5])
def test_round_trip_in_float64(method, family, guidance):
    """A float32 network rounds otherwise in another batch shape: the registry's test has those."""
    options = {"strength": 1.0, "inversion_guidance": guidance}
    inversion = retour.invert(
        tiny_model(family, wide=True), tiny_picture(), "a cat", method=method, steps=6, **options
    )
    assert (api.reconstruct(inversion).latents - inversion.latents).abs().max() < 1e-12


@pytest.mark.parametrize("method", METHODS)
def test_the_source_returns_beside_an_edit_at_its_own_guidance(method):
    inversion = retour.invert(
        tiny_model(wide=True), tiny_picture(), "a red apple", method=method, steps=4, guidance=7.5
    )
    result = retour.edit(inversion, "a green apple", editor="p2p")
    assert (result.source - inversion.latents).abs().max() < 1e-12
    # Source once (it is not guided), target twice, on 3 of 4 steps.
    assert result.record["nfe_edit"] == 3 * inversion.grid.steps
    same = retour.edit(inversion, "a red apple", editor="reprompt", guidance=1.0)
    assert (same.latents - inversion.latents).abs().max() < 1e-12


@pytest.mark.parametrize("method", METHODS)
def test_the_trajectory_serves_masks(method):
    mask = torch.zeros(16, 16).numpy()
    mask[:, 8:] = 1
    inversion = retour.invert(tiny_model(), tiny_picture(), "a cat", method=method, steps=4)
    result = retour.edit(inversion, "a green pear", editor="mask-blend", mask=mask)
    assert torch.equal(result.latents[..., :4], inversion.latents[..., :4])
    assert (result.latents - inversion.latents)[..., 4:].abs().max() > 1e-2


def test_dropping_the_last_map_costs_what_it_carried():
    """An error of eta sqrt(var_1) |z_1|, as in the published code."""
    work = job(model(), steps=8)
    kept = get("invert", "edit-friendly").make(strength=1.0).invert(work)
    dropped = get("invert", "edit-friendly").make(strength=1.0, last_noise=False)
    lost = dropped.invert(job(model(), steps=8))
    z = kept.extras["noise"][0]
    assert (lost.extras["noise"][0] == 0).all()
    assert torch.equal(lost.extras["noise"][1:], kept.extras["noise"][1:])
    [step] = [s for s in kept.grid.walk(down=True) if s.index == 0]
    error = dropped.solver().std(PATHS["vp"], step) * z
    found = reconstructed(lost)[0] - points(2)
    assert claims.relative(found, -error) < 1e-9


@pytest.mark.parametrize("eta", [0, -1, 1.5])
def test_eta_is_checked(eta):
    with pytest.raises(retour.RetourError, match="eta"):
        get("invert", "edit-friendly").make(eta=eta)


def test_grids_of_uniform_lambda_work_as_well():
    net = model()
    work = job(net)
    work.grid = lambda_grid(net.path, 6, 0.01, 0.9)
    x, extras = record(work, solver("sde-dpm"), work.grid, 1.0)
    assert claims.relative(replayed(work, solver("sde-dpm"), x, extras, 1.0), points(2)) < 1e-12
