"""The one list of everything retour can do, with declared facts.

`@register(...)` on a class makes it a command-line choice, a row of the docs' tables, a menu entry,
a citation, and a subject of the registry-wide tests. Nothing else needs touching to add a method.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ..errors import RetourError, unknown

C = TypeVar("C", bound=type)

PACKAGES = ("solvers", "inverters", "editors", "privacy", "restorers")
TASKS = ("solver", "invert", "edit", "attack", "restore")
# What does a task, as it is called in options, records and messages.
DOERS = {
    "solver": "solver",
    "invert": "inverter",
    "edit": "editor",
    "attack": "attack",
    "restore": "restorer",
}


@dataclass(frozen=True)
class Paper:
    """Where a method comes from.

    Attributes:
        title: full title.
        authors: ``and``-separated as in BibTeX.
        year: of the cited version.
        arxiv: arXiv id, "" if there is none.
        venue: conference or journal, if known.
    """

    title: str
    authors: str
    year: int
    arxiv: str = ""
    venue: str = ""

    def bibtex(self, key: str) -> str:
        """BibTeX entry: `@misc`, with the venue as a note."""
        fields = {"title": self.title, "author": self.authors, "year": str(self.year)}
        if self.arxiv:
            fields |= {"eprint": self.arxiv, "archivePrefix": "arXiv"}
        if self.venue:
            fields["note"] = self.venue
        body = ",\n".join(f"  {name} = {{{value}}}" for name, value in fields.items())
        return f"@misc{{{key},\n{body}\n}}"


@dataclass(frozen=True)
class Entry:
    """A registered method and its declared facts.

    Attributes:
        name: short name used everywhere.
        task: ``solver``, ``invert``, ``edit``, ``attack`` or ``restore``.
        factory: the class; called with its options dataclass.
        summary: one line for tables and menus.
        paper: reference.
        options: the frozen dataclass of its options.
        exact: its round trip is exact up to rounding.
        order: convergence order, if it has one.
        nfe: cost in network evaluations per image, as a formula in N (steps).
        stochastic: draws noise.
        needs: model capabilities it needs (`attention`, `gradients`, `image`, `flow`, `vp`).
        requires: what an editor requires of an inversion (`trajectory`, ...).
        provides: what an inverter's result offers to editors.
        mate: the inverter that an editor goes with where nobody chooses.
        extra: pip extra that it needs, "" for none.
    """

    name: str
    task: str
    factory: type
    summary: str
    paper: Paper
    options: type
    exact: bool = False
    order: int | None = None
    nfe: str = ""
    stochastic: bool = False
    needs: frozenset[str] = frozenset()
    requires: frozenset[str] = frozenset()
    provides: frozenset[str] = frozenset()
    mate: str = "direct"
    extra: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)

    def make(self, **options: Any) -> Any:
        """Build the method with the given options; refuses unknown or badly typed ones."""
        return self.factory(build_options(self, options))

    def describe(self) -> dict[str, Any]:
        """Plain facts, for `retour methods --json`."""
        return {
            "name": self.name,
            "task": self.task,
            "summary": self.summary,
            "title": self.paper.title,
            "year": self.paper.year,
            "arxiv": self.paper.arxiv,
            "exact": self.exact,
            "order": self.order,
            "nfe": self.nfe,
            "stochastic": self.stochastic,
            "needs": sorted(self.needs),
            "requires": sorted(self.requires),
            "provides": sorted(self.provides),
            **({"mate": self.mate} if self.task == "edit" else {}),
            "extra": self.extra,
            "options": {f.name: _plain_default(f) for f in dataclasses.fields(self.options)},
            **self.facts,
        }


@dataclass(frozen=True)
class NoOptions:
    """A method without options."""


_entries: dict[tuple[str, str], Entry] = {}


def register(name: str, *, task: str, **facts: Any) -> Callable[[C], C]:
    """Class decorator: register a method under `name` for `task` with its declared facts.

    `facts` are the fields of :class:`Entry`; `options` defaults to none. Sets are given as any
    iterable.
    """
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r} for method {name!r}")

    def add(cls: C) -> C:
        named = [k for k in ("needs", "requires", "provides") if k in facts]
        sets: dict[str, Any] = {k: frozenset(facts.pop(k)) for k in named}
        options = facts.pop("options", NoOptions)
        key = (task, name)
        if key in _entries and _identity(_entries[key].factory) != _identity(cls):
            raise ValueError(f"{task} method {name!r} is registered twice")
        _entries[key] = Entry(name=name, task=task, factory=cls, options=options, **facts, **sets)
        return cls

    return add


def _identity(cls: type) -> tuple[str, str]:
    return cls.__module__, cls.__qualname__


def _load_all() -> None:
    for package in PACKAGES:
        module = importlib.import_module(f"retour.{package}")
        for info in pkgutil.iter_modules(module.__path__):
            importlib.import_module(f"retour.{package}.{info.name}")


def entries(task: str | None = None, **facts: Any) -> list[Entry]:
    """All registered methods of a task whose declared facts equal the given ones.

    A set-valued fact (`needs`, `requires`, `provides`) matches when it contains the given string.
    """
    _load_all()
    if task is not None and task not in TASKS:
        raise unknown("task", task, TASKS)
    known = {f.name for f in dataclasses.fields(Entry)}
    for fact in facts:
        if fact not in known:
            raise unknown("fact", fact, sorted(known))
    found = [e for (t, _), e in _entries.items() if task in (None, t)]
    return sorted(
        (e for e in found if all(_matches(getattr(e, k), v) for k, v in facts.items())),
        key=lambda e: (TASKS.index(e.task), e.name),
    )


def _matches(value: Any, wanted: Any) -> bool:
    return wanted in value if isinstance(value, frozenset) else value == wanted


def get(task: str, name: str) -> Entry:
    """One entry by task and name; an unknown name is refused with the nearest ones."""
    for entry in entries(task):
        if entry.name == name:
            return entry
    others = [DOERS[e.task] for e in entries() if e.name == name]
    known_as = " and ".join(f"a{'n' if word[0] in 'aei' else ''} {word}" for word in others)
    raise unknown(DOERS[task], name, [e.name for e in entries(task)], known_as)


def build_options(entry: Entry, given: Mapping[str, Any]) -> Any:
    """Make the entry's options from plain values; strings are parsed by declared type."""
    return parse_fields(entry.name, entry.options, given)


def parse_fields(name: str, cls: type, given: Mapping[str, Any]) -> Any:
    """Make a dataclass called `name` from plain values; strings are parsed by declared type."""
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls) if not f.name.startswith("_")]
    for field_ in given:
        if field_ not in names:
            raise unknown(f"option of {name!r}", field_, names)
    return cls(**{k: _parse(name, k, v, hints[k]) for k, v in given.items()})


def _parse(method: str, name: str, value: Any, hint: Any) -> Any:
    kinds = _kinds(hint)
    named = [c for k in kinds if typing.get_origin(k) is typing.Literal for c in typing.get_args(k)]
    if value in named or str in kinds and isinstance(value, str):
        return value
    if isinstance(value, str):
        return _parse_text(method, name, value, kinds, named)
    if any(_fits(value, k) for k in kinds):
        return value
    raise _refused(method, name, value, kinds, named)


def _parse_text(method: str, name: str, text: str, kinds: list[Any], named: list[Any]) -> Any:
    if text.lower() in ("none", "") and type(None) in kinds:
        return None
    for kind in (k for k in (bool, int, float) if k in kinds):
        try:
            return _parse_bool(text) if kind is bool else kind(text)
        except ValueError:
            continue
    raise _refused(method, name, text, kinds, named)


def _refused(method: str, name: str, value: Any, kinds: list[Any], named: list[Any]) -> RetourError:
    if named:
        return unknown(f"value of {method!r} option {name!r}", value, [str(c) for c in named])
    names = ["none" if k is type(None) else getattr(k, "__name__", str(k)) for k in kinds]
    wanted = " or ".join(names)
    return RetourError(f"option {name!r} of {method!r} takes {wanted}, got {value!r}")


def _kinds(hint: Any) -> list[Any]:
    """Members of a union, or the type itself."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return list(typing.get_args(hint))
    return [hint]


def _fits(value: Any, kind: Any) -> bool:
    if kind in (int, float):
        numbers = (int, float) if kind is float else int
        return isinstance(value, numbers) and not isinstance(value, bool)
    if typing.get_origin(kind) is typing.Literal:
        return False
    base = typing.get_origin(kind) or kind
    return isinstance(value, base) if isinstance(base, type) else True


def _parse_bool(value: str) -> bool:
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if value.lower() not in words:
        raise ValueError(value)
    return words[value.lower()]


def _plain_default(f: dataclasses.Field[Any]) -> Any:
    if f.default is not dataclasses.MISSING:
        return f.default
    return f.default_factory() if f.default_factory is not dataclasses.MISSING else None
