"""Intervals of means, and of differences between methods measured on the same items.

The bootstrap resamples items with replacement and reads the percentiles of the resampled means.
Comparing two methods, the *differences* per item are resampled: what makes an item hard for
both cancels.

Reference: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import RetourError

RESAMPLES = 10_000
CONFIDENCE = 0.95
_CHUNK = 1_000
_ROWS = 1_024


@dataclass(frozen=True)
class Interval:
    """A mean and where it may lie.

    Attributes:
        mean: of the values that are numbers; NaN without any.
        low: lower end; NaN where it cannot be told (one value, or infinite ones).
        high: upper end.
        count: number of values behind it.
    """

    mean: float
    low: float
    high: float
    count: int

    @property
    def apart(self) -> bool:
        """Whether zero lies outside."""
        return self.low > 0 or self.high < 0


def mean_interval(
    values: Sequence[float] | np.ndarray,
    *,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Mean of values, NaN left out, with its percentile bootstrap interval."""
    tails = _tails(confidence)
    kept = np.asarray(values, np.float64)
    kept = kept[~np.isnan(kept)]
    if not kept.size:
        return Interval(np.nan, np.nan, np.nan, 0)
    mean = float(kept.mean())
    if kept.size == 1 or not np.isfinite(kept).all():
        return Interval(mean, np.nan, np.nan, kept.size)
    low, high = np.quantile(_means(kept, resamples, seed), tails)
    return Interval(mean, float(low), float(high), kept.size)


def _tails(confidence: float) -> list[float]:
    if not 0 < confidence < 1:
        raise RetourError(f"confidence is {confidence}: choose a number between 0 and 1")
    return [(1 - confidence) / 2, (1 + confidence) / 2]


def mean_intervals(
    table: np.ndarray,
    *,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[Interval]:
    """`mean_interval` of every row of a table (rows, items), far faster than one by one.

    Rows with the same number of values share their resamples, as they would one by one; here each
    resample is a row of weights, so that all means come from one product.
    """
    tails, table = _tails(confidence), np.asarray(table, np.float64)
    options = {"confidence": confidence, "resamples": resamples, "seed": seed}
    alike: dict[int, list[int]] = {}
    found: dict[int, Interval] = {}
    for k, row in enumerate(table):
        kept = row[~np.isnan(row)]
        if kept.size > 1 and np.isfinite(kept).all():
            alike.setdefault(kept.size, []).append(k)
        else:
            found[k] = mean_interval(kept, **options)  # type: ignore[arg-type]
    for size, rows in alike.items():
        for start in range(0, len(rows), _ROWS):
            some = rows[start : start + _ROWS]
            kept = np.stack([table[k][~np.isnan(table[k])] for k in some])
            lows, highs = _quantiles(_all_means(kept, resamples, seed), tails)
            for k, values, low, high in zip(some, kept, lows, highs, strict=True):
                found[k] = Interval(float(values.mean()), float(low), float(high), size)
    return [found[k] for k in range(len(table))]


def _all_means(table: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Resampled means of rows (rows, items) without gaps, as `_means` draws: (rows, resamples)."""
    rng = np.random.default_rng(seed)
    means, size = np.empty((len(table), resamples)), table.shape[1]
    for start in range(0, resamples, _CHUNK):
        draws = rng.integers(size, size=(min(_CHUNK, resamples - start), size))
        flat = (draws + size * np.arange(len(draws))[:, None]).ravel()
        counts = np.bincount(flat, minlength=len(draws) * size).reshape(len(draws), size)
        means[:, start : start + len(draws)] = table @ (counts / size).T
    return means


def _quantiles(values: np.ndarray, levels: list[float]) -> list[np.ndarray]:
    """Quantiles of each row, interpolated as NumPy's, which are slower; sorts `values`."""
    values.sort(axis=1)
    last = values.shape[1] - 1
    found = []
    for level in levels:
        below = min(int(level * last), max(last - 1, 0))
        above = min(below + 1, last)
        share = level * last - below
        found.append(values[:, below] + share * (values[:, above] - values[:, below]))
    return found


def _means(values: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    sizes = [min(_CHUNK, resamples - start) for start in range(0, resamples, _CHUNK)]
    draws = (rng.integers(values.size, size=(size, values.size)) for size in sizes)
    return np.concatenate([values[draw].mean(1) for draw in draws])


def paired_difference(
    first: Sequence[float] | np.ndarray, second: Sequence[float] | np.ndarray, **options: float
) -> Interval:
    """Mean of `first - second`, item by item, with its interval; options as `mean_interval`'s.

    Items without a finite difference are left out (`count` tells).

    Raises:
        RetourError: the two were not measured on the same number of items.
    """
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if a.shape != b.shape:
        raise RetourError(f"cannot pair {a.size} values with {b.size}: measure the same items")
    with np.errstate(invalid="ignore"):
        gaps = a - b
    return mean_interval(gaps[np.isfinite(gaps)], **options)  # type: ignore[arg-type]
