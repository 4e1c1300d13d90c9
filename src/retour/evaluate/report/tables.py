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
    "peak_mib": ("Peak MiB", "peak memory above the start of the work, of the GPU or the process"),
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
    rows: list[list[dict[str, Any]]] = [[] for _ in bench.runs]
    for column in found:
        values = bench.values[column.key][:, keep]
        intervals = _means(values) if column.cost else mean_intervals(values)
        marks = _marks(bench, column, values, intervals)
        for row, interval, mark in zip(rows, intervals, marks, strict=True):
            row.append({**_ends(interval), "mark": mark})
    return rows


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
    bench: Bench, column: Column, values: np.ndarray, intervals: list[Interval]
) -> list[str]:
    sign = {"higher": 1, "lower": -1}.get(column.better, 0)
    means = {
        k: sign * interval.mean
        for k, interval in enumerate(intervals)
        if sign and not bench.runs[k].reference and not math.isnan(interval.mean)
    }
    marks = [""] * len(intervals)
    if len(means) < 2:
        return marks
    best = max(means, key=lambda k: means[k])
    for k in means:
        if means[k] == means[best]:
            marks[k] = "best"
        elif not column.cost and not _told_apart(values[k], values[best]):
            marks[k] = "close"
    return marks


def _told_apart(values: np.ndarray, best: np.ndarray) -> bool:
    return _gaps(values, best)[0].apart


def _gaps(first: np.ndarray, second: np.ndarray) -> list[Interval]:
    """Intervals of the mean of first - second (..., items); what is not finite is left out."""
    with np.errstate(invalid="ignore"):
        gaps = np.atleast_2d(first - second)
    return mean_intervals(np.where(np.isfinite(gaps), gaps, np.nan))


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
    for column in (column for column in found if not column.cost):
        values = bench.values[column.key][:, keep]
        for (i, j), gap in zip(pairs, _gaps(values[first], values[second]), strict=True):
            result[f"{i}-{j}"].append([json_number(v) for v in (gap.mean, gap.low, gap.high)])
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
