r"""The choice among candidates: the object takes its phrase, and the rest keeps its look.

With :math:`I_j` the decoded candidate of depth j, :math:`I_0` the decoded source and m the mask,

.. math::
    S_e(j) = \cos(\mathrm{text}(e), \mathrm{image}(I_j; m)), \qquad
    S_n(j) = -\,\mathrm{mean}\,((1 - m)(I_0 - I_j))^2

(the mean is over all pixels, on the scale [-1, 1]), and the best depth has the largest sum of both,
each brought to [0, 1] over the candidates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.model import Condition
from ._oir_candidates import Candidates, join, refill
from ._oir_clip import Scorer
from ._oir_way import Way

DECODED = 32


@dataclass(frozen=True)
class Choice:
    """The best depth for one object.

    Attributes:
        depth: j, from 1.
        candidates: what the depths tried lead to.
        scores: depth -> (fit of the phrase inside the mask, minus the change outside of it).
    """

    depth: int
    candidates: Candidates
    scores: Mapping[int, tuple[float, float]]


def best(scores: Mapping[int, tuple[float, float]]) -> int:
    """The depth with the largest sum of both scores, each brought to [0, 1]; the first of equals.

    A score that is the same everywhere counts for nothing.
    """
    depths = sorted(scores)
    both = [_unit([scores[d][k] for d in depths]) for k in (0, 1)]
    sums = [fit + kept for fit, kept in zip(*both, strict=True)]
    return depths[max(range(len(depths)), key=lambda i: sums[i])]


def _unit(values: Sequence[float]) -> list[float]:
    low, high = min(values), max(values)
    return [(v - low) / (high - low) if high > low else 0.0 for v in values]


def coarse_depths(steps: int, every: int) -> list[int]:
    """The deepest, each `every`-th below it, and 1."""
    return sorted({1, *range(steps, 0, -every)})


def near_depths(depth: int, steps: int, every: int) -> list[int]:
    """Depths less than `every` away from one."""
    return list(range(max(1, depth - every + 1), min(steps, depth + every - 1) + 1))


def search(
    way: Way,
    condition: Condition,
    phrase: str,
    mask: Tensor,
    picture: Tensor,
    scorer: Scorer,
    *,
    every: int = 1,
    keep_at: int = 0,
    batch: int = 25,
    schedule: str = "join",
    unedited_first: bool = True,
) -> Choice:
    """Find the depth at which an object takes its phrase and the rest keeps its look.

    Args:
        way: the image's way back.
        condition: the prompt with this object changed.
        phrase: what the object shall be.
        mask: where it is, (H, W) bool at the picture's size.
        picture: the source as the model decodes it, (3, H, W) in [-1, 1].
        scorer: how well pictures fit a phrase inside a mask.
        every: try each so manyth depth first, then all around the best of them.
        keep_at: level at which the candidates' states are kept.
        batch: candidates carried at once.
        schedule: `join` or `refill` (all depths).
        unedited_first: take the source itself for the candidate of depth 1.
    """
    judge = _Judge(way, phrase, mask, picture, scorer, unedited_first)
    if schedule == "refill":
        found = refill(way, condition, keep_at=keep_at)
        return Choice(best(scores := judge(found)), judge.replaced(found), scores)
    depths = coarse_depths(way.steps, every)
    found = join(way, condition, depths, keep_at=keep_at, batch=batch)
    scores = judge(found)
    more = [d for d in near_depths(best(scores), way.steps, every) if d not in scores]
    if more:
        further = join(way, condition, more, keep_at=keep_at, batch=batch)
        scores, found = scores | judge(further), found | further
    return Choice(best(scores), judge.replaced(found), scores)


class _Judge:
    """Scores candidates against the source."""

    def __init__(
        self,
        way: Way,
        phrase: str,
        mask: Tensor,
        picture: Tensor,
        scorer: Scorer,
        unedited_first: bool,
    ):
        self.way, self.phrase, self.mask, self.scorer = way, phrase, mask, scorer
        self.unedited = way.at(0).x if unedited_first else None
        self.source = picture.clamp(-1, 1)

    def __call__(self, found: Candidates) -> dict[int, tuple[float, float]]:
        ends = self.replaced(found).ends
        scores: dict[int, tuple[float, float]] = {}
        for depths in torch.tensor(sorted(ends)).split(DECODED):
            pictures = self.way.model.decode(torch.cat([ends[d] for d in depths.tolist()])).cpu()
            pictures = pictures.clamp(-1, 1)
            fit = self.scorer(pictures, self.phrase, self.mask.float())
            change = ((pictures - self.source) * ~self.mask).square().mean((1, 2, 3))
            pairs = zip(fit.tolist(), (-change).tolist(), strict=True)
            scores |= dict(zip(depths.tolist(), pairs, strict=True))
        return scores

    def replaced(self, found: Candidates) -> Candidates:
        """With the source in place of the shallowest candidate, if so asked."""
        if self.unedited is None or 1 not in found.ends:
            return found
        return Candidates({**found.ends, 1: self.unedited}, found.halfway)
