"""The time grid that a run walks, owned by retour: never `t - 1000 // T`, never a scheduler's own.

A grid holds N+1 times from clean (index 0) to noisy (index N). Inversion walks it upwards,
generation downwards, over the *same* N intervals: interval `k` always joins times `k` and `k+1`,
whichever way it is crossed, so anything keyed by the interval (parity, noise maps, embeddings,
shared features) matches in both directions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..errors import RetourError
from .path import Path


@dataclass(frozen=True)
class Step:
    """One crossing of interval `index` from time `t` to time `s`.

    `position` counts crossings from the noisy end (0 is the noisiest interval), as generation does.
    """

    index: int
    count: int
    t: float
    s: float
    down: bool

    @property
    def position(self) -> int:
        """Index of this interval counted from the noisy end of the walked grid."""
        return self.count - 1 - self.index

    @property
    def passed(self) -> float:
        """Part of a generation's steps that lie behind, 0 at the noisiest."""
        return self.position / self.count

    @property
    def departure(self) -> int:
        """Index among the grid's times of the one that it leaves."""
        return self.index + 1 if self.down else self.index

    @property
    def arrival(self) -> int:
        """Index among the grid's times of the one that it comes to."""
        return self.index if self.down else self.index + 1

    @property
    def noisy(self) -> float:
        """The noisier end of the interval: where generation queries the network."""
        return self.t if self.down else self.s

    @property
    def clean(self) -> float:
        """The cleaner end of the interval."""
        return self.s if self.down else self.t


@dataclass(frozen=True)
class Grid:
    """N+1 times, clean first."""

    times: tuple[float, ...]

    def __post_init__(self) -> None:
        pairs = zip(self.times, self.times[1:], strict=False)
        increasing = all(a < b for a, b in pairs) and all(map(math.isfinite, self.times))
        if len(self.times) < 2 or not increasing:
            raise RetourError(
                f"a time grid needs at least two increasing finite times, got {self.times!r}"
            )

    @property
    def steps(self) -> int:
        """Number of intervals."""
        return len(self.times) - 1

    def walk(self, *, down: bool, between: tuple[int, int] | None = None) -> Iterator[Step]:
        """Yield the steps of generation (`down`) or of inversion.

        `between` picks the part from one index of `times` to another, (lower, higher); steps keep
        the numbers that they have in the whole walk.
        """
        order = range(*((0, self.steps) if between is None else between))
        for k in reversed(order) if down else order:
            low, high = self.times[k], self.times[k + 1]
            yield Step(k, self.steps, high if down else low, low if down else high, down)

    def truncate(self, strength: float) -> Grid:
        """Keep the `int(N * strength)` cleanest intervals (SDEdit's and EDICT's strength)."""
        if not 0 < strength <= 1:
            raise RetourError(f"strength must be above 0 and at most 1, got {strength}")
        keep = max(1, part_of(strength, self.steps))
        return Grid(self.times[: keep + 1])


def part_of(fraction: float, whole: int) -> int:
    """How many steps (or layers) that fraction of them is, rounded down."""
    return int(round(fraction * whole, 9))


def check_steps(steps: int, limit: int | None = None) -> int:
    """Refuse step counts below 1 or above the number of trained levels."""
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise RetourError(f"steps must be a whole number of at least 1, got {steps!r}")
    if limit is not None and steps > limit:
        raise RetourError(f"steps must be at most the model's {limit} training steps, got {steps}")
    return steps


def discrete_grid(
    steps: int, train_steps: int, *, spacing: str = "leading", offset: int = 0, final: float = 0.0
) -> Grid:
    """Return the grid that a discrete scheduler of these settings would walk.

    Args:
        steps: number of intervals N.
        train_steps: number of trained levels T.
        spacing: ``leading`` (`k * (T // N) + offset`), ``trailing`` or ``linspace``.
        offset: added to leading times.
        final: the clean end: 0 (``set_alpha_to_one=False``) or -1 (exactly clean).
    """
    check_steps(steps, train_steps)
    if spacing == "leading":
        ratio = train_steps // steps
        # Where every level is asked for (N = T) the offset would leave the table.
        offset = min(offset, train_steps - 1 - ratio * (steps - 1))
        times = [k * ratio + offset for k in range(steps)]
    elif spacing == "trailing":
        times = [round(train_steps - train_steps / steps * k) - 1 for k in range(steps)][::-1]
    elif spacing == "linspace":
        gaps = torch.linspace(0, train_steps - 1, steps, dtype=torch.float64)
        times = [int(t) for t in gaps.round()]
    else:
        raise RetourError(
            f"unknown timestep spacing {spacing!r}: use leading, trailing or linspace"
        )
    if times[0] <= final:
        # The scheduler's last step goes from this level to itself: a null step, dropped here.
        final, times = (float(times[0]), times[1:]) if steps > 1 else (-1.0, times)
    return Grid((float(final), *[min(float(t), train_steps - 1.0) for t in times]))


def shift(sigma: float, factor: float) -> float:
    r"""Resolution shift of a flow time, :math:`s' = k s / (1 + (k-1) s)`."""
    return factor * sigma / (factor * sigma + (1 - sigma))  # written so that 1 stays exactly 1


def flow_grid(steps: int, factor: float = 1.0) -> Grid:
    r"""Uniform flow times :math:`k/N`, shifted once by `factor` (SD3: 3; FLUX: :math:`e^\mu`)."""
    check_steps(steps)
    return Grid(tuple(shift(k / steps, factor) for k in range(steps + 1)))


def lambda_grid(path: Path, steps: int, t_clean: float, t_noise: float) -> Grid:
    """Grid of uniform half log-SNR between two times (for order tests and DPM-type solvers)."""
    check_steps(steps)
    lams = torch.linspace(
        float(path.lam(t_clean)), float(path.lam(t_noise)), steps + 1, dtype=torch.float64
    )
    inner = path.time(lams[1:-1]).tolist()
    return Grid((t_clean, *inner, t_noise))
