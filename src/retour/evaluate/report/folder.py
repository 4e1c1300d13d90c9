"""A bench folder, read and checked as a whole before anything is made of it.

Values come as one array (runs, items) per column, NaN where a run has no figure for an item.
Whatever is damaged or missing is refused in one sentence, and so is any path that leaves the
folder: a results file may come from somebody else.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import RetourError

PLAN, RESULTS, SUMMARY = "plan.json", "results.parquet", "summary.json"
INPUTS, TRUTH, MASKS, ATTENTION = "inputs", "truth", "masks", "attention"
BATCH_FORMAT = "retour-batch"
TRUTH_METRIC = "truth_distance"
REFERENCES = ("copy-input", "vae-ceiling")
TEXTS = ("kind", "split", "source", "target")
NAMES = ("run", "item", "image", *TEXTS)
SETTINGS = ("inverter", "editor", "steps", "guidance", "batch")
NOT_VALUES = {*NAMES, *SETTINGS}
COSTS = (
    *("nfe_full", "nfe", "nfe_inversion", "nfe_edit"),
    *("seconds_full", "seconds", "seconds_inversion", "seconds_edit", "peak_mib"),
)


@dataclass(frozen=True)
class Run:
    """One row of the table: what was combined."""

    label: str
    inverter: str
    editor: str
    steps: int | None
    guidance: float | None

    @property
    def reference(self) -> bool:
        """Whether it is a yardstick that nothing was run for."""
        return self.label in REFERENCES


@dataclass(frozen=True)
class Edit:
    """One item of the suite."""

    id: str
    kind: str
    split: str
    source: str
    target: str


@dataclass(frozen=True)
class Bench:
    """What a bench folder holds.

    Attributes:
        folder: where it lies.
        plan: what was asked for, as the runner wrote it.
        facts: what is known of each metric: title, unit, better, convention, backbone.
        runs: rows of the table, references first.
        edits: items, in the order of the results.
        values: column -> (runs, items) floats, NaN where there is none; empty columns left out.
        images: (run, item) -> the output's file.
    """

    folder: Path
    plan: dict[str, Any]
    facts: dict[str, dict[str, Any]]
    runs: tuple[Run, ...]
    edits: tuple[Edit, ...]
    values: dict[str, np.ndarray]
    images: dict[tuple[int, int], Path]

    @classmethod
    def read(cls, folder: Path) -> Bench:
        """Read a folder that `retour bench` has finished.

        Raises:
            RetourError: it is no such folder, or a part of it is missing or damaged.
        """
        _check_finished(folder)
        rows = _read_rows(folder / RESULTS)
        labels = list(dict.fromkeys(row["run"] for row in rows))
        labels.sort(key=lambda label: label not in REFERENCES)
        places = {label: k for k, label in enumerate(labels)}
        items = {item: k for k, item in enumerate(dict.fromkeys(row["item"] for row in rows))}
        at = [(places[row["run"]], items[row["item"]]) for row in rows]
        _check_once(folder, rows, at)
        first = {place[0]: row for place, row in reversed(list(zip(at, rows, strict=True)))}
        told = {place[1]: row for place, row in reversed(list(zip(at, rows, strict=True)))}
        return cls(
            folder,
            _read_object(folder / PLAN),
            _facts(_read_object(folder / SUMMARY)),
            tuple(_run(first[k]) for k in range(len(labels))),
            tuple(_edit(told[k]) for k in range(len(items))),
            _values(rows, at, (len(labels), len(items))),
            {p: _inside(folder, r["image"]) for p, r in zip(at, rows, strict=True) if r["image"]},
        )

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of edit that are named, in the order of the suite."""
        return tuple(dict.fromkeys(edit.kind for edit in self.edits if edit.kind))

    def of_kind(self, kind: str | None) -> np.ndarray:
        """Which items are of a kind, (items,) bool; None takes all."""
        return np.array([kind is None or edit.kind == kind for edit in self.edits])

    def inside(self, name: str) -> Path:
        """A path within the folder.

        Raises:
            RetourError: it would leave the folder.
        """
        return _inside(self.folder, name)

    def picture(self, part: str, item: str) -> Path | None:
        """A picture of an item in `inputs`, `truth` or `masks`, if it has one."""
        path = self.inside(f"{part}/{item}.png")
        return path if path.is_file() else None

    def expected(self) -> Iterator[Path]:
        """Files that there must be: outputs, inputs, and truths that something was held to."""
        yield from self.images.values()
        held = ~np.isnan(self.values.get(TRUTH_METRIC, np.full((1, len(self.edits)), np.nan)))
        for edit, known in zip(self.edits, held.any(0), strict=True):
            yield self.inside(f"{INPUTS}/{edit.id}.png")
            if known:
                yield self.inside(f"{TRUTH}/{edit.id}.png")

    def check_pictures(self) -> None:
        """Refuse a folder where an expected picture is missing, with their number."""
        absent = [path for path in self.expected() if not path.is_file()]
        if absent:
            raise RetourError(
                f"{_pictures(len(absent))} missing in '{self.folder}', the first being "
                f"'{absent[0]}': run the bench again in this folder."
            )


def _pictures(count: int) -> str:
    return "1 picture is" if count == 1 else f"{count} pictures are"


def _check_finished(folder: Path) -> None:
    if not folder.is_dir():
        raise RetourError(f"there is no folder '{folder}': name one that `retour bench` wrote.")
    missing = [name for name in (PLAN, RESULTS, SUMMARY) if not (folder / name).is_file()]
    if not missing:
        return
    if (folder / PLAN).is_file():
        if str(_read_object(folder / PLAN).get("format", "")).startswith(BATCH_FORMAT):
            raise RetourError(
                f"'{folder}' is of `retour batch`, which measures nothing: a report is made of a "
                "folder that `retour bench` wrote."
            )
        raise RetourError(
            f"'{folder}' has no {' and no '.join(missing)}: its run is unfinished, so give the "
            "same `retour bench` command again."
        )
    raise RetourError(f"'{folder}' holds no results: name a folder that `retour bench` wrote.")


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RetourError(f"cannot read '{path}' ({error}): run the bench again.") from None
    if not isinstance(value, dict):
        raise RetourError(f"'{path}' holds no JSON object: run the bench again.")
    return value


def _read_rows(path: Path) -> list[dict[str, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise RetourError(
            'a report reads Parquet: install it with `pip install "retour[report]"`.'
        ) from None
    try:
        rows = parquet.read_table(path, partitioning=None).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise RetourError(
            f"'{path}' is damaged or no Parquet file ({reason}): run the bench again in this "
            "folder, finished parts are kept."
        ) from None
    if not rows:
        raise RetourError(f"'{path}' has no rows: run the bench on one edit at least.")
    lacking = [name for name in NAMES if name not in rows[0]]
    if lacking:
        raise RetourError(f"'{path}' lacks the column {lacking[0]!r}: `retour bench` writes it.")
    return [{**row, **{name: _text(row[name]) for name in NAMES}} for row in rows]


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def _check_once(folder: Path, rows: Sequence[dict[str, Any]], at: list[tuple[int, int]]) -> None:
    seen = set()
    for place, row in zip(at, rows, strict=True):
        if place in seen:
            raise RetourError(
                f"'{folder / RESULTS}' has run {row['run']!r} on item {row['item']!r} twice: "
                "run the bench in a fresh folder."
            )
        seen.add(place)


def _facts(summary: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Metadata of the metrics; anything else in their place counts as none."""
    metrics = summary.get("metrics")
    found = metrics if isinstance(metrics, dict) else {}
    return {key: fact for key, fact in found.items() if isinstance(fact, dict)}


def _run(row: dict[str, Any]) -> Run:
    steps, guidance = _number(row.get("steps")), _number(row.get("guidance"))
    return Run(
        row["run"],
        _text(row.get("inverter")),
        _text(row.get("editor")),
        None if steps is None or math.isinf(steps) else int(steps),
        guidance,
    )


def _edit(row: dict[str, Any]) -> Edit:
    return Edit(row["item"], *(row[name] for name in TEXTS))


def _values(
    rows: Sequence[dict[str, Any]], at: list[tuple[int, int]], shape: tuple[int, int]
) -> dict[str, np.ndarray]:
    found = {}
    for name in (key for key in rows[0] if key not in NOT_VALUES):
        values = np.full(shape, np.nan)
        for place, row in zip(at, rows, strict=True):
            value = _number(row[name])
            if value is not None:
                values[place] = value
        if not np.isnan(values).all():
            found[name] = values
    return found


def _number(value: Any) -> float | None:
    """A number; None for anything else, NaN included."""
    known = isinstance(value, (int, float)) and not math.isnan(value)
    return float(value) if known else None


def _inside(folder: Path, name: str) -> Path:
    path = folder / name
    if "\0" in name or not path.resolve().is_relative_to(folder.resolve()):
        raise RetourError(f"'{folder}' names {name!r}, outside of itself: distrust these results.")
    return path
