"""What clicks mean, without a web framework: also for visitors who mean no good."""

import json
import re
import threading

import pytest
import torch

from retour.errors import RetourError
from retour.ui import markup, menus
from retour.ui.desk import Desk
from retour.ui.drawing import data_url, limits
from retour.ui.shelf import Shelf
from retour.ui.work import Stopped
from ui.cases import TARGET, OneModel, form
from ui.test_drawing import painted, png


@pytest.fixture(scope="module")
def shelf():
    return OneModel()


@pytest.fixture
def desk(shelf):
    found = Desk(shelf, longest=2)
    yield found
    found.close()


def bring(desk, session, image, name="in.png"):
    text = json.dumps({"name": name, "data": data_url(png(image))})
    return desk.upload(session, text)


def test_upload_edit_result(desk, gradient):
    room = bring(desk, "a", gradient)
    job = desk.begin("a", form())
    seen = [p for p in job.follow() if p is not None]
    entry = job.finish()
    assert seen[-1].fraction == pytest.approx(1)
    assert entry.number == 1 and room.find(1) is entry
    assert entry.made.record["targets"] == [TARGET] and entry.made.recipe.picture == "in.png"


def test_two_visitors_do_not_mix(desk, gradient):
    bring(desk, "a", gradient, "first.png")
    bring(desk, "b", gradient.rotate(180), "second.png")
    jobs = {
        "a": desk.begin("a", form(target="a cat")),
        "b": desk.begin("b", form(target="a pear", seed=3)),
    }
    made = {name: job.finish().made for name, job in jobs.items()}
    assert made["a"].record["targets"] == ["a cat"] and made["a"].recipe.picture == "first.png"
    assert made["b"].record["targets"] == ["a pear"] and made["b"].recipe.picture == "second.png"
    assert len(desk.rooms.enter("a").history) == len(desk.rooms.enter("b").history) == 1
    alone = Desk(desk.shelf)
    bring(alone, "c", gradient.rotate(180), "second.png")
    again = alone.begin("c", form(target="a pear", seed=3)).finish().made
    alone.close()
    assert again.after.tobytes() == made["b"].after.tobytes()


def test_cancel_is_the_visitors_own(desk, gradient):
    for name in "ab":
        bring(desk, name, gradient)
    first, second = desk.begin("a", form(steps=200)), desk.begin("b", form())
    desk.cancel("b")
    with pytest.raises(Stopped):
        second.finish()
    assert not first.ticket.done
    desk.rooms.leave("a")
    with pytest.raises(Stopped):
        first.finish()


def test_a_mask_confines_and_is_named(desk, gradient):
    bring(desk, "a", gradient)
    drawn = json.dumps({"mask": painted((96, 64), (0, 0, 48, 64)), "points": [], "options": {}})
    entry = desk.begin("a", form(editor="mask-blend", drawn=drawn)).finish()
    assert entry.made.recipe.mask == "in-mask.png" and entry.mask.size == gradient.size
    assert entry.made.record["masked"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"target": " "}, "target prompt is empty"),
        ({"steps": None}, "steps is empty"),
        ({"steps": 0}, "steps is 0: choose"),
        ({"seed": -1}, "seed is -1"),
        ({"steps": 2.5}, "whole number"),
        ({"steps": float("inf")}, "give a number"),
        ({"guidance": "3"}, "give a number"),
        ({"guidance": 400}, "guidance is 400"),
        ({"editor": "nothing"}, "unknown editor"),
        ({"inverter": "../x"}, "unknown inverter"),
        ({"drawn": "nonsense"}, "reload"),
        ({"drawn": '{"mask": 3}'}, "reload"),
        ({"drawn": '{"options": []}'}, "reload"),
        ({"drawn": '{"options": {"edit": {"secret": "1"}}}'}, "unknown option"),
        ({"drawn": '{"points": [[7, 7]]}'}, "outside"),
        ({"editor": "lazydrag"}, "pick the drag tool"),
        ({"drawn": '{"points": [[0.1, 0.1], [0.2, 0.2]]}'}, "'p2p' does not use drag .*lazydrag"),
    ],
)
def test_bad_forms_are_refused_before_they_wait(desk, gradient, changes, says):
    bring(desk, "a", gradient)
    with pytest.raises(RetourError, match=says):
        desk.begin("a", form(**changes))
    assert not desk.rooms.enter("a").busy


def test_what_the_model_cannot_do_is_said(desk, gradient):
    bring(desk, "a", gradient)
    job = desk.begin("a", form(editor="infedit", inverter="ddim"))
    with pytest.raises(RetourError, match="does not go with inverter 'ddim'"):
        job.finish()


def test_no_picture_no_job(desk):
    with pytest.raises(RetourError, match="no picture yet"):
        desk.begin("new", form())
    with pytest.raises(RetourError, match="no picture yet"):
        desk.guess("new")


def test_a_bad_upload_leaves_the_old_picture(desk, gradient):
    room = bring(desk, "a", gradient)
    with pytest.raises(RetourError, match="'notes.txt' is not a picture"):
        desk.upload("a", json.dumps({"name": "notes.txt", "data": data_url(b"hello")}))
    assert room.picture.tobytes() == gradient.tobytes()


def test_the_line_is_bounded(desk, gradient):
    for name in "abcd":
        bring(desk, name, gradient)
    jobs = [desk.begin(name, form(steps=200)) for name in "abc"]
    with pytest.raises(RetourError, match="try again"):
        desk.begin("d", form())
    for name in "abc":
        desk.cancel(name)
    assert all(threading.Event.wait(job.ticket._done, 10) for job in jobs)


def test_a_result_is_looked_at_until_another_picture_comes(desk, gradient):
    """And an earlier one brings back the picture that it was made of."""
    room = bring(desk, "a", gradient)
    first = desk.begin("a", form()).finish()
    assert room.shown is first
    desk.pick("a", "apple")
    assert room.shown is None
    second = desk.begin("a", form()).finish()
    assert desk.show("a", "1") is first is room.shown and room.name == "apple.png"
    assert desk.restore("a", "1") is first
    assert room.name == "in.png" and room.picture.tobytes() == gradient.tobytes()
    assert desk.restore("a", "2") is second and room.name == "apple.png"
    for number, says in (("3", "no longer kept"), ("-1", "no result '-1'"), ("x", "no result 'x'")):
        with pytest.raises(RetourError, match=says):
            desk.restore("a", number)
    assert room.shown is second


def test_what_was_not_read_of_a_prompt_is_said(desk, gradient):
    bring(desk, "a", gradient)
    entry = desk.begin("a", form(target="a cat " + "very " * 80 + "late")).finish()
    assert [cut.split()[-1] for cut in entry.made.unread] == ["late"]
    assert "so not read: very" in markup.result(entry)
    short = desk.begin("a", form(source="a cat", target="a dog")).finish()
    assert short.made.unread == () and "not read" not in markup.result(short)


def test_a_form_is_filled_in_as_it_was(desk):
    fields = menus.form("edit", "p2p")
    given = menus.read_options("edit", "p2p", '{"self_steps": "0.3", "mode": "refine"}')
    plain, filled = (markup.options("edit", "p2p", fields, g) for g in (None, given))
    assert 'data-default="0.6" value="0.6"' in plain
    assert 'data-default="0.6" value="0.3"' in filled
    assert '<option value="refine" selected="">' in filled
    # The script begins anew with what is filled in, and keeps what was typed otherwise.
    assert 'data-made="p2p"' in plain and 'data-made="p2p"' not in filled


def test_results_of_the_strip_are_told_apart(desk, gradient):
    bring(desk, "a", gradient)
    source = "a red apple on a table"
    for target in ("a green apple on a table", "a red apple", source):
        desk.begin("a", form(source=source, target=target)).finish()
    strip = markup.history(list(desk.rooms.enter("a").history))
    assert re.findall("<span>(.*?)</span>", strip) == ["p2p", "− on a table", "green"]


def test_examples_can_be_picked(desk):
    chosen = desk.pick("a", "apple")
    assert desk.rooms.enter("a").name == "apple.png" and "apple" in chosen.prompt
    with pytest.raises(RetourError, match="unknown example '../x'"):
        desk.pick("a", "../x")


def test_menus_replace_what_does_not_go(desk):
    menu = desk.menu("tiny-sd", "lazydrag", "uniinv")
    assert menu.editor == "p2p" and menu.inverter == "direct"  # Not the other editor's own.
    assert desk.menu("tiny-sd", "p2p", "virtual").inverter == "virtual"
    assert desk.menu("tiny-sd", "infedit").inverter == "virtual"


def test_only_the_models_of_the_start_can_be_had():
    shelf = Shelf()
    for name in ("owner/name", "/etc", "../x", ""):
        with pytest.raises(RetourError, match="unknown model"):
            shelf.get(name)
    assert shelf.names[0] == "emoji-unet"


def test_a_cameras_picture_is_reduced_and_that_is_said(desk, gradient):
    """Every look at a result carries the picture: at full size that would take minutes."""
    room = bring(desk, "a", gradient.resize((5000, 2500)))
    assert room.picture.size == (2048, 1024) and room.given == (5000, 2500)
    assert "Reduced from 5,000 x 2,500 pixels" in markup.reduction(room.given)
    room = bring(desk, "a", gradient)
    assert room.picture.size == gradient.size and room.given is None
    assert markup.reduction(None) == ""


def test_limits_are_the_operators(shelf, gradient):
    desk = Desk(shelf, allowed=limits(0.0001))
    with pytest.raises(RetourError, match="bytes: make it smaller"):
        bring(desk, "a", gradient)
    desk.close()


def test_what_strangers_write_is_escaped(desk, gradient):
    evil = '<img src=x onerror="alert(1)">'
    bring(desk, "a", gradient, f"{evil}.png")
    entry = desk.begin("a", form(source=evil, target=evil + " cat")).finish()
    room = desk.rooms.enter("a")
    parts = (
        markup.picture(gradient, evil),
        markup.words(evil, evil + " cat"),
        markup.history(list(room.history)),
        markup.result(entry),
        markup.reproduce(entry),
        markup.notice(evil),
        markup.options("edit", "p2p", menus.form("edit", "p2p"), {"blend": evil}),
    )
    assert not any("<img src=x" in part for part in parts)
    assert "&lt;img" in parts[4]


def test_on_a_processor_few_steps_are_offered_first(desk, monkeypatch):
    """On a GPU, and where the model itself takes fewer, the model's own."""
    name = desk.shelf.names[0]
    model = desk.shelf.get(name)
    for own, device, offered in ((50, "cpu", 20), (12, "cpu", 12), (50, "cuda", 50)):
        monkeypatch.setattr(model, "default_steps", own)
        monkeypatch.setattr(type(model), "device", torch.device(device))
        assert desk.menu(name).steps == offered


def test_rounds_are_asked_for_beside_the_options_of_a_drag(desk, gradient):
    """Only editors that take drags know them, and they reach the recipe, not the editor."""
    room = bring(desk, "a", gradient)
    assert menus.IN_TURN in menus.form("edit", "lazydrag")
    assert menus.IN_TURN not in menus.form("edit", "p2p") + menus.form("invert", "ddim")
    points = [[0.2, 0.5], [0.5, 0.5], [0.5, 0.5], [0.5, 0.9]]
    for said, wanted in (("True", True), ("False", False)):
        options = {"edit": {"in_turn": said, "band": "2"}}
        drawn = {"mask": "", "points": points, "options": options}
        asked = form(editor="lazydrag", inverter="uniinv")
        found = desk._recipe(asked, drawn, room, False)
        assert found.in_turn is wanted and found.editor_options == {"band": 2}
        assert len(found.drags) == 2
    with pytest.raises(RetourError, match="unknown option"):
        desk.begin("a", form(drawn='{"options": {"edit": {"in_turn": "True"}}}'))
    with pytest.raises(RetourError, match="cannot be read"):
        drawn = json.dumps({"points": points, "options": {"edit": ["in_turn"]}})
        desk.begin("a", form(editor="lazydrag", inverter="uniinv", drawn=drawn))
