"""Figures of the page: means, intervals, marks and differences, as plain values.

Intervals are those of :mod:`retour.evaluate.stats`. A cost is the same for all items of a batch,
so it is no sample: it has a mean and no interval.

Marks of a column within one kind of edit, references aside: `best` is the best mean, `close`
a run whose paired difference from the best does not exclude zero.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from ..stats import Interval, mean_intervals
from .folder import COSTS, Bench

COST_TITLES = {
    "nfe_full": ("NFE", "network evaluations per image, as if nothing came from the cache"),
    "nfe": ("NFE spent", "network evaluations per image that this run spent"),
    "nfe_inversion": ("NFE inversion", "network evaluations per image of the inversion"),
    "nfe_edit": ("NFE edit", "network evaluations per image of the edit"),
    "seconds_full": ("Seconds", "seconds per image, as if nothing came from the cache"),
    "seconds": ("Seconds spent", "seconds per image that this run spent"),
    "seconds_inversion": ("Seconds inversion", "seconds per image of the inversion"),
    "seconds_edit": ("Seconds edit", "seconds per image of the edit"),
    "peak_mib": (
        "Peak MiB",
        "peak memory of inversion and edit above the start, of the GPU or the process",
    ),
}
SHOWN = (
    *("background_psnr", "background_lpips", "background_perceptual", "structure_distance"),
    *("clip_edited", "truth_distance", "edit_success", "nfe_full", "seconds_full", "peak_mib"),
)
PRESERVATION = (
    *("background_psnr", "background_ssim", "background_lpips"),
    *("background_perceptual", "structure_distance"),
)
FIDELITY = ("clip_edited", "edit_success", "clip_whole", "truth_distance")
ERRORS = ("truth_distance", "background_mse", "structure_distance")
MAX_RUNS_COMPARED = 40
SIGNIFICANT = 3
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Column:
    """One column of figures.

    Attributes:
        key: its name in the results.
        title: what heads it.
        unit: of its values; "" if they have none.
        better: ``higher``, ``lower``, or "" where neither is.
        note: what else is to know: convention, backbone.
        cost: whether it counts what a run spent.
        digits: decimals that its figures are shown with.
        shown: whether it is shown at first.
    """

    key: str
    title: str
    unit: str
    better: str
    note: str
    cost: bool
    digits: int
    shown: bool


def columns(bench: Bench) -> tuple[Column, ...]:
    """Columns of a bench: metrics, then costs."""
    metrics = [key for key in bench.values if key not in COSTS]
    metrics.sort(key=lambda key: SHOWN.index(key) if key in SHOWN else len(SHOWN))
    costs = [key for key in COSTS if key in bench.values]
    shown = set(SHOWN) & set(bench.values) or set(metrics)
    return tuple(_column(bench, key, key in shown) for key in (*metrics, *costs))


def _column(bench: Bench, key: str, shown: bool) -> Column:
    values = bench.values[key]
    digits = _digits(values)
    if key in COSTS:
        digits = 0 if (values[np.isfinite(values)] % 1 == 0).all() else digits
        title, note = COST_TITLES[key]
        return Column(key, title, "", "lower", note, True, digits, shown)
    facts = bench.facts.get(key, {})
    title, better = str(facts.get("title") or key.replace("_", " ")), facts.get("better")
    notes = (facts.get("convention"), facts.get("backbone"))
    return Column(
        key,
        title[:1].upper() + title[1:],
        spoken_unit(str(facts.get("unit") or "")),
        better if better in ("higher", "lower") else "",
        ", ".join(str(note) for note in notes if note),
        False,
        max(1, digits),
        shown,
    )


def spoken_unit(unit: str) -> str:
    """A unit as it is printed: `x 1e-3` with a raised exponent."""
    found = re.fullmatch(r"x 1e(-?\d+)", unit)
    return f"× 10{found[1].translate(_RAISED)}" if found else unit


def _digits(values: np.ndarray) -> int:
    """Decimals that give the median value `SIGNIFICANT` digits."""
    sizes = np.abs(values[np.isfinite(values) & (values != 0)])
    if not sizes.size:
        return 0
    return max(0, min(8, SIGNIFICANT - 1 - math.floor(math.log10(float(np.median(sizes))))))


def cells(bench: Bench, found: tuple[Column, ...], kind: str | None) -> list[list[dict[str, Any]]]:
    """Means of every run and column over the items of a kind; None takes all.

    Returns:
        Per run, per column: mean, low, high (None where they do not exist) and `mark`.
    """
    keep = bench.of_kind(kind)
    values = [bench.values[column.key][:, keep] for column in found]
    measured = [k for k, column in enumerate(found) if not column.cost]
    sampled = dict(zip(measured, _intervals([values[k] for k in measured]), strict=True))
    intervals = [sampled[k] if k in sampled else _means(values[k]) for k in range(len(found))]
    marks = _marks(bench, found, values, intervals)
    return [
        [{**_ends(intervals[k][run]), "mark": marks[k][run]} for k in range(len(found))]
        for run in range(len(bench.runs))
    ]


def _intervals(tables: list[np.ndarray]) -> list[list[Interval]]:
    """Intervals of the rows of several tables, in one go."""
    if not tables:
        return []
    found = iter(mean_intervals(np.concatenate(tables)))
    return [[next(found) for _ in table] for table in tables]


def _means(values: np.ndarray) -> list[Interval]:
    counts = (~np.isnan(values)).sum(1)
    sums = np.nansum(values, 1)
    return [
        Interval(total / count if count else math.nan, math.nan, math.nan, int(count))
        for total, count in zip(sums, counts, strict=True)
    ]


def _ends(interval: Interval) -> dict[str, Any]:
    return {name: json_number(getattr(interval, name)) for name in ("mean", "low", "high")}


def _marks(
    bench: Bench,
    found: tuple[Column, ...],
    values: list[np.ndarray],
    intervals: list[list[Interval]],
) -> list[list[str]]:
    """Per column, per run: ``best``, ``close`` or nothing."""
    best = [_best(bench, column, some) for column, some in zip(found, intervals, strict=True)]
    gaps = [_gaps(value, value[top[0]]) for value, top in zip(values, best, strict=True) if top]
    told = iter(_intervals(gaps))
    marks = []
    for column, top in zip(found, best, strict=True):
        row = [""] * len(bench.runs)
        for run, gap in enumerate(next(told)) if top else ():
            if not bench.runs[run].reference and gap.count and not gap.apart and not column.cost:
                row[run] = "close"
        for run in top:
            row[run] = "best"
        marks.append(row)
    return marks


def _best(bench: Bench, column: Column, intervals: list[Interval]) -> list[int]:
    """Runs with the best mean; none where there is nothing to rank."""
    sign = {"higher": 1, "lower": -1}.get(column.better, 0)
    means = {
        run: sign * interval.mean
        for run, interval in enumerate(intervals)
        if sign and not bench.runs[run].reference and not math.isnan(interval.mean)
    }
    top = max(means.values(), default=0.0)
    return [run for run in means if means[run] == top] if len(means) > 1 else []


def _gaps(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """first - second (..., items), NaN where it is not finite: those are left out."""
    with np.errstate(invalid="ignore"):
        gaps = np.atleast_2d(first - second)
    return np.where(np.isfinite(gaps), gaps, np.nan)


def differences(
    bench: Bench, found: tuple[Column, ...], kind: str | None
) -> dict[str, list[list[float | str | None]]]:
    """Paired differences between any two runs over the items of a kind.

    Returns:
        "i-j" with i < j -> per column that is no cost, [mean, low, high] of run i minus run j.
        Empty beyond `MAX_RUNS_COMPARED` runs.
    """
    if len(bench.runs) > MAX_RUNS_COMPARED:
        return {}
    keep = bench.of_kind(kind)
    pairs = list(combinations(range(len(bench.runs)), 2))
    result: dict[str, list[list[float | str | None]]] = {f"{i}-{j}": [] for i, j in pairs}
    first, second = ([pair[side] for pair in pairs] for side in (0, 1))
    values = [bench.values[column.key][:, keep] for column in found if not column.cost]
    for gaps in _intervals([_gaps(value[first], value[second]) for value in values]):
        for told, gap in zip(result.values(), gaps, strict=True):
            told.append([json_number(v) for v in (gap.mean, gap.low, gap.high)])
    return result


def json_number(value: float) -> float | str | None:
    """A number as JSON can hold it: six significant digits, None for NaN, text for infinity."""
    if math.isnan(value):
        return None
    if math.isinf(value):
        return "inf" if value > 0 else "-inf"
    return float(f"{value:.6g}")


def default_axes(bench: Bench, found: tuple[Column, ...]) -> dict[str, str | None]:
    """Axes that the two plots open with: the trade-off, and error against cost."""
    keys = [column.key for column in found]
    metrics = [column.key for column in found if not column.cost] or keys
    x = next((key for key in PRESERVATION if key in keys), metrics[0])
    others = [key for key in (*FIDELITY, *metrics) if key in keys and key != x]
    return {
        "x": x,
        "y": others[0] if others else x,
        "cost": next((key for key in COSTS if key in keys), None),
        "error": next((key for key in ERRORS if key in keys), metrics[-1]),
    }
