import re
from dataclasses import dataclass
from typing import Literal

import pytest

from retour.core import registry
from retour.core.registry import Paper, build_options, entries, get, register
from retour.errors import RetourError

PAPER = Paper("A {T}itle", "Doe, Jane and Roe, Richard", 2025, "2501.00001", "ICML 2025")


@dataclass(frozen=True)
class Options:
    count: int = 3
    ratio: float = 0.5
    maybe: float | None = None
    flag: bool = False
    mode: Literal["fast", "slow"] = "fast"
    either: Literal["fast", "slow"] | None = None
    label: str = ""
    layers: tuple[int, ...] = ()


@pytest.fixture
def entry(monkeypatch):
    """A method registered for one test only."""
    entries()
    monkeypatch.setattr(registry, "_entries", dict(registry._entries))

    @register("trial", task="solver", summary="a trial", paper=PAPER, options=Options, order=3)
    class Trial:
        def __init__(self, options):
            self.options = options

    return get("solver", "trial")


@pytest.mark.parametrize("task", registry.TASKS)
def test_every_entry_is_complete(task):
    for entry in entries(task):
        assert entry.summary and len(entry.summary) < 90, entry.name
        assert entry.paper.title and entry.paper.authors and entry.paper.year > 1900
        assert re.fullmatch(r"(\d{4}\.\d{4,5})?", entry.paper.arxiv)
        assert entry.nfe, entry.name
        assert entry.factory.__doc__
        assert entry.make() is not None
        assert set(entry.describe()) >= {"name", "task", "exact", "order", "nfe", "options"}


def test_unknown_names_are_answered_with_the_nearest(entry):
    with pytest.raises(RetourError, match="did you mean 'ddim'"):
        get("solver", "ddin")
    with pytest.raises(RetourError, match="unknown task 'solvr'.*'solver'"):
        entries("solvr")
    with pytest.raises(RetourError, match="unknown fact 'ordr'.*'order'"):
        entries("solver", ordr=1)
    with pytest.raises(RetourError, match="option of 'trial' 'ration'.*'ratio'"):
        entry.make(ration=1)


def test_entries_are_picked_by_fact(entry):
    assert [e.name for e in entries("solver", order=3)] == ["trial"]
    assert {e.exact for e in entries("solver", exact=True)} == {True}
    assert all("trajectory" in e.provides for e in entries("invert", provides="trajectory"))


@pytest.mark.parametrize(
    "name, text, value",
    [
        ("count", "7", 7),
        ("ratio", "1e-2", 0.01),
        ("maybe", "none", None),
        ("maybe", "0.25", 0.25),
        ("flag", "yes", True),
        ("flag", "False", False),
        ("mode", "slow", "slow"),
        ("either", "slow", "slow"),
        ("either", "none", None),
        ("label", "none", "none"),
        ("label", "7", "7"),
        ("count", 7, 7),
        ("ratio", 1, 1),
        ("maybe", None, None),
        ("layers", (1, 2), (1, 2)),
    ],
)
def test_options_are_parsed_by_declared_type(entry, name, text, value):
    found = getattr(build_options(entry, {name: text}), name)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("count", "2.5", "takes int, got '2.5'"),
        ("count", 2.5, "takes int, got 2.5"),
        ("count", True, "takes int, got True"),
        ("ratio", "half", "takes float, got 'half'"),
        ("ratio", None, "takes float, got None"),
        ("maybe", [1], r"takes float or none, got \[1\]"),
        ("flag", "perhaps", "takes bool, got 'perhaps'"),
        ("flag", 1, "takes bool, got 1"),
        ("mode", "fats", "'fast'"),
        ("mode", 3, "fast, slow"),
        ("either", "fats", "did you mean 'fast'"),
        ("label", 3, "takes str, got 3"),
    ],
)
def test_bad_options_are_refused(entry, name, value, message):
    with pytest.raises(RetourError, match=message):
        entry.make(**{name: value})


def test_a_name_is_taken_once(entry):
    with pytest.raises(ValueError, match="registered twice"):

        @register("trial", task="solver", summary="", paper=PAPER)
        class Other:
            pass


def test_unknown_task_when_registering():
    with pytest.raises(ValueError, match="unknown task 'sampling'"):
        register("x", task="sampling")


def test_bibtex():
    text = PAPER.bibtex("doe2025")
    assert text.startswith("@misc{doe2025,") and text.endswith("}")
    assert text.count("{") == text.count("}")
    assert "eprint = {2501.00001}" in text and "note = {ICML 2025}" in text
    assert "eprint" not in Paper("T", "A", 2000).bibtex("a")


def test_describe_shows_options(entry):
    facts = entry.describe()
    assert facts["options"]["mode"] == "fast" and facts["options"]["maybe"] is None
    assert facts["order"] == 3


def test_every_editor_goes_with_its_mate():
    for editor in entries("edit"):
        mate = get("invert", editor.mate)
        assert editor.requires <= mate.provides, (editor.name, mate.name)
        assert editor.describe()["mate"] == mate.name
