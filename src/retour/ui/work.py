"""Making a picture from a recipe, watched: progress, previews, and a stop heeded at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from .. import api
from ..core.loop import Event
from ..core.model import Model
from ..core.progress import quiet
from ..core.watch import Watcher, watching
from ..dragging import drag
from ..errors import RetourError
from ..io import fit, png_bytes, to_image
from .recipe import Recipe, rounds

PREVIEWS = 12
INVERSION_SHARE = 0.35


class Stopped(Exception):
    """The visitor, or the clock, ended the run."""


class Token:
    """Says whether a run shall go on.

    Args:
        seconds: how long it may run from its first network call on; None: as long as it takes.
    """

    def __init__(self, seconds: float | None = None):
        self.seconds = seconds
        self._cancelled = threading.Event()
        self._end: float | None = None

    def cancel(self) -> None:
        """Ask the run to end."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        """Whether it was asked to end."""
        return self._cancelled.is_set()

    def check(self) -> None:
        """End the run, if it shall end."""
        if self.cancelled:
            raise Stopped("stopped")
        now = time.monotonic()
        if self._end is None and self.seconds is not None:
            self._end = now + self.seconds
        if self._end is not None and now > self._end:
            raise RetourError(
                f"this took more than the {self.seconds:g} seconds that a job may have here: "
                "use fewer steps or a cheaper method"
            )


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        phase: ``invert`` or ``edit``.
        step: steps done of the walk in progress.
        steps: steps of that walk.
        calls: network calls so far.
        fraction: of the whole, in [0, 1]; never falls.
        preview: what the picture looks like now; None where there is nothing new.
    """

    phase: str
    step: int
    steps: int
    calls: int
    fraction: float
    preview: Image.Image | None = None


@dataclass(frozen=True)
class Made:
    """A picture and what it came from.

    Attributes:
        recipe: what made it, the source prompt filled in.
        before: the picture as the model sees it.
        after: the edited one, of the same size.
        png: `after` as a PNG file, its record inside.
        record: facts of the run.
    """

    recipe: Recipe
    before: Image.Image
    after: Image.Image
    png: bytes
    record: dict[str, Any]

    @property
    def unread(self) -> tuple[str, ...]:
        """Ends of prompts that the model does not read, for they are too long."""
        return tuple((self.record["inversion"]["cut"] | self.record["cut"]).values())


Tell = Callable[[Progress], None]


class _Spy(Watcher):
    """Tells of every step, shows some, and stops where the token says so."""

    def __init__(self, model: Model, token: Token, tell: Tell, previews: int, recipe: Recipe):
        self.model, self.token, self.tell, self.previews = model, token, tell, previews
        self.dragging = recipe.dragging
        self.rounds, self.round = len(recipe.drags) if recipe.in_turn else 1, 0
        self.phase, self.calls, self.fraction = "invert", 0, 0.0

    def called(self) -> None:
        self.token.check()
        self.calls += 1

    def stepped(self, event: Event) -> None:
        self.token.check()
        step = event.step
        if self.dragging:
            self.round += not step.down and step.index == 0
            self.phase = "edit" if step.down else "invert"
        done = step.position + 1 if step.down else step.index + 1
        start, share = (0.0, INVERSION_SHARE) if self.phase == "invert" else (INVERSION_SHARE, 0.65)
        whole = max(0, self.round - 1) + start + share * done / step.count
        self.fraction = max(self.fraction, min(1.0, whole / self.rounds))
        every = max(1, -(-step.count // self.previews)) if self.previews else 0
        wanted = every > 0 and (done % every == 0 or done == step.count)
        preview = self._preview(event) if wanted else None
        self.tell(Progress(self.phase, done, step.count, self.calls, self.fraction, preview))

    def _preview(self, event: Event) -> Image.Image | None:
        """On the way back what the target will be; on the way there, how the source dissolves."""
        layout, seen = event.denoiser.layout, event.denoiser.latest
        if not event.step.down or seen is None or len(seen) != len(event.state.x):
            seen = event.state.x
        name = next(iter(layout.targets()), layout.names[0])
        latents = seen[layout[name]][:1].detach()
        if not latents.isfinite().all():
            return None
        return to_image(self.model.decode(latents)[0])


def make(
    recipe: Recipe,
    model: Model,
    picture: Image.Image,
    mask: Image.Image | None = None,
    *,
    token: Token | None = None,
    tell: Tell = lambda progress: None,
    previews: int = PREVIEWS,
) -> Made:
    """Make the picture of a recipe.

    Args:
        recipe: what to make.
        model: the recipe's model, loaded.
        picture: the recipe's picture.
        mask: the recipe's mask, white where the edit may act.
        token: stops the run before its next network call.
        tell: hears of every step, in this thread.
        previews: how many pictures of work in progress each walk shows, about; 0: none.

    Raises:
        RetourError: for a recipe that cannot be made.
        Stopped: the token said so.
    """
    spy = _Spy(model, Token() if token is None else token, tell, previews, recipe)
    spy.token.check()
    with quiet(), watching(spy):
        if recipe.dragging:
            result = _dragged(recipe, model, picture, mask)
        else:
            result = _edited(recipe, model, picture, mask, spy)
    spy.token.check()
    # The first round's prompt: later rounds begin with what the first ones were to show.
    first = result.record.get("rounds", [result.record])[0]
    done = replace(recipe, source=first["inversion"]["prompts"][0])
    before, _ = fit(picture, native=model.native, multiple=model.multiple)
    png = png_bytes(result.image, result.record)
    return Made(done, before, result.image, png, result.record)


def _edited(
    recipe: Recipe, model: Model, picture: Image.Image, mask: Image.Image | None, spy: _Spy
) -> api.Result:
    # Refused before the inversion, which may take minutes.
    entry = api.get("edit", recipe.editor)
    entry.make(**recipe.settings)
    api.refuse_impossible(model, api.get("invert", recipe.inverter), entry)
    inversion = api.invert(
        model, picture, recipe.source, method=recipe.inverter, steps=recipe.steps,
        guidance=recipe.guidance, seed=recipe.seed, **recipe.inverter_options,
    )  # fmt: skip
    spy.phase = "edit"
    return api.edit(inversion, recipe.target, editor=recipe.editor, mask=mask, **recipe.settings)


def _dragged(
    recipe: Recipe, model: Model, picture: Image.Image, mask: Image.Image | None
) -> api.Result:
    return drag(
        model, picture, rounds(recipe), prompt=recipe.source,
        target=recipe.target if recipe.target.strip() else None, mask=mask, editor=recipe.editor,
        inverter=recipe.inverter, steps=recipe.steps, guidance=recipe.guidance, seed=recipe.seed,
        inverter_options=dict(recipe.inverter_options), **recipe.settings,
    )  # fmt: skip
