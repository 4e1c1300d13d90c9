"""Borders and kernels of linear degradations, against what they mean."""

import math

import pytest
import torch

from retour.restorers._matrices import border_matrix, line_kernel


@pytest.mark.parametrize("angle", [0.0, 45.0, 90.0, 200.0])
def test_line_kernel(angle):
    kernel = line_kernel(9.0, angle)
    assert float(kernel.sum()) == pytest.approx(1) and bool((kernel >= 0).all())
    torch.testing.assert_close(kernel, kernel.flip(0, 1))  # centred: nothing moves
    rows, columns = torch.meshgrid(torch.arange(-4.0, 5), torch.arange(-4.0, 5), indexing="ij")
    turn = math.radians(angle)
    along = columns * math.cos(turn) - rows * math.sin(turn)
    spread = float((kernel * along**2).sum().sqrt())
    assert spread == pytest.approx(8 / math.sqrt(12), rel=0.1)


def test_borders():
    signal = torch.arange(1.0, 4).double()
    wanted = {
        "reflect": [3, 3, 2, 1, 1, 2, 3, 3, 2, 1, 1],
        "zero": [0, 0, 0, 0, 1, 2, 3, 0, 0, 0, 0],
        "circular": [3, 1, 2, 3, 1, 2, 3, 1, 2, 3, 1],
    }
    for boundary, values in wanted.items():
        assert (border_matrix(3, 4, boundary) @ signal).tolist() == values
