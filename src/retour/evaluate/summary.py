"""Means, intervals and paired differences of a benchmark's rows, and its Markdown table."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from .plan import CEILING, COPY
from .stats import Interval, mean_intervals
from .work import COSTS

Rows = Sequence[Mapping[str, Any]]

# Decimals in the table; the metrics' units make them of one size.
DIGITS = {"background_psnr": 2}
USUAL = 1


def summarise(rows: Rows, metrics: Sequence[str]) -> dict[str, Any]:
    """Means and differences of all rows, and of each kind of edit.

    Returns:
        `runs`: label -> column -> interval; `differences`: "a - b" -> metric -> interval, for any
        two runs; `kinds`: kind -> the same two. Costs have no interval: those of a batch are one
        measurement.
    """
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    whole = _summary(rows, metrics)
    parts = {k: _summary([r for r in rows if r["kind"] == k], metrics) for k in kinds if k}
    return {**whole, "kinds": parts}


def _summary(rows: Rows, metrics: Sequence[str]) -> dict[str, Any]:
    columns = by_run(rows, [*metrics, *COSTS])
    pairs = list(combinations(columns, 2))
    table = [np.array(columns[label][m]) for label in columns for m in metrics]
    table += [_gaps(columns[a][m], columns[b][m]) for a, b in pairs for m in metrics]
    intervals = iter(mean_intervals(np.array(table)) if table else ())
    runs = {
        label: {m: next(intervals) for m in metrics} | {c: _bare(values[c]) for c in COSTS}
        for label, values in columns.items()
    }
    differences = {f"{a} - {b}": {m: next(intervals) for m in metrics} for a, b in pairs}
    return {"runs": runs, "differences": differences}


def _gaps(first: Sequence[float], second: Sequence[float]) -> np.ndarray:
    """Differences item by item, NaN where there is no finite one; see `paired_difference`."""
    with np.errstate(invalid="ignore"):
        gaps = np.array(first, np.float64) - np.array(second, np.float64)
    return np.where(np.isfinite(gaps), gaps, np.nan)


def by_run(rows: Rows, names: Sequence[str]) -> dict[str, dict[str, list[float]]]:
    """Run -> column -> values, in the order of the items."""
    labels = dict.fromkeys(row["run"] for row in rows)
    return {
        label: {name: [row[name] for row in rows if row["run"] == label] for name in names}
        for label in labels
    }


def _bare(values: Sequence[float]) -> Interval:
    known = [value for value in values if not math.isnan(value)]
    mean = sum(known) / len(known) if known else math.nan
    return Interval(mean, math.nan, math.nan, len(known))


def markdown(summary: Mapping[str, Any], facts: Mapping[str, Mapping[str, str]]) -> str:
    """The summary as a Markdown table: one row a run, then the paired differences of the runs.

    A star marks an interval that excludes zero.
    """
    names = list(facts)
    heads = [_head(name, facts[name]) for name in names]
    lines = [
        "| run | " + " | ".join([*heads, "NFE", "s/image"]) + " |",
        "| --- " * (len(names) + 3) + "|",
    ]
    for label, row in summary["runs"].items():
        cells = [_cell(row[name], name) for name in names]
        costs = [f"{row['nfe_full'].mean:.0f}", f"{row['seconds_full'].mean:.2f}"]
        lines.append(f"| {label} | " + " | ".join([*cells, *costs]) + " |")
    for label, row in summary["differences"].items():
        if not {COPY, CEILING} & set(label.split(" - ")):
            cells = [_cell(row[name], name, starred=True) for name in names]
            lines.append(f"| {label} | " + " | ".join([*cells, "", ""]) + " |")
    return "\n".join(lines)


def _head(name: str, facts: Mapping[str, str]) -> str:
    unit, title = facts.get("unit") or "", facts.get("title") or name
    scale = re.fullmatch(r"x 1e-(\d+)", unit)  # values in thousandths are values times 1000
    return f"{title} x {10 ** int(scale[1])}" if scale else f"{title}, {unit}" if unit else title


def _cell(value: Interval, name: str, *, starred: bool = False) -> str:
    if not value.count:
        return "-"
    digits = DIGITS.get(name, USUAL)
    mean, low, high = (f"{v:.{digits}f}" for v in (value.mean, value.low, value.high))
    star = "*" if starred and value.apart else ""
    return mean + star if low == high or math.isnan(value.low) else f"{mean}{star} [{low}, {high}]"
