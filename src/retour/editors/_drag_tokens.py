"""Latents as tokens, and tokens filled in from their neighbours."""

from __future__ import annotations

import torch
from torch import Tensor

_CELLS, _GRID = (-4, -2, -5, -3, -1), (-5, -4, -3, -2, -1)


def to_tokens(z: Tensor, patch: int) -> Tensor:
    """Latents (..., C, h, w) -> tokens (..., N, C patch^2), row by row."""
    cells = z.unflatten(-2, (-1, patch)).unflatten(-1, (-1, patch))
    return cells.movedim(_CELLS, _GRID).flatten(-3).flatten(-3, -2)


def from_tokens(tokens: Tensor, patch: int, size: tuple[int, int]) -> Tensor:
    """Inverse of :func:`to_tokens` for a grid of `size` tokens."""
    cells = tokens.unflatten(-2, size).unflatten(-1, (-1, patch, patch))
    return cells.movedim(_GRID, _CELLS).flatten(-4, -3).flatten(-2)


def from_neighbours(tokens: Tensor, empty: Tensor, size: tuple[int, int]) -> Tensor:
    """Fill empty tokens from the nearest others in the four directions, nearer ones counting more.

    Args:
        tokens: (N, D).
        empty: (N,) bool; by place, not by value.
        size: (h, w).
    """
    total, share = torch.zeros_like(tokens), tokens.new_zeros(len(tokens), 1)
    places = torch.arange(len(tokens)).reshape(size)
    for axis in (0, 1):
        for flip in (False, True):
            nearest, distance = _nearest(~empty.reshape(size), axis, flip)
            found = nearest.flatten() >= 0
            index = (places.gather(axis, nearest.clamp_min(0))).flatten()
            weight = torch.where(found, 1 / distance.flatten().clamp_min(1), 0.0).to(tokens)
            total += weight[:, None] * tokens[index]
            share += weight[:, None]
    # An empty picture has nothing to be filled from: it stays as it is.
    filled = torch.where(share > 0, total / share.clamp_min(1e-12), tokens)
    return torch.where(empty[:, None], filled, tokens)


def _nearest(full: Tensor, axis: int, flip: bool) -> tuple[Tensor, Tensor]:
    """Index along `axis` of the nearest full place at or before each, -1 for none; distances."""
    area = full.flip(axis) if flip else full
    shape = [1, 1]
    shape[axis] = -1
    along = torch.arange(full.shape[axis]).reshape(shape).expand_as(area)
    last = torch.where(area, along, -1).cummax(axis).values
    distance = (along - last).double()
    if not flip:
        return last, distance
    mirrored = torch.where(last >= 0, full.shape[axis] - 1 - last, -1)
    return mirrored.flip(axis), distance.flip(axis)
