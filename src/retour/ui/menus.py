"""What the registry offers for a model: methods that work, reasons for those that do not, options.

Only options that are numbers, switches, choices or *words* are offered: an option that may name a
file on the server (a region, a scorer, an object's mask) is not a visitor's to set. A text option
is taken for a file unless `WORDS` knows it.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..api import usual_inverter
from ..core.model import Model
from ..core.registry import Entry, build_options, entries, get
from ..errors import RetourError, check_range, unknown
from .recipe import takes_drags

WORDS = frozenset(
    ("blend", "blend_subtract", "cross_steps", "edit_words", "keep_words", "masks", "negative")
    + ("phrase", "reweight", "scale", "self_steps", "source_sentences", "target_sentences")
    + ("threshold",)
)
HANDLED = frozenset(("drags", "seed"))  # The page has its own controls for these.
MAX_TEXT = 500
MAX_WHOLE = 1000  # Rounds, candidates, probes: what a stranger may make a server do.


@dataclass(frozen=True)
class Choice:
    """A method that goes with a model, or why it does not.

    Attributes:
        name: of the method.
        summary: what it is good at.
        facts: short facts: cost, exactness, what it wants of the visitor.
        refused: why it cannot be chosen; "" if it can.
    """

    name: str
    summary: str
    facts: tuple[str, ...]
    refused: str = ""


@dataclass(frozen=True)
class Field:
    """An option of a method, as a form shows it.

    Attributes:
        name: of the option.
        kind: ``switch``, ``choice``, ``whole``, ``number`` or ``text``.
        default: its default.
        choices: of a choice.
        optional: whether it may be left empty.
        help: what the docstring says.
    """

    name: str
    kind: str
    default: Any
    choices: tuple[str, ...] = ()
    optional: bool = False
    help: str = ""

    @property
    def shown(self) -> str:
        """The default as a form shows it."""
        return "" if self.default is None else str(self.default)


IN_TURN = Field(
    "in_turn", "switch", False, help="a round for each drag, starting from the last one's picture"
)


def editors(model: Model) -> list[Choice]:
    """Every editor, those that work first."""
    return _sorted(_choice(e, _lacking(e, model)) for e in entries("edit"))


def inverters(model: Model, editor: str) -> list[Choice]:
    """Every inverter, the one that the editor goes with first."""
    wanted = get("edit", editor)
    usual = usual_inverter(editor, model)
    found = [_choice(e, _lacking(e, model) or _unfit(e, wanted)) for e in entries("invert")]
    return sorted(_sorted(found), key=lambda c: (bool(c.refused), c.name != usual))


def _sorted(found: typing.Iterable[Choice]) -> list[Choice]:
    return sorted(found, key=lambda c: (bool(c.refused), c.name))


def _choice(entry: Entry, refused: str) -> Choice:
    return Choice(entry.name, entry.summary, facts(entry), refused)


def facts(entry: Entry) -> tuple[str, ...]:
    """Short facts of a method: cost, exactness, what it wants of the visitor.

    What it needs of the model is no fact of a method that fits: it is why others do not.
    """
    found = [f"{entry.nfe} evaluations for N steps" if "N" in entry.nfe else "no evaluations"]
    found += ["exact round trip"] if entry.exact else []
    found += ["random"] if entry.stochastic else []
    found += ["needs a mask"] if entry.facts.get("mask") else []
    found += ["needs drag points"] if takes_drags(entry) else []
    return tuple(found)


def _lacking(entry: Entry, model: Model) -> str:
    missing = entry.needs - model.capabilities
    return f"needs {', '.join(sorted(missing))}, which {model.name} lacks" if missing else ""


def _unfit(inverter: Entry, editor: Entry) -> str:
    missing = editor.requires - inverter.provides - editor.provides
    if not missing:
        return ""
    return f"does not keep what {editor.name} requires ({', '.join(sorted(missing))})"


# --- Options --------------------------------------------------------------------------------------


def fields(task: str, name: str) -> list[Field]:
    """The options of a method that a visitor may set."""
    entry = get(task, name)
    hints = typing.get_type_hints(entry.options)
    said = _attributes(entry.options)
    found = []
    for option in dataclasses.fields(entry.options):
        if option.name not in HANDLED:
            kinds = _kinds(hints[option.name])
            field = _field(option.name, kinds, _default(option), said.get(option.name, ""))
            found += [field] if field is not None else []
    return found


def form(task: str, name: str) -> list[Field]:
    """All that a visitor may set beside a method: its options, and rounds where it takes drags."""
    return fields(task, name) + [IN_TURN] * takes_drags(get(task, name))


def _field(name: str, kinds: list[Any], default: Any, said: str) -> Field | None:
    optional = type(None) in kinds
    choices = tuple(str(c) for k in kinds for c in typing.get_args(k) if _literal(k))
    if choices:
        return Field(name, "choice", default, choices, optional, said)
    if str in kinds:
        return Field(name, "text", default, (), optional, said) if name in WORDS else None
    for kind, shown in ((bool, "switch"), (float, "number"), (int, "whole")):
        if kind in kinds:
            three = shown == "switch" and optional
            if three:
                return Field(name, "choice", default, ("True", "False"), True, said)
            return Field(name, shown, default, (), optional, said)
    return None


def _literal(kind: Any) -> bool:
    return typing.get_origin(kind) is typing.Literal


def _kinds(hint: Any) -> list[Any]:
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return list(typing.get_args(hint)) if union else [hint]


def _default(option: dataclasses.Field[Any]) -> Any:
    if option.default_factory is not dataclasses.MISSING:
        return option.default_factory()
    return option.default


def _attributes(cls: type) -> dict[str, str]:
    """What the docstrings of a dataclass and its bases say of each attribute."""
    said: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        text = inspect.cleandoc(base.__dict__.get("__doc__") or "").partition("Attributes:")[2]
        for name, body in re.findall(r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", text, re.MULTILINE):
            said[name] = " ".join(body.replace("``", "").replace("`", "").split())
    return said


def read_options(task: str, name: str, text: str) -> dict[str, Any]:
    """The options that a visitor set: JSON of texts by name, checked; defaults are left out.

    Raises:
        RetourError: an option that the method does not have or that is not a visitor's to set.
    """
    try:
        given = json.loads(text) if text.strip() else {}
    except ValueError:
        given = None
    if not isinstance(given, Mapping):
        raise RetourError("the options cannot be read: reload the page")
    offered = {f.name: f for f in fields(task, name)}
    for key, value in given.items():
        if key not in offered:
            raise unknown(f"option of {name!r}", key, offered)
        if not isinstance(value, str) or len(value) > MAX_TEXT:
            raise RetourError(f"option {key!r} is a text of at most {MAX_TEXT} characters")
    entry = get(task, name)
    given = {key: value for key, value in given.items() if value != offered[key].shown}
    built = build_options(entry, given)
    defaults = build_options(entry, {})
    entry.make(**given)
    values = {key: getattr(built, key) for key in given}
    for key in (k for k in values if offered[k].kind == "whole"):
        check_range(f"option {key!r}", values[key], high=MAX_WHOLE)
    return {k: v for k, v in values.items() if v != getattr(defaults, k)}
