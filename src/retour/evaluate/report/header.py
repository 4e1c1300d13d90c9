"""The head of the page: what was run, with what, by which command.

A plan may name its suite and model as text or as an object with name and fingerprint.
"""

from __future__ import annotations

import shlex
from typing import Any

from .folder import Bench


def title(bench: Bench) -> str:
    """Suite and model."""
    suite, model = name(bench.plan.get("suite")), name(bench.plan.get("model"))
    return " on ".join(part for part in (suite, model) if part) or bench.folder.resolve().name


def lead(bench: Bench) -> str:
    """One sentence: how much was compared."""
    runs = sum(not run.reference for run in bench.runs)
    kinds = f" of {len(bench.kinds)} kinds" if len(bench.kinds) > 1 else ""
    return (
        f"{_count(runs, 'run')} of {_count(len(bench.edits), 'edit')}{kinds}; "
        "means with 95 % bootstrap intervals."
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def facts(bench: Bench) -> list[tuple[str, str]]:
    """What decides the results, name and value."""
    plan = bench.plan
    found = [
        ("suite", name(plan.get("suite"))),
        ("suite fingerprint", fingerprint(plan, "suite")),
        ("model", name(plan.get("model"))),
        ("model fingerprint", fingerprint(plan, "model")),
        ("runs on", _machine(plan)),
        ("seed", _text(plan.get("seed"))),
        ("created", _text(plan.get("created")).replace("T", " ").replace("+00:00", " UTC")),
    ]
    return [(key, value) for key, value in found if value]


def _machine(plan: dict[str, Any]) -> str:
    """Device and type of the weights."""
    model = plan.get("model")
    told = [model.get(key) for key in ("device", "dtype")] if isinstance(model, dict) else []
    return ", ".join(_text(part).removeprefix("torch.") for part in told if part)


def versions(bench: Bench) -> str:
    """Versions of what ran, in one line."""
    told = bench.plan.get("versions")
    return ", ".join(f"{k} {v}" for k, v in told.items()) if isinstance(told, dict) else ""


def command(bench: Bench) -> str:
    """The command line that made the results."""
    told = bench.plan.get("command")
    if isinstance(told, list):
        return shlex.join(str(part) for part in told)
    return _text(told)


def name(value: Any) -> str:
    """Name of a suite or model, given as text or as an object."""
    if isinstance(value, dict):
        return _text(value.get("name") or value.get("path"))
    return _text(value)


def fingerprint(plan: dict[str, Any], part: str) -> str:
    """Fingerprint of the suite or the model, within its object or as `PART_fingerprint`."""
    value = plan.get(part)
    if isinstance(value, dict):
        return _text(value.get("fingerprint"))
    return _text(
        plan.get(f"{part}_fingerprint", plan.get("fingerprint") if part == "model" else "")
    )


def _text(value: Any) -> str:
    return "" if value is None else str(value)
