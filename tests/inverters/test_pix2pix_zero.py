"""pix2pix-zero's inversion: what the regularisation does to noise, and what it leaves alone."""

import math
from dataclasses import replace

import pytest
import torch

import retour.inverters.pix2pix_zero as method
from inverters.jobs import job, tiny_model
from problems import PATHS, ProblemModel, pictures
from retour.core.branches import Branch, Denoiser
from retour.core.grid import Step
from retour.core.registry import get
from retour.errors import RetourError
from retour.inverters.pix2pix_zero import (
    Pix2PixZeroOptions,
    correlation,
    divergence,
    regularised,
    slope,
)

VP = PATHS["discrete"]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(*shape, seed=0):
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def options(**given):
    return Pix2PixZeroOptions(**given)


def model(prediction="eps"):
    return ProblemModel(pictures(16), VP, prediction)


def invert(prediction="eps", steps=4, seed=0, **given):
    work = job(model(prediction), latents=noise(2, 3, 16, 16), steps=steps, seed=seed)
    return get("invert", "pix2pix-zero").make(**given).invert(work), work


def uneven(count=2):
    """Noise with a mean, another spread, and neighbours alike."""
    e = noise(count, 4, 16, 16)
    return 0.3 + 0.8 * (e + torch.roll(e, 1, -1) + torch.roll(e, 1, -2))


def test_mean_and_variance_come_nearer_to_the_unit_gaussians():
    e = uneven()
    r = regularised(e, generator(), options())
    for before, after in zip(e, r, strict=True):
        assert abs(float(after.mean())) < abs(float(before.mean()))
        assert abs(float(after.var()) - 1) < abs(float(before.var()) - 1)


def test_neighbours_become_less_alike():
    e = uneven()
    r = regularised(e, generator(), options(divergence=0.0))
    for shift in (1, 2):
        before, after = ((x * torch.roll(x, shift, -1)).mean((-1, -2)).abs().mean() for x in (e, r))
        assert after < before


def test_white_unit_noise_is_nearly_left_alone():
    e = noise(1, 4, 64, 64)
    assert (regularised(e, generator(), options()) - e).norm() < 0.05 * e.norm()


def by_hand(e, shifts):
    """The published sum, one image: channels, a pyramid down to 8, both axes."""
    total, shifts = 0.0, iter(shifts)
    levels = {}
    while True:
        drawn = next(shifts)
        for channel, shift in enumerate(drawn):
            plane = e[channel]
            for axis in (0, 1):
                total += float((plane * torch.roll(plane, int(shift), axis)).mean() ** 2)
        levels[len(levels)] = e.shape[-1]
        if e.shape[-1] <= 8:
            return total, list(levels.values())
        e = torch.nn.functional.avg_pool2d(e, 2)


def test_the_autocorrelation_is_the_published_sum(monkeypatch):
    shifts, real = [], method._rolled

    def noted(e, drawn):
        shifts.append(drawn.clone())
        return real(e, drawn)

    monkeypatch.setattr(method, "_rolled", noted)
    e = noise(2, 3, 32, 32)
    found = correlation(e, generator())
    assert torch.equal(shifts[0], shifts[1])  # both axes share their shifts
    for image, value in zip(e, found, strict=True):
        wanted, edges = by_hand(image, shifts[::2])
        assert edges == [32, 16, 8]
        assert float(value) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize(("rolls", "least"), [("nonzero", 1), ("published", 0)])
def test_shifts_are_below_half_of_the_edge(monkeypatch, rolls, least):
    seen = []
    monkeypatch.setattr(method, "_rolled", lambda e, drawn: (seen.extend(drawn.tolist()), e)[1])
    regularised(noise(1, 40, 8, 8), generator(), options(rolls=rolls))
    assert set(seen) == set(range(least, 4))


def test_the_divergence_is_zero_for_the_unit_gaussian_only():
    e = noise(1, 4, 32, 32)
    unit = (e - e.mean()) / e.std()
    assert float(divergence(unit)) == pytest.approx(0, abs=1e-6)
    assert float(divergence(unit + 0.2)) == pytest.approx(0.04, abs=1e-6)
    assert float(divergence(2 * unit)) == pytest.approx(3 - math.log(4), abs=1e-6)
    pull = slope(divergence, 2 * unit)
    assert float((pull * unit).sum()) > 0  # down the slope is towards a smaller spread


def test_each_image_is_regularised_alone():
    e = uneven(3)
    together = regularised(e, generator(), options())
    for k in range(3):
        alone = regularised(e[k : k + 1], generator(), options())
        torch.testing.assert_close(together[k : k + 1], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_faces_stay_consistent_and_noise_is_held(prediction):
    net, x, t = model(prediction), noise(2, 3, 16, 16), 400.0
    branch = Branch("source", net.embed(["red", "green"]))
    denoise = Denoiser(net, [branch])
    control = method._Regular(generator(), options())
    asked = control.denoiser(Step(0, 4, 300.0, 400.0, False), denoise, denoise.layout)
    found, plain = asked(x, t), denoise(x, t)
    assert asked.kind == "eps"
    torch.testing.assert_close(
        found.eps, regularised(plain.eps, generator(), options()), rtol=1e-12, atol=1e-12
    )
    torch.testing.assert_close(VP.alpha(t) * found.x0 + VP.sigma(t) * found.eps, x)
    assert not torch.allclose(found.eps, plain.eps, atol=1e-4)


def test_without_weights_it_is_ddim_inversion():
    found, work = invert(correlation=0.0, divergence=0.0)
    wanted = get("invert", "ddim").make().invert(work)
    torch.testing.assert_close(found.states["x"], wanted.states["x"], rtol=1e-12, atol=1e-12)
    regular, _ = invert()
    assert not torch.allclose(regular.noise, wanted.noise, atol=1e-3)


def test_all_intervals_are_crossed_by_default_and_the_published_ones_on_demand():
    """Published code leaves out the first and the last, and reads its latents as if it had not."""
    whole, work = invert(steps=5)
    assert work.ledger.nfe(2) == 5 and len(whole.states["x"]) == 6
    assert not torch.equal(whole.states["x"][1], whole.latents)
    inner, work = invert(steps=5, inner=True)
    states = inner.states["x"]
    assert work.ledger.nfe(2) == 3 and len(states) == 6 and inner.grid == whole.grid
    assert torch.equal(states[0], states[1]) and torch.equal(states[4], states[5])
    with pytest.raises(RetourError, match="leaves out two steps of 2: take 3 or more"):
        invert(steps=2, inner=True)


def test_the_seed_decides():
    torch.manual_seed(1)
    first, _ = invert()
    torch.manual_seed(2)
    assert torch.equal(first.noise, invert()[0].noise)
    assert not torch.equal(first.noise, invert(seed=5)[0].noise)


def test_the_job_is_left_as_it_was():
    work = job(model(), latents=noise(2, 3, 16, 16))
    get("invert", "pix2pix-zero").make().invert(work)
    assert list(work.controls) == []


def test_small_and_oblong_latents():
    for size in ((8, 8), (8, 12), (9, 21), (30, 16)):
        out = regularised(2 * noise(1, 4, *size), generator(), options())
        assert out.shape == (1, 4, *size) and torch.isfinite(out).all()


def test_noise_of_a_network_is_regularised_on_the_way_up():
    """At the noisy end the latents look more like noise than plain DDIM inversion's."""
    net = tiny_model(wide=True)
    work = replace(job(net, latents=noise(2, 4, 8, 8), prompts=["a cat", "a red apple"]))
    plain = get("invert", "ddim").make().invert(work)
    found = get("invert", "pix2pix-zero").make().invert(work)
    for k in range(2):
        before, after = (abs(float(inv.noise[k].var()) - 1) for inv in (plain, found))
        assert after < before


def test_registered_with_its_facts():
    entry = get("invert", "pix2pix-zero")
    assert entry.stochastic and entry.needs == {"vp"} and entry.provides == {"trajectory"}
    with pytest.raises(RetourError, match="correlation is -1"):
        entry.make(correlation=-1.0)
