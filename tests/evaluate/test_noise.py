import pytest
import torch

from retour.errors import RetourError
from retour.evaluate.noise import gaussianity


def test_white_noise_has_the_moments_of_white_noise():
    noise = torch.randn(64, 4, 32, 32, generator=torch.Generator().manual_seed(0)).double()
    found = gaussianity(2 * noise + 3)
    n = 4 * 32 * 32
    # Standard errors of the mean of 64 images: 1, 1/sqrt 2, sqrt 24 and 1/sqrt 2 over sqrt(64 n).
    unit = (64 * n) ** -0.5
    assert abs(found["mean"].mean() - 3) < 4 * 2 * unit
    assert abs(found["std"].mean() - 2) < 4 * 2 * unit
    assert abs(found["kurtosis"].mean()) < 4 * 24**0.5 * unit + 6 / n
    assert abs(found["neighbours"].mean()) < 4 * unit + 2 / n


def test_hand_computed_stripes():
    """Columns of -1 and 1 in turn: horizontal neighbours opposite, vertical ones equal."""
    x = torch.tensor([-1.0, 1.0]).repeat(4).expand(1, 1, 8, 8).double()
    found = gaussianity(x)
    assert found["mean"].item() == 0 and found["std"].item() == 1
    assert found["kurtosis"].item() == -2
    assert found["neighbours"].item() == 0
    smooth = torch.repeat_interleave(x, 2, -1)
    # Of 15 horizontal pairs 8 are equal and 7 opposite.
    assert gaussianity(smooth)["neighbours"].item() == pytest.approx((1 / 15 + 1) / 2)


def test_images_are_measured_one_by_one():
    x = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(1)).double()
    for name, values in gaussianity(x).items():
        alone = torch.cat([gaussianity(x[k : k + 1])[name] for k in range(3)])
        torch.testing.assert_close(values, alone, rtol=0, atol=1e-12)


def test_refuses_what_has_no_neighbours():
    with pytest.raises(RetourError, match="2 x 2 or larger"):
        gaussianity(torch.zeros(1, 4, 1, 8))
