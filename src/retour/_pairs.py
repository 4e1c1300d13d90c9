"""Which methods go with which model, and with one another."""

from __future__ import annotations

from .core.model import Model
from .core.registry import DOERS, Entry, entries, get
from .errors import RetourError


def usual_inverter(editor: str, model: Model) -> str:
    """The inverter that an editor goes with, or the default one where the model cannot serve it."""
    mate = get("invert", get("edit", editor).mate)
    return mate.name if mate.needs <= model.capabilities else "direct"


def refuse_impossible(model: Model, *chosen: Entry) -> None:
    """Refuse methods that this model, or each other, cannot serve, in one sentence."""
    for entry in chosen:
        missing = entry.needs - model.capabilities
        if missing:
            others = [e.name for e in entries(entry.task) if e.needs <= model.capabilities]
            raise RetourError(
                f"{DOERS[entry.task]} {entry.name!r} needs {', '.join(sorted(missing))}, which "
                f"model {model.name!r} does not offer: use {', '.join(others)}"
            )
    provided = frozenset().union(*(e.provides for e in chosen))
    for entry in chosen:
        if not entry.requires <= provided:
            fitting = [e.name for e in entries("invert") if entry.requires <= e.provides]
            raise RetourError(
                f"editor {entry.name!r} does not go with inverter {chosen[0].name!r}: "
                f"use one of {', '.join(fitting)}"
            )
