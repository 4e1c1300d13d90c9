r"""Where everything goes when some points are dragged: an explicit map between image tokens.

The picture is a grid of tokens; positions are (row, column) in token units throughout, and
:math:`P` is the set of tokens that may be edited.

*Displacements.* Drag :math:`i` takes handle :math:`s_i` to :math:`e_i`, :math:`d_i = e_i - s_i`. In
mode ``move`` everything goes along, scaled by :math:`r` about the handle: :math:`v^i(p) = d_i +
(r_i - 1)(p - s_i)`. In mode ``drag`` the picture is elastic: :math:`v^i(p) = \lambda d_i`, where
:math:`\lambda` falls linearly from 1 at the handle to 0 on the circle around the bounding
rectangle of :math:`P`, along the ray from the handle through :math:`p`. Every token obeys its
nearest handle alone ("winner takes all"), with weight :math:`\alpha(p) = 1 / |p - s_{i^*}|`;
``average`` weighs all handles, as FastDrag does, so that opposite drags cancel between them.

*Map.* Token :math:`p` lands on :math:`\operatorname{round}(p + v)`, kept on the grid; of several
that land together the one with the largest :math:`\alpha` wins. :math:`M(x)` is who landed on
:math:`x`, :math:`A(x) = \min(1, \alpha)`. A magnified object leaves gaps between its landing
places, which we give to the nearest of its tokens (the paper does not say).

*Regions*, disjoint: destinations :math:`P^*`; what was vacated (in :math:`P`, not in :math:`P^*`);
a transition band around both; the background, all the rest.

*Between places.* What stands on :math:`x` came from :math:`p + r^{-1}(x - p - v(p))`, :math:`p =
M(x)`: the winner's place, and by how much its landing was rounded (:math:`r = 1` in mode ``drag``).

Reference: Yin et al., "LazyDrag: Enabling Stable Drag-Based Editing on Multi-Modal Diffusion
Transformers via Explicit Correspondence", ICLR 2026, arXiv 2509.12203.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import RetourError
from ._drag_tokens import to_tokens
from ._drags import Mode, Pull

Field = Literal["nearest", "average"]


@dataclass(frozen=True)
class DragMap:
    """Correspondence between N = h w tokens, row by row.

    Attributes:
        size: (h, w).
        source: (N,) long: M(x) at destinations, x itself elsewhere.
        weight: (N,) float64: A(x) at destinations, 0 elsewhere.
        destination: (N,) bool: where something landed.
        vacated: (N,) bool: what was left, and nothing landed on.
        transition: (N,) bool: a band around both.
        background: (N,) bool: the rest.
        gap: (N,) bool: destinations between the landing places of a magnified object.
        origin: (N, 2) float64: (row, column) where what stands at destinations came from, before
            rounding; their own place elsewhere.
    """

    size: tuple[int, int]
    source: Tensor
    weight: Tensor
    destination: Tensor
    vacated: Tensor
    transition: Tensor
    background: Tensor
    gap: Tensor
    origin: Tensor


def displacements(
    points: Tensor, pulls: Sequence[Pull], mode: Mode, field: Field = "nearest"
) -> tuple[Tensor, Tensor]:
    """Displacements (m, 2) of points (m, 2), and their weights alpha (m,), infinite at a handle."""
    gaps = torch.stack([points - torch.tensor(p.handle, dtype=torch.float64) for p in pulls])
    near = gaps.norm(dim=-1)
    alpha = 1 / near
    parts = torch.stack([_pulled(points, p, mode) for p in pulls])
    best = near.argmin(0)
    if field == "nearest":
        chosen = parts.gather(0, best[None, :, None].expand(1, -1, 2))[0]
    else:
        share = torch.where(near == 0, 1e12, alpha)
        chosen = (share[..., None] * parts).sum(0) / share.sum(0)[:, None]
    return chosen, alpha.gather(0, best[None])[0]


def _pulled(points: Tensor, pull: Pull, mode: Mode) -> Tensor:
    handle, shift, scale = (
        torch.tensor(v, dtype=torch.float64) for v in (pull.handle, pull.shift, pull.scale)
    )
    if mode == "move":
        return shift + (scale - 1) * (points - handle)
    return elasticity(points, handle)[:, None] * shift


def elasticity(points: Tensor, handle: Tensor) -> Tensor:
    """lambda (m,) of points (m, 2): 1 at the handle, 0 on the circle around their rectangle."""
    low, high = points.amin(0), points.amax(0)
    centre, radius = (low + high) / 2, (high - low).norm() / 2
    gap = points - handle
    far = gap.norm(dim=-1)
    ray = gap / far.clamp_min(1e-12)[:, None]
    along = ray @ (handle - centre)
    inside = along**2 - (handle - centre).square().sum() + radius**2
    reach = -along + inside.clamp_min(0).sqrt()
    part = torch.where((inside >= 0) & (reach > 0), (reach - far) / reach.clamp_min(1e-12), 0.0)
    return torch.where(far == 0, 1.0, part.clamp(0, 1))


def drag_map(
    editable: Tensor,
    pulls: Sequence[Pull],
    mode: Mode = "drag",
    *,
    field: Field = "nearest",
    band: int = 1,
) -> DragMap:
    """Map of some pulls.

    Args:
        editable: (h, w) bool, P.
        pulls: the drags; without any, everything stays where it is.
        mode: elastic, or rigid with scaling.
        field: nearest handle, or average of all.
        band: width of the transition, in tokens.
    """
    size = (int(editable.shape[0]), int(editable.shape[1]))
    if not bool(editable.any()):
        raise RetourError("the mask covers no token of the model's grid: paint a larger area")
    points = editable.nonzero().double()
    if pulls:
        shift, alpha = displacements(points, pulls, mode, field)
    else:
        shift, alpha = torch.zeros_like(points), torch.ones(len(points), dtype=torch.float64)
    landed = points + shift
    source, weight = _land(size, points, landed, alpha)
    gap = torch.zeros(len(source), dtype=torch.bool)
    if mode == "move" and any(max(p.scale) > 1 for p in pulls):
        gap = _fill_gaps(size, points, landed, alpha, pulls, source, weight)
    destination = source >= 0
    vacated = editable.flatten() & ~destination
    everywhere = torch.arange(len(source))
    source = torch.where(destination, source, everywhere)
    return _divided(
        size, source, torch.where(destination, weight.clamp(max=1.0), 0.0), destination, vacated,
        gap, _origins(size, source, destination, points, shift, pulls), band,
    )  # fmt: skip


def coarser(cells: DragMap, patch: int, band: int = 1) -> DragMap:
    """Map of tokens made of patch x patch cells, where every token stays what it is.

    For latents in which everything stands at its new place already: what is left of a map are its
    regions and weights. A token is a destination if anything landed in it, with the mean of its
    cells' weights, and vacated if something was taken from it and nothing landed there. The cells'
    distances to their handles count in tokens.
    """
    size = (cells.size[0] // patch, cells.size[1] // patch)

    def tokens(value: Tensor) -> Tensor:
        return to_tokens(value.reshape(1, *cells.size), patch)

    destination = tokens(cells.destination).any(-1)
    vacated = tokens(cells.vacated).any(-1) & ~destination
    weight = tokens((patch * cells.weight).clamp(max=1.0)).mean(-1)
    everywhere = torch.arange(size[0] * size[1])
    return _divided(
        size, everywhere, weight, destination, vacated, torch.zeros_like(destination),
        _places(size), band,
    )  # fmt: skip


def finer(tokens: DragMap, patch: int) -> DragMap:
    """The same map for the patch x patch cells of every token."""
    height, width = (n * patch for n in tokens.size)
    row, column = _places((height, width)).long().unbind(1)
    here = row // patch * tokens.size[1] + column // patch
    came = tokens.source[here]
    source = (came // tokens.size[1] * patch + row % patch) * width
    source = source + came % tokens.size[1] * patch + column % patch
    return DragMap(
        (height, width), source, tokens.weight[here], tokens.destination[here],
        tokens.vacated[here], tokens.transition[here], tokens.background[here], tokens.gap[here],
        _places((height, width))[source],
    )  # fmt: skip


def _divided(
    size: tuple[int, int],
    source: Tensor,
    weight: Tensor,
    destination: Tensor,
    vacated: Tensor,
    gap: Tensor,
    origin: Tensor,
    band: int,
) -> DragMap:
    touched = destination | vacated
    transition = _dilated(touched, size, band) & ~touched
    background = ~(touched | transition)
    return DragMap(size, source, weight, destination, vacated, transition, background, gap, origin)


def _places(size: tuple[int, int]) -> Tensor:
    return torch.cartesian_prod(*(torch.arange(n, dtype=torch.float64) for n in size))


def _origins(
    size: tuple[int, int],
    source: Tensor,
    destination: Tensor,
    points: Tensor,
    shift: Tensor,
    pulls: Sequence[Pull],
) -> Tensor:
    """Where everything came from before its landing was rounded, (N, 2)."""
    here = _places(size)
    if not pulls:
        return here
    moves = torch.zeros_like(here).index_copy(0, _flat(points.long(), size), shift)
    handles = torch.tensor([p.handle for p in pulls], dtype=torch.float64)
    scales = torch.tensor([p.scale for p in pulls], dtype=torch.float64)
    start = here[source]
    ratio = scales[torch.cdist(start, handles).argmin(1)]
    # On the border all that was pushed beyond it piles up: no further than a landing is rounded.
    reach = 0.5 * torch.maximum(1 / ratio, torch.ones_like(ratio))
    off = (here - start - moves[source]) / ratio
    origin = start + torch.minimum(torch.maximum(off, -reach), reach)
    return torch.where(destination[:, None], origin, here)


def _land(
    size: tuple[int, int], points: Tensor, landed: Tensor, alpha: Tensor
) -> tuple[Tensor, Tensor]:
    """Who lands where (N,), -1 for nobody, and with which weight."""
    limit = torch.tensor([size[0] - 1, size[1] - 1], dtype=torch.float64)
    # Half rounds up, also for negative places: a shift of 1.5 moves all alike.
    place = torch.minimum((landed + 0.5).floor().clamp_min(0), limit).long()
    index, origin = _flat(place, size), _flat(points.long(), size)
    source = torch.full((size[0] * size[1],), -1, dtype=torch.long)
    weight = torch.zeros(len(source), dtype=torch.float64)
    for k in alpha.argsort(stable=True).tolist():  # the largest is written last
        source[index[k]], weight[index[k]] = origin[k], alpha[k]
    return source, weight


def _fill_gaps(
    size: tuple[int, int],
    points: Tensor,
    landed: Tensor,
    alpha: Tensor,
    pulls: Sequence[Pull],
    source: Tensor,
    weight: Tensor,
) -> Tensor:
    """Give tokens inside a magnified object to the token that covers them; return which, (N,)."""
    handles = torch.tensor([p.handle for p in pulls], dtype=torch.float64)
    winner = torch.cdist(points, handles).argmin(1)
    half = torch.tensor([p.scale for p in pulls], dtype=torch.float64)[winner] / 2
    empty = (source < 0).nonzero().flatten()
    here = torch.stack([empty // size[1], empty % size[1]], 1).double()
    gaps = landed - here[:, None]
    over = (gaps.abs() <= half + 1e-9).all(2)
    nearest = torch.where(over, gaps.norm(dim=2), torch.inf).argmin(1)
    covered = over.any(1)
    taken = nearest[covered]
    source[empty[covered]] = _flat(points[taken].long(), size)
    weight[empty[covered]] = alpha[taken]
    return torch.zeros(len(source), dtype=torch.bool).index_fill(0, empty[covered], True)


def _flat(place: Tensor, size: tuple[int, int]) -> Tensor:
    return place[:, 0] * size[1] + place[:, 1]


def _dilated(region: Tensor, size: tuple[int, int], radius: int) -> Tensor:
    area = region.reshape(1, 1, *size).float()
    return F.max_pool2d(area, 2 * radius + 1, stride=1, padding=radius).flatten() > 0
