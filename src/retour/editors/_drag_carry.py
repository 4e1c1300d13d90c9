r"""An inverted trajectory on which what is dragged stands at its new place from the start.

Every state of the source is :math:`z_t = \alpha_t z_0 + \sigma_t \epsilon_t`, with its clean
latents and an :math:`\epsilon_t` of its own. The map of the latents' cells (:mod:`._drag_map`) puts
both together anew: clean latents are read between cells, bilinearly, and filled in from around
where something was taken away; of the noise, which interpolation would weaken, whole cells are
taken, and where something grows its cells share theirs so that it stays white (copies would add up
to patches of wrong colours). So

- the last state is the moved noise of the drag's start;
- a branch that stands on this trajectory has, in every attention layer, what is dragged at its new
  place: told of that place and no other, by positions of whatever kind, and cut into tokens as the
  model would cut it. A map between tokens can do neither where positions are added to tokens, nor
  for moves by parts of a token or for other sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ..core.path import Path, Time, levels
from ._drag_map import DragMap
from ._drag_tokens import from_neighbours, from_tokens, to_tokens

Fill = Literal["noise", "around", "neighbours"]
Gaps = Literal["noise", "copy", "share"]


def carried(
    states: Tensor,
    clean: Tensor,
    times: Sequence[Time],
    path: Path,
    maps: Sequence[DragMap],
    noise: Tensor,
    *,
    fill: Fill = "noise",
    gaps: Gaps = "noise",
    renew: float = 0.0,
    seed: int = 0,
) -> Tensor:
    """States with everything where the maps put it.

    Args:
        states: (K, B, C, h, w).
        clean: (B, C, h, w), the data.
        times: of the states, K.
        path: of the model.
        maps: of the B images' h w cells.
        noise: (C, h, w), fresh.
        fill: noise of vacated places: fresh; or the picture's own, of background cells chosen at
            random (`around`); or what `neighbours` interpolate, which is weak.
        gaps: noise of the cells between those of a magnified object: fresh; or a `copy` of the
            nearest one's, which neighbours then have in common; or a `share` of it, white again.
        renew: share of fresh noise in what moved, whose variance stays.
        seed: of the choice of background cells.
    """
    alpha, sigma = levels(path, torch.as_tensor(list(times), dtype=states.dtype), states)
    rows = []
    fresh = to_tokens(noise, 1)
    for image, m in enumerate(maps):
        still, z = to_tokens(clean[image], 1), to_tokens(states[:, image], 1)
        a, s = alpha[:, 0, 0, 0, 0, None, None], sigma[:, 0, 0, 0, 0, None, None]
        own = torch.where(s > 0, (z - a * still) / s.clamp_min(1e-12), 0.0)
        taken = own[:, m.source]
        if gaps == "share":
            taken = shared(taken, fresh, m)
        elif gaps == "noise":
            taken = torch.where(m.gap[:, None], fresh, taken)
        mixed = (1 - renew**2) ** 0.5 * taken + renew * fresh
        taken = torch.where(m.destination[:, None], mixed, taken)
        holes = _holes(taken, own, fresh, m, fill, seed)
        taken = torch.where(m.vacated[:, None], holes, taken)
        content = torch.where(m.destination[:, None], between(still, m.origin, m.size), still)
        around = from_neighbours(still, m.vacated | m.destination, m.size)
        content = torch.where(m.vacated[:, None], around, content)
        rows.append(from_tokens(a * content + s * taken, 1, m.size))
    return torch.stack(rows, 1)


def shared(taken: Tensor, fresh: Tensor, m: DragMap) -> Tensor:
    r"""Noise (K, N, C) of which n cells that have one origin take a part each.

    With the origin's noise e and fresh f_k each gets :math:`e / \sqrt n + f_k - \bar f`: variance
    1 and no correlation, while the sum of all n is e's, scaled. One cell alone gets e.
    """
    group = torch.where(m.destination, m.source, len(m.source) + torch.arange(len(m.source)))
    _, group, count = group.unique(return_inverse=True, return_counts=True)
    mean = torch.zeros(len(count), fresh.shape[1]).to(fresh).index_add_(0, group, fresh)
    mean = mean / count[:, None]
    return taken / count[group, None] ** 0.5 + (fresh - mean[group])


def _holes(taken: Tensor, own: Tensor, fresh: Tensor, m: DragMap, fill: Fill, seed: int) -> Tensor:
    """Noise (K, N, C) for vacated places."""
    if fill == "neighbours":
        flat = taken.movedim(0, 1).flatten(1)
        filled = from_neighbours(flat, m.vacated, m.size)
        return filled.unflatten(1, (len(taken), -1)).movedim(1, 0)
    untouched = (~(m.vacated | m.destination)).nonzero().flatten()
    if fill == "noise" or not len(untouched):
        return fresh.expand_as(taken)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(untouched), (own.shape[1],), generator=generator)
    return own[:, untouched[drawn]]


def between(cells: Tensor, places: Tensor, size: tuple[int, int]) -> Tensor:
    """Read cells (N, D) at fractional places (m, 2), bilinearly; the border goes on beyond."""
    low = places.floor()
    part = (places - low).to(cells)
    total = torch.zeros(len(places), cells.shape[1]).to(cells)
    for down in (0, 1):
        for right in (0, 1):
            row = (low[:, 0] + down).clamp(0, size[0] - 1).long()
            column = (low[:, 1] + right).clamp(0, size[1] - 1).long()
            share = (part[:, 0] if down else 1 - part[:, 0]) * (
                part[:, 1] if right else 1 - part[:, 1]
            )
            total += share[:, None] * cells[row * size[1] + column]
    return total
