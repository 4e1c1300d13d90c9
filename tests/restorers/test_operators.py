"""Operators against their definitions (adjoint, norm, pseudo-inverse) and outside oracles."""

import numpy as np
import pytest
import torch
from PIL import Image

from retour.errors import RetourError
from retour.restorers.operators import (
    LUMA,
    OPERATORS,
    GaussianBlur,
    Grey,
    Identity,
    Inpaint,
    MotionBlur,
    SuperResolution,
)

SIZE = (12, 20)
KNOWN = torch.ones(SIZE)
KNOWN[3:7, 5:15] = 0
EXAMPLES = {
    "identity": [Identity()],
    "inpaint": [Inpaint(KNOWN), Inpaint(torch.rand(2, 1, *SIZE) > 0.5)],
    "sr": [SuperResolution(s, k) for s in (1, 2, 4) for k in ("average", "bicubic")],
    "deblur": [GaussianBlur(s, 7, b) for s in (1.0, 10.0) for b in ("reflect", "zero", "circular")],
    "motion": [MotionBlur(5.0, a, b) for a in (0.0, 30.0) for b in ("reflect", "zero", "circular")],
    "colour": [Grey()],
}
CASES = [
    pytest.param(op, id=f"{name}-{k}") for name, ops in EXAMPLES.items() for k, op in enumerate(ops)
]
each = pytest.mark.parametrize("operator", CASES)


def images(count=2, seed=0, size=SIZE):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, *size, generator=generator, dtype=torch.float64)


def test_every_registered_operator_has_its_examples():
    assert set(OPERATORS) == set(EXAMPLES)
    assert all(type(op) is OPERATORS[name] for name, ops in EXAMPLES.items() for op in ops)


@each
def test_adjoint(operator):
    x = images()
    y = torch.randn_like(operator.forward(x))
    left, right = (operator.forward(x) * y).sum(), (x * operator.adjoint(y)).sum()
    assert abs(float(left - right)) <= 1e-10 * float(x.norm() * y.norm())


@each
def test_linear(operator):
    a, b = images(seed=1), images(seed=2)
    found = operator.forward(2.5 * a - b)
    torch.testing.assert_close(
        found, 2.5 * operator.forward(a) - operator.forward(b), rtol=0, atol=1e-12
    )


@each
def test_shapes_and_dtype(operator):
    for dtype in (torch.float32, torch.float64):
        x = images().to(dtype)
        y = operator.forward(x)
        assert y.dtype == dtype and operator.adjoint(y).shape == x.shape
        assert y.shape[-2:] == (SIZE[0] // operator.scale, SIZE[1] // operator.scale)
        assert operator.guess(y).shape == x.shape
        assert operator.observe(operator.guess(y)[..., : y.shape[-2], : y.shape[-1]]).shape[1:] in (
            y.shape[1:],
            (3, *y.shape[-2:]),
        )


@each
def test_norm_is_the_largest_singular_value(operator):
    """Against a dense SVD on small images."""
    size = (8, 8)
    if isinstance(operator, Inpaint):
        operator = Inpaint(operator.known[..., : size[0], : size[1]])
        operator = Inpaint(operator.known[:1]) if operator.known.ndim == 4 else operator
    basis = torch.eye(3 * 64, dtype=torch.float64).reshape(-1, 3, *size)
    dense = torch.cat([operator.forward(e[None]).flatten(1) for e in basis])
    exact = float(torch.linalg.matrix_norm(dense, 2))
    assert operator.norm((3, *size)) == pytest.approx(exact, rel=2e-3)


@each
def test_pseudo_inverse(operator):
    x = images()
    y = operator.forward(x)
    if not operator.invertible:
        with pytest.raises(RetourError, match="no cheap pseudo-inverse"):
            operator.pinv(y)
        return
    # Singular values below the cutoff are left out, so A A+ A = A up to it.
    back = operator.forward(operator.pinv(y)) - y
    assert float(back.norm()) <= 1e-7 * float(y.norm())
    least = operator.pinv(y)
    again = operator.pinv(operator.forward(least))
    torch.testing.assert_close(again, least, rtol=0, atol=1e-5 * float(least.abs().max()))
    # The least-norm answer has nothing in the null space: it is shorter than the truth.
    assert float(least.norm()) <= float(x.norm()) * (1 + 1e-9)


def test_a_coarser_cutoff_tames_a_blur():
    """Noise grows by at most one over the cutoff for each axis (the blur's norm is about 1)."""
    blur, noise = GaussianBlur(2.0, 9), images()
    bound = 1 / (0.05 * blur.norm((3, *SIZE)) ** 0.5) ** 2
    growth = {cutoff: float(blur.pinv(noise, cutoff).norm() / noise.norm()) for cutoff in (0, 0.05)}
    assert growth[0.05] <= bound < growth[0]


def test_noise_is_shared_seeded_and_of_the_asked_size():
    x = images(3)
    first, second = (
        Identity().measure(x, 0.3, torch.Generator().manual_seed(4)) - x for _ in range(2)
    )
    assert torch.equal(first, second)
    torch.testing.assert_close(first[0], first[2], rtol=0, atol=1e-14)
    assert float(first[0].std()) == pytest.approx(0.3, rel=0.1)
    assert torch.equal(Identity().measure(x), x)


# --- Oracles --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("boundary", "mode"), [("reflect", "symmetric"), ("zero", "constant"), ("circular", "wrap")]
)
@pytest.mark.parametrize("length", [5, 9])
def test_blur_is_numpys_convolution(boundary, mode, length):
    """Also where the kernel is wider than the image."""
    x = images(1, size=(length, 11)).numpy()[0, 0]
    taps = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.7**2))
    taps /= taps.sum()
    padded = np.pad(x, 5, mode=mode)
    rows = np.apply_along_axis(np.convolve, 0, padded, taps, "valid")
    wanted = np.apply_along_axis(np.convolve, 1, rows, taps, "valid")
    found = GaussianBlur(1.7, 11, boundary).forward(torch.from_numpy(x)[None, None])
    np.testing.assert_allclose(found[0, 0].numpy(), wanted, atol=1e-13)


@pytest.mark.parametrize(
    ("boundary", "mode"), [("reflect", "symmetric"), ("zero", "constant"), ("circular", "wrap")]
)
def test_motion_is_a_convolution_too(boundary, mode):
    operator = MotionBlur(6.0, 25.0, boundary)
    kernel, x = operator.kernel.numpy(), images(1).numpy()[0, 0]
    radius = len(kernel) // 2
    padded, wanted = np.pad(x, radius, mode=mode), np.zeros_like(x)
    for (i, j), weight in np.ndenumerate(kernel):
        top, left = 2 * radius - i, 2 * radius - j
        wanted += weight * padded[top : top + x.shape[0], left : left + x.shape[1]]
    found = operator.forward(torch.from_numpy(x)[None, None])
    np.testing.assert_allclose(found[0, 0].numpy(), wanted, atol=1e-13)


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_bicubic_is_pils(scale):
    pixels = np.random.default_rng(0).random((24, 36)).astype(np.float32)
    small = Image.fromarray(pixels).resize((36 // scale, 24 // scale), Image.Resampling.BICUBIC)
    found = SuperResolution(scale, "bicubic").forward(torch.from_numpy(pixels)[None, None])
    np.testing.assert_allclose(found[0, 0].numpy(), np.asarray(small), atol=2e-6)


def test_a_hole_is_guessed_from_around_it():
    """Constant pictures exactly, ramps nearly; known pixels stay bit for bit, in every image."""
    for known in (KNOWN, torch.rand(2, 1, *SIZE, generator=torch.Generator().manual_seed(0)) > 0.9):
        operator, x = Inpaint(known), images()
        assert torch.equal(
            operator.forward(operator.guess(operator.forward(x))), operator.forward(x)
        )
        flat = torch.full_like(x, 0.7)
        torch.testing.assert_close(operator.guess(operator.forward(flat)), flat)
    ramp = torch.linspace(-1, 1, SIZE[1], dtype=torch.float64).expand(1, 3, *SIZE)
    operator = Inpaint(KNOWN)
    missed = (operator.guess(operator.forward(ramp)) - ramp).abs()
    assert 0 < float(missed.max()) < 0.35  # a hole of half the width, grey before: up to 0.5


def test_average_is_torchs_pooling_and_its_pseudo_inverse_repeats_pixels():
    """The published code takes the pseudo-inverse for the adjoint: they differ by scale squared."""
    operator, x = SuperResolution(4), images()
    y = operator.forward(x)
    torch.testing.assert_close(y, torch.nn.functional.avg_pool2d(x, 4), rtol=0, atol=1e-14)
    repeated = y.repeat_interleave(4, -1).repeat_interleave(4, -2)
    torch.testing.assert_close(operator.pinv(y), repeated, rtol=0, atol=1e-12)
    torch.testing.assert_close(operator.adjoint(y) * 16, repeated, rtol=0, atol=1e-12)


def test_grey_is_pils_luma():
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    wanted = np.asarray(Image.fromarray(pixels).convert("L"), float)
    found = Grey().forward(torch.from_numpy(pixels).double().permute(2, 0, 1)[None])
    assert np.abs(found[0, 0].numpy() - wanted).max() < 1  # PIL cuts or rounds to whole levels
    assert sum(LUMA) == pytest.approx(1)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: SuperResolution(0), "scale must be at least 1, got 0"),
        (lambda: SuperResolution(8).forward(images()), "multiples of 8, got 20 x 12"),
        (lambda: GaussianBlur(0.0), "above 0, got 0"),
        (lambda: GaussianBlur(1.0, 4), "odd and at least 1, got 4"),
        (lambda: MotionBlur(0.5), "at least 1 pixel, got 0.5"),
        (lambda: Inpaint(torch.full(SIZE, 0.5)), "ones, and else zeros"),
        (lambda: Inpaint(torch.zeros(SIZE)), "ones, and else zeros"),
        (lambda: Inpaint(KNOWN).forward(images(size=(8, 8))), "mask is 20 x 12, the image 8 x 8"),
    ],
)
def test_what_cannot_be_is_refused(make, says):
    with pytest.raises(RetourError, match=says):
        make()
