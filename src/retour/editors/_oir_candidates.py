r"""Candidates of several inversion depths, made together.

The candidate of depth j goes down from the j-th least noisy state. Two orders of the same work,
T(T+1)/2 steps for all T depths:

- ``join``: the deepest starts; each other joins the batch as the walk reaches its depth. T calls
  over any solver, with whatever the inverter adds on its way back.
- ``refill`` (the published one): T/2 rows; row m (from 0) first runs depth m+1, and when that is
  done depth T-m, so that all rows end after T+1 calls. Its rows are at different times in one call,
  so it knows DDIM's step only, and nothing that an inverter adds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.model import Condition
from ..core.path import levels
from ..core.state import State
from ..errors import RetourError
from ..solvers.ddim import DDIM
from ._oir_way import Way, split, together


@dataclass(frozen=True)
class Candidates:
    """What the depths of one prompt lead to.

    Attributes:
        ends: depth -> clean latents (1, C, h, w).
        halfway: depth -> its state at the level that was asked for, where it came by.
    """

    ends: Mapping[int, Tensor]
    halfway: Mapping[int, State]

    def __or__(self, other: Candidates) -> Candidates:
        return Candidates({**self.ends, **other.ends}, {**self.halfway, **other.halfway})


def join(
    way: Way, condition: Condition, depths: Sequence[int], *, keep_at: int = 0, batch: int = 25
) -> Candidates:
    """Walk candidates down together, at most `batch` of them at once."""
    found = Candidates({}, {})
    order = sorted(depths, reverse=True)
    for start in range(0, len(order), batch):
        found |= _join(way, condition, order[start : start + batch], keep_at)
    return found


def _join(way: Way, condition: Condition, depths: Sequence[int], keep_at: int) -> Candidates:
    stops = sorted({*depths, *(k for k in (keep_at, 0) if k < depths[0])}, reverse=True)
    state, running = way.at(depths[0]), [depths[0]]
    halfway: dict[int, State] = {}
    for level, below in zip(stops, stops[1:], strict=False):
        if level == keep_at < depths[0]:
            halfway = dict(zip(running, map(way.kept, split(state)), strict=True))
        if level in depths[1:]:
            state, begin = _arrive(way, condition, state, running, level)
            running.append(level)
        else:
            begin = level
        if begin > below:
            state = way.down(state, condition, _names(running), begin, below)
    ends = {depth: row.x for depth, row in zip(running, split(state), strict=True)}
    return Candidates(ends, halfway)


def _arrive(
    way: Way, condition: Condition, state: State, running: Sequence[int], depth: int
) -> tuple[State, int]:
    """Add a candidate to those that came down to its depth; return all, and where they are now."""
    fresh = way.at(depth)
    if state.memory.keys() != fresh.memory.keys():
        # A solver that remembers its last step: the newcomer takes its first one alone.
        state = way.down(state, condition, _names(running), depth, depth - 1)
        fresh = way.down(fresh, condition, _names([depth]), depth, depth - 1)
        depth -= 1
    return together([state, fresh]), depth


def _names(depths: Sequence[int]) -> list[str]:
    return [f"depth{depth}" for depth in depths]


def refill_table(depths: int) -> list[list[int]]:
    """The interval (0: the least noisy) that each row crosses at each call, for all depths.

    An odd number of depths leaves the last row free once its only candidate is done.
    """
    return [
        [*range(row, -1, -1), *(range(depths - row - 1, -1, -1) if 2 * row + 1 < depths else ())]
        for row in range((depths + 1) // 2)
    ]


def refill(way: Way, condition: Condition, *, keep_at: int = 0) -> Candidates:
    """Walk the candidates of all depths down, each row taking a second one when it is free.

    Raises:
        RetourError: the inverter's solver is not DDIM.
    """
    if not isinstance(way.replay.solver, DDIM) or way.replay.source_branch:
        raise RetourError(
            f"schedule 'refill' takes DDIM steps, and {way.inversion.method!r} comes back with "
            f"{type(way.replay.solver).__name__}: use schedule 'join'"
        )
    table = refill_table(way.steps)
    runs = [[m + 1, way.steps - m] for m in range(len(table))]
    x = torch.cat([way.at(run[0]).x for run in runs])
    ends: dict[int, Tensor] = {}
    halfway: dict[int, State] = {}
    for call in range(way.steps + 1):
        live = [m for m, row in enumerate(table) if call < len(row)]
        crossed = [table[m][call] for m in live]
        x[live] = _ddim(way, condition, x[live], crossed)
        for m, level in zip(live, crossed, strict=True):
            row = x[m : m + 1].clone()
            if level == keep_at:
                halfway[runs[m][0]] = State(row)
            if level == 0:
                ends[runs[m].pop(0)] = row
                if call + 1 < len(table[m]):
                    x[m] = way.at(runs[m][0]).x[0]
    return Candidates(ends, halfway)


def _ddim(way: Way, condition: Condition, x: Tensor, crossed: Sequence[int]) -> Tensor:
    """DDIM's step of rows that cross different intervals, in one call."""
    times = torch.tensor(way.inversion.grid.times, dtype=torch.float64)
    index = torch.tensor(crossed)
    net = way.denoiser(condition, [f"row{k}" for k in range(len(x))])
    prediction = net(x, times[index + 1])
    alpha, sigma = levels(way.model.path, times[index], x)
    return alpha * prediction.x0 + sigma * prediction.eps
