"""SSIM, PSNR and MSE against torchmetrics and scikit-image, and what must hold of any image."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage import metrics as outside
from torchmetrics.functional import image as torchmetrics

from retour.errors import RetourError
from retour.evaluate import metrics
from retour.evaluate.metrics.pixelwise import WINDOW

SHAPE = (3, 24, 20)


def images(seed=0, count=2, spread=0.2):
    rng = torch.Generator().manual_seed(seed)
    base = torch.rand(SHAPE, generator=rng, dtype=torch.float64)
    noise = torch.randn(count - 1, *SHAPE, generator=rng, dtype=torch.float64)
    return [base, *(base + spread * noise).clamp(0, 1)]


def some(seed=0, share=0.4):
    rng = torch.Generator().manual_seed(seed + 100)
    return torch.rand(SHAPE[1:], generator=rng) < share


def as_array(x):
    return x.permute(1, 2, 0).numpy()


def skimage_ssim(a, b):
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    return outside.structural_similarity(
        as_array(a), as_array(b), channel_axis=2, data_range=1.0, **options
    )


@pytest.mark.parametrize("seed", range(3))
def test_whole_images_agree_with_scikit_image(seed):
    a, b = images(seed)
    given = as_array(a), as_array(b)
    assert metrics.mse(a, b) == pytest.approx(outside.mean_squared_error(*given), abs=1e-12)
    psnr = outside.peak_signal_noise_ratio(*given, data_range=1.0)
    assert metrics.psnr(a, b) == pytest.approx(psnr, abs=1e-9)
    assert metrics.ssim(a, b) == pytest.approx(skimage_ssim(a, b), abs=1e-9)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("masked", [False, True])
def test_the_published_convention_agrees_with_torchmetrics(seed, masked):
    """As the evaluator calls it: both images times the unedited part, data range 1."""
    a, b = images(seed)
    mask = some(seed) if masked else torch.zeros(SHAPE[1:], dtype=torch.bool)
    given = [(x * ~mask)[None] for x in (a, b)]
    ssim = torchmetrics.structural_similarity_index_measure(*given, data_range=1.0)
    psnr = torchmetrics.peak_signal_noise_ratio(*given, data_range=1.0)
    found = [m(a, b, mask, "pie_compat") for m in (metrics.ssim, metrics.psnr, metrics.mse)]
    mse = (given[0] - given[1]).square().mean()
    assert found == pytest.approx([float(ssim), float(psnr), float(mse)], abs=1e-5)


def test_the_strict_ssim_of_a_pixel_by_hand():
    """Moments over the background of one window: two weighted sums written out."""
    a, b = images(3)
    mask = some(3)
    mask[7, 8] = False
    lone = torch.ones_like(mask)
    lone[7, 8] = False
    bell = torch.exp(-0.5 * (torch.arange(-5, 6.0, dtype=torch.float64) / 1.5) ** 2)
    weight = bell[:, None] * bell * ~mask[2:13, 3:14]
    weight = weight / weight.sum()
    values = []
    for x, y in zip(a[:, 2:13, 3:14], b[:, 2:13, 3:14], strict=True):
        mx, my = (weight * x).sum(), (weight * y).sum()
        vx, vy = (weight * (x - mx) ** 2).sum(), (weight * (y - my) ** 2).sum()
        cov = (weight * (x - mx) * (y - my)).sum()
        top = (2 * mx * my + 1e-4) * (2 * cov + 9e-4)
        values.append(top / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4)))
    from retour.evaluate.metrics.pixelwise import _ssim_map

    found = _ssim_map(a, b, (~mask).double())[:, 2, 3]
    assert found.tolist() == pytest.approx([float(v) for v in values], abs=1e-12)


@pytest.mark.parametrize("name", ["ssim", "psnr", "mse"])
def test_what_lies_under_the_mask_does_not_matter(name):
    metric = getattr(metrics, name)
    a, b = images(4)
    mask = some(4)
    wild = torch.where(mask, 1 - b, b)
    for convention in metrics.CONVENTIONS:
        assert metric(a, wild, mask, convention) == metric(a, b, mask, convention)
    assert metric(a, wild) != metric(a, b)


def test_a_small_background_looks_better_to_the_published_convention():
    a, b = images(5)
    mask = some(5, 0.9)
    for name in ("ssim", "psnr"):
        metric = getattr(metrics, name)
        assert metric(a, b, mask, "pie_compat") > metric(a, b, mask, "strict")
    assert metrics.mse(a, b, mask, "pie_compat") < metrics.mse(a, b, mask, "strict")


seeds = st.integers(0, 10_000)


@settings(max_examples=25, deadline=None)
@given(seeds, st.sampled_from(metrics.CONVENTIONS), st.floats(0, 0.9))
def test_symmetry_and_identity(seed, convention, share):
    a, b = images(seed)
    mask = some(seed, share)
    for metric, best in ((metrics.ssim, 1.0), (metrics.psnr, math.inf), (metrics.mse, 0.0)):
        assert metric(a, b, mask, convention) == pytest.approx(
            metric(b, a, mask, convention), abs=1e-12
        )
        assert metric(a, a, mask, convention) == pytest.approx(best, abs=1e-12)
    assert metrics.ssim(a, b, mask, convention) <= 1 + 1e-12


@settings(max_examples=15, deadline=None)
@given(seeds, st.sampled_from(metrics.CONVENTIONS))
def test_more_noise_is_worse(seed, convention):
    rng = torch.Generator().manual_seed(seed)
    base = 0.3 + 0.4 * torch.rand(SHAPE, generator=rng, dtype=torch.float64)
    noise = torch.randn(SHAPE, generator=rng, dtype=torch.float64)
    ladder = [base + scale * noise for scale in (0.01, 0.03, 0.09)]
    mask = some(seed)
    for metric, sign in ((metrics.ssim, -1), (metrics.psnr, -1), (metrics.mse, 1)):
        values = [sign * metric(base, x, mask, convention) for x in ladder]
        assert values == sorted(values) and values[0] < values[-1]


@pytest.mark.parametrize("convention", metrics.CONVENTIONS)
def test_no_background_or_no_whole_window_is_not_a_number(convention):
    a, b = images()
    everything = torch.ones(SHAPE[1:], dtype=torch.bool)
    assert math.isnan(metrics.ssim(a, b, everything, convention))
    assert math.isnan(metrics.exactness(a, b, everything))
    small = a[:, : WINDOW - 1]
    assert math.isnan(metrics.ssim(small, small, None, convention))


def test_a_background_only_at_the_rim_has_no_whole_window():
    a, b = images()
    mask = torch.ones(SHAPE[1:], dtype=torch.bool)
    mask[0] = False
    assert math.isnan(metrics.ssim(a, b, mask))
    assert metrics.mse(a, b, mask) > 0


def test_exactness_by_hand():
    a = torch.full((3, 2, 4), 100 / 255, dtype=torch.float64)
    b = a.clone()
    b[0, 0, 0] += 1 / 255
    b[:, 0, 1] += 3 / 255
    b[2, 1, 3] += 0.4 / 255  # the same level
    mask = np.zeros((2, 4), bool)
    assert metrics.exactness(a, b) == pytest.approx(6 / 8)
    assert metrics.exactness(a, b, levels=1) == pytest.approx(7 / 8)
    mask[0, :2] = True
    assert metrics.exactness(a, b, mask) == 1
    with pytest.raises(RetourError, match="levels"):
        metrics.exactness(a, b, levels=-1)


def test_exactness_counts_from_the_ceiling_by_hand():
    """Input 100; the ceiling is at 104, 100 and 90: so far, and two levels more, may it stray."""
    a = torch.full((3, 1, 6), 100 / 255, dtype=torch.float64)
    ceiling = a.clone()
    ceiling[1, 0] = torch.tensor([104, 104, 100, 100, 90, 90], dtype=torch.float64) / 255
    b = a.clone()
    b[1, 0] = torch.tensor([94, 93, 102, 103, 112, 113], dtype=torch.float64) / 255
    best = {"ceiling": ceiling}
    assert metrics.exactness(a, b, levels=2, **best) == pytest.approx(3 / 6)
    assert metrics.exactness(a, ceiling, **best) == metrics.exactness(a, a, **best) == 1
    b[0, 0, 0] += 3 / 255  # one channel is enough
    assert metrics.exactness(a, b, levels=2, **best) == pytest.approx(2 / 6)


def test_what_does_not_fit_is_refused():
    a, b = images()
    for metric in (metrics.ssim, metrics.mse, metrics.psnr):
        with pytest.raises(RetourError, match="shapes"):
            metric(a, b[:, 1:])
        with pytest.raises(RetourError, match="does not fit"):
            metric(a, b, torch.zeros(3, 3))
        with pytest.raises(RetourError, match="pie_compat"):
            metric(a, b, some(), "pie")
