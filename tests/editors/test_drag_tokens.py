"""Latents as tokens, and holes filled from around them."""

import pytest
import torch

from retour.editors._drag_tokens import from_neighbours, from_tokens, to_tokens


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_tokens_there_and_back(patch):
    z = torch.randn(2, 3, 8, 12)
    tokens = to_tokens(z, patch)
    assert tokens.shape == (2, 8 * 12 // patch**2, 3 * patch**2)
    assert torch.equal(from_tokens(tokens, patch, (8 // patch, 12 // patch)), z)


def test_a_token_is_its_patch():
    z = torch.arange(4 * 6).reshape(1, 1, 4, 6)
    tokens = to_tokens(z, 2)[0]
    assert tokens[0].tolist() == [0, 1, 6, 7]  # first row of patches, first patch
    assert tokens[1].tolist() == [2, 3, 8, 9]
    assert tokens[3].tolist() == [12, 13, 18, 19]


def test_neighbours_fill_by_place_and_not_by_value():
    """Real zeros are values: published code takes them for holes."""
    tokens = torch.zeros(9, 1, dtype=torch.float64)
    tokens[[1, 3, 5, 7]] = torch.tensor([[0.0], [4.0], [8.0], [12.0]]).double()
    empty = torch.zeros(9, dtype=torch.bool)
    empty[4] = True
    found = from_neighbours(tokens, empty, (3, 3))
    assert float(found[4]) == 6.0  # the mean of 0, 4, 8, 12: the zero counts
    assert torch.equal(found[~empty], tokens[~empty])


def test_nearer_neighbours_count_more():
    row = torch.tensor([[1.0], [0.0], [0.0], [4.0]]).double()
    empty = torch.tensor([False, True, True, False])
    found = from_neighbours(row, empty, (1, 4)).flatten()
    # Weights 1 and 1/2 over distances 1 and 2, from both sides.
    torch.testing.assert_close(found[1:3], torch.tensor([2.0, 3.0]).double())
    nothing = from_neighbours(row, torch.ones(4, dtype=torch.bool), (1, 4))
    assert torch.equal(nothing, row)
