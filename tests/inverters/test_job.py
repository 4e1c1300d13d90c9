"""What a job offers to every inverter."""

import torch

from problems import PATHS, ProblemModel, mixture, points
from retour.core.branches import Branch, Denoiser
from retour.core.grid import flow_grid
from retour.inverters.base import Job

MODEL = ProblemModel(mixture(), PATHS["vp"])


def job(images=2, seed=0, **options):
    prompts = ["red", "green"][:images]
    return Job(
        MODEL,
        points(images),
        MODEL.embed(prompts),
        MODEL.embed([""] * images),
        flow_grid(3),
        5.0,
        torch.Generator().manual_seed(seed),
        **options,
    )


def test_independent_predictions_equal_single_calls_whatever_the_grouping():
    for scale in (1.0, 5.0):
        work = job()
        x = torch.stack([points(2) * k for k in (1.0, 0.5, 2.0)])
        times = [0.2, 0.5, 0.9]
        for most in (1, 4, 64):
            found = work.predict_each(x, times, scale, most=most)
            assert found.x0.shape == x.shape
            for k, t in enumerate(times):
                branch = Branch("source", work.condition, work.negative, scale)
                alone = Denoiser(MODEL, [branch])(x[k], t)
                torch.testing.assert_close(found.eps[k], alone.eps, rtol=0, atol=1e-13)
                torch.testing.assert_close(found.x0[k], alone.x0, rtol=0, atol=1e-13)
        assert work.ledger.rows == 3 * len(times) * 2 * (1 if scale == 1 else 2)


def test_one_call_for_all_times_that_fit():
    work = job()
    work.predict_each(torch.stack([points(2)] * 5), [0.1, 0.2, 0.3, 0.4, 0.5], 5.0)
    assert (work.ledger.calls, work.ledger.rows) == (1, 20)


def test_images_share_their_noise_and_the_seed_decides_it():
    noise = job().noise(4)
    assert noise.shape == (4, *points(2).shape) and noise.dtype == torch.float64
    assert torch.equal(noise[:, 0], noise[:, 1])
    assert torch.equal(noise, job().noise(4))
    assert not torch.equal(noise, job(seed=1).noise(4))
    assert torch.equal(noise[:, :1], job(images=1).noise(4))
    assert (noise[0] - noise[1]).abs().min() > 0
