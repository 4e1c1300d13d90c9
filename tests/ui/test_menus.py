import json

import pytest

from retour.core.registry import build_options, entries, get
from retour.errors import RetourError
from retour.ui import menus
from ui.cases import tiny_model

METHODS = [(e.task, e.name) for task in ("invert", "edit") for e in entries(task)]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.mark.parametrize(("task", "name"), METHODS)
def test_every_methods_form_reads_back_its_defaults(task, name):
    """What a form shows untouched is what the method does by itself."""
    fields = menus.fields(task, name)
    untouched = {f.name: f.shown for f in fields}
    assert menus.read_options(task, name, json.dumps(untouched)) == {}
    assert all(f.help for f in fields)


@pytest.mark.parametrize(("task", "name"), METHODS)
def test_no_option_may_name_a_file(task, name):
    said = build_options(get(task, name), {})
    texts = {f.name for f in menus.fields(task, name) if f.kind == "text"}
    assert texts <= menus.WORDS
    held = {"region", "scorer", "pairs", "drags", "seed", "monitor"} & set(vars(said))
    for option in held:
        with pytest.raises(RetourError, match="unknown option"):
            menus.read_options(task, name, json.dumps({option: "/etc/passwd"}))


def test_set_options_are_typed_and_defaults_left_out():
    given = {"cross_steps": "0.2-0.8", "self_steps": "0.6", "blend_start": "0.1"}
    read = menus.read_options("edit", "p2p", json.dumps(given))
    assert read == {"cross_steps": "0.2-0.8", "blend_start": 0.1}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[", "cannot be read"),
        ("[1]", "cannot be read"),
        ('{"blend_start": 3}', "is a text"),
        ('{"blend_start": "soon"}', "takes"),
        ('{"blend_strat": "0.1"}', "did you mean"),
        ('{"blend": "' + "a" * 600 + '"}', "at most 500"),
    ],
)
def test_bad_options_are_refused(text, says):
    with pytest.raises(RetourError, match=says):
        menus.read_options("edit", "p2p", text)


def test_rounds_are_bounded():
    with pytest.raises(RetourError, match="at most 1000"):
        menus.read_options("invert", "fixed-point", '{"iterations": "100000"}')


def test_only_what_works_is_offered_and_the_rest_explained(model):
    found = {c.name: c for c in menus.editors(model)}
    assert set(found) == {e.name for e in entries("edit")}
    assert not found["p2p"].refused
    assert found["lazydrag"].refused == "needs joint-attention, which tiny-sd lacks"
    names = [c.name for c in menus.editors(model)]
    assert names.index("lazydrag") > names.index("reprompt")


def test_inverters_follow_the_editor(model):
    found = menus.inverters(model, "infedit")
    assert found[0].name == "virtual" and not found[0].refused
    refused = {c.name: c.refused for c in found if c.refused}
    assert "infedit requires (anchored)" in refused["ddim"]


def test_facts_say_cost_exactness_and_what_is_wanted_of_the_visitor():
    assert menus.facts(get("invert", "edict"))[:2] == (
        "2N (4N guided) evaluations for N steps",
        "exact round trip",
    )
    assert "needs a mask" in menus.facts(get("edit", "mask-blend"))
    assert "needs drag points" in menus.facts(get("edit", "lazydrag"))
    # What it needs of the model is no warning: it is there.
    assert not any("attention" in f for e in entries("edit") for f in menus.facts(e))
    assert menus.facts(get("invert", "virtual"))[0] == "no evaluations"
