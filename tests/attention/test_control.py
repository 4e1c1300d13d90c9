"""What a control is told of an attention: its tokens' grid, and how coarse it is."""

import pytest
import torch

from retour.attention.control import AttentionCall, token_grid
from retour.core.branches import Rows
from retour.core.model import AttentionSite
from retour.errors import RetourError


@pytest.mark.parametrize("height, width", [(8, 8), (8, 12), (64, 96), (9, 12), (65, 33), (7, 10)])
def test_token_grids_follow_the_latents(height, width):
    h, w = height, width
    while min(h, w) > 2:
        assert token_grid(h * w, height, width) == (h, w)
        h, w = (h + 1) // 2, (w + 1) // 2


@pytest.mark.parametrize(
    "latent, tokens, factor, coarse",
    [
        ((64, 64), (64, 64), 1, False),
        ((64, 64), (32, 32), 2, True),
        ((64, 96), (8, 12), 8, True),
        ((65, 33), (33, 17), 2, True),
        ((16, 16), (8, 8), 2, True),
    ],
)
def test_resolutions_are_relative_to_the_latents(latent, tokens, factor, coarse):
    def at(place):
        site = AttentionSite("x", torch.nn.Identity(), "self", place, 0, 0.0)
        image = slice(0, tokens[0] * tokens[1])
        return AttentionCall(site, None, 0.5, Rows(), image, None, latent, 1)

    assert at("up").factor == factor and at("up").grid == tokens
    assert at("up").within(0.5) is coarse
    assert at("up").within(1.0) and at("block").within(0.5)
    assert not at("up").within(0.1)


def test_tokens_that_fit_no_grid_are_refused():
    with pytest.raises(RetourError, match="17 image tokens"):
        token_grid(17, 8, 8)
