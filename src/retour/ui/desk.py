"""The desk between the page and the work: what a visitor's click means, without any web framework.

A desk holds the models, the line and the rooms of all visitors. Whatever a visitor sends is text,
and is checked here.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from ..captions import propose
from ..core.model import Model
from ..core.registry import entries, get
from ..errors import RetourError
from ..io import Limits
from . import menus
from .drawing import limits, read_file, read_mask, read_points, reduced
from .line import Line, Ticket
from .recipe import Recipe, file_name, takes_drags
from .rooms import Entry, Room, Rooms
from .samples import Sample, sample
from .shelf import Shelf
from .work import Made, Progress, make

DRAG_GUIDANCE = 1.0
QUICK_STEPS = 20  # On a processor more are a visitor's choice, not what he waits for at first.


@dataclass(frozen=True)
class Menu:
    """What can be chosen for a model and an editor, and what is chosen.

    Attributes:
        name: of the model on the shelf.
        model: the model.
        editors: all of them.
        inverters: all of them, for that editor.
        editor: the chosen one.
        inverter: the chosen one.
        steps: to begin with: the model's own, on a processor at most `QUICK_STEPS`.
        guidance: of the model, or of the editor, where nobody says.
    """

    name: str
    model: Model
    editors: list[menus.Choice]
    inverters: list[menus.Choice]
    editor: str
    inverter: str
    steps: int
    guidance: float


@dataclass(frozen=True)
class Form:
    """What the page's controls say, as they say it."""

    source: str
    target: str
    model: str
    editor: str
    inverter: str
    steps: Any
    guidance: Any
    seed: Any
    drawn: str = ""


@dataclass
class Job:
    """A job in the line, as a page follows it.

    Attributes:
        ticket: its place.
        picture: what goes in.
        begun: when it was asked for.
    """

    ticket: Ticket
    room: Room
    picture: Image.Image
    mask: Image.Image | None
    begun: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """Since it was asked for."""
        return time.monotonic() - self.begun

    def follow(self) -> Iterator[Progress | None]:
        """News until it ends."""
        yield from self.ticket.follow()

    def finish(self) -> Entry:
        """The result, kept in the visitor's history; or what went wrong, raised."""
        made: Made = self.ticket.result()
        return self.room.keep(made, self.picture, self.mask, self.seconds)


class Desk:
    """All that a page serves.

    Args:
        shelf: the models.
        longest: how many jobs may wait.
        seconds: how long a job may run.
        allowed: what an upload may measure.
    """

    def __init__(
        self,
        shelf: Shelf | None = None,
        *,
        longest: int = 8,
        seconds: float | None = None,
        allowed: Limits | None = None,
    ):
        self.shelf = Shelf() if shelf is None else shelf
        self.allowed = limits() if allowed is None else allowed
        self.line = Line(longest, seconds)
        self.rooms = Rooms()

    def close(self) -> None:
        """Stop all work."""
        self.line.close()

    # --- Choosing ---

    def menu(self, model: str, editor: str = "p2p", inverter: str | None = None) -> Menu:
        """What goes with a model; an editor or inverter that does not go is replaced."""
        loaded = self.shelf.get(model)
        editors = menus.editors(loaded)
        chosen = _one_of(editors, editor)
        inverters = menus.inverters(loaded, chosen)
        # An editor that was replaced takes its inverter with it.
        other = _one_of(inverters, inverter if chosen == editor else None)
        dragging = takes_drags(get("edit", chosen))
        guidance = DRAG_GUIDANCE if dragging else loaded.default_guidance
        steps = loaded.default_steps
        if loaded.device.type == "cpu":
            steps = min(steps, QUICK_STEPS)
        return Menu(model, loaded, editors, inverters, chosen, other, steps, guidance)

    # --- Bringing a picture ---

    def upload(self, session: str | None, text: str) -> Room:
        """Take an upload into a visitor's room."""
        room = self.rooms.enter(session)
        found = read_file(text, self.allowed)
        picture = reduced(found.image)
        given = None if picture is found.image else found.image.size
        room.bring(picture, file_name(found.name), given)
        return room

    def pick(self, session: str | None, name: str) -> Sample:
        """Take an example into a visitor's room."""
        room, chosen = self.rooms.enter(session), sample(name)
        room.bring(chosen.picture, f"{chosen.name}.png")
        return chosen

    def show(self, session: str | None, number: str) -> Entry:
        """Let a visitor look at an earlier result."""
        room = self.rooms.enter(session)
        room.shown = room.find(_numbered(number))
        return room.shown

    def restore(self, session: str | None, number: str) -> Entry:
        """The same, with the picture that it was made of back as the one to edit."""
        room, entry = self.rooms.enter(session), self.show(session, number)
        room.picture, room.name = entry.picture, entry.made.recipe.picture
        return entry

    def guess(self, session: str | None) -> Ticket:
        """Guess what a visitor's picture shows; the ticket's result is the prompt."""
        room = self.rooms.enter(session)
        picture = _picture(room)
        return room.begin(self.line, lambda ticket: propose([picture])[0])

    # --- Working ---

    def begin(self, session: str | None, form: Form) -> Job:
        """Put an edit in the line.

        Raises:
            RetourError: for whatever cannot be made, before it waits.
        """
        room = self.rooms.enter(session)
        picture = _picture(room)
        drawn = _drawn(form.drawn)
        mask = read_mask(drawn["mask"], picture.size, self.allowed)
        recipe = self._recipe(form, drawn, room, mask is not None)

        def work(ticket: Ticket) -> Made:
            model = self.shelf.get(form.model)
            return make(recipe, model, picture, mask, token=ticket.token, tell=ticket.tell)

        return Job(room.begin(self.line, work), room, picture, mask)

    def _recipe(self, form: Form, drawn: dict[str, Any], room: Room, masked: bool) -> Recipe:
        assert room.picture is not None
        dragging = takes_drags(get("edit", form.editor))
        options = {t: drawn["options"].get(t, {}) for t in ("invert", "edit")}
        in_turn = False
        if dragging and isinstance(options["edit"], dict):
            in_turn = options["edit"].pop(menus.IN_TURN.name, "False") == "True"
        given = {t: json.dumps(options[t]) for t in options}
        points = read_points(json.dumps(drawn["points"]), room.picture.size)
        if points and not dragging:
            raise RetourError(
                f"editor {form.editor!r} does not use drag points: press Clear to take them away, "
                f"or choose an editor that does ({', '.join(_dragging())})"
            )
        source = form.source.strip()
        return Recipe(
            picture=room.name,
            source=source if source else None,
            target=form.target.strip(),
            model=self.shelf.source(form.model),
            inverter=get("invert", form.inverter).name,
            editor=form.editor,
            steps=_whole("steps", form.steps),
            guidance=_number("guidance", form.guidance),
            seed=_whole("seed", form.seed),
            inverter_options=menus.read_options("invert", form.inverter, given["invert"]),
            editor_options=menus.read_options("edit", form.editor, given["edit"]),
            mask=room.name.replace(".png", "-mask.png") if masked else None,
            drags=points if dragging else (),
            in_turn=in_turn,
            device=self.shelf.device,
            dtype=self.shelf.dtype,
        )

    def cancel(self, session: str | None) -> None:
        """Stop a visitor's job."""
        self.rooms.enter(session).close()


def _one_of(choices: list[menus.Choice], wanted: str | None) -> str:
    fitting = [c.name for c in choices if not c.refused]
    if not fitting:
        raise RetourError("no method goes with this model: choose another one")
    return wanted if wanted in fitting else "p2p" if "p2p" in fitting else fitting[0]


def _dragging() -> list[str]:
    """Editors that drag points, each with what it needs of a model."""
    found = [e for e in entries("edit") if takes_drags(e)]
    return [
        e.name + (f", on a model with {' and '.join(sorted(e.needs))}" if e.needs else "")
        for e in found
    ]


def _numbered(text: str) -> int:
    if not text.isdecimal():
        raise RetourError(f"there is no result {text[:20]!r}: choose one of the strip")
    return int(text)


def _picture(room: Room) -> Image.Image:
    if room.picture is None:
        raise RetourError("there is no picture yet: drop one, or pick an example")
    return room.picture


def _drawn(text: str) -> dict[str, Any]:
    empty: dict[str, Any] = {"mask": "", "points": [], "options": {}}
    try:
        given = {**empty, **(json.loads(text) if text else {})}
    except (ValueError, TypeError):
        raise RetourError("what was drawn cannot be read: reload the page") from None
    if not isinstance(given["mask"], str) or not isinstance(given["options"], dict):
        raise RetourError("what was drawn cannot be read: reload the page")
    return given


def _whole(name: str, value: Any) -> int:
    number = _number(name, value)
    if number != int(number):
        raise RetourError(f"{name} is {value}: give a whole number")
    return int(number)


def _number(name: str, value: Any) -> float:
    if value is None:
        raise RetourError(f"{name} is empty: give a number")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
        raise RetourError(f"{name} is {value!r}: give a number")
    if abs(value) == float("inf"):
        raise RetourError(f"{name} is {value!r}: give a number")
    return float(value)
