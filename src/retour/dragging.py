"""`retour.drag`: take hold of points of a picture and pull them elsewhere, in rounds if need be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import numpy
from PIL import Image

from . import api
from ._inputs import listed
from .core.registry import entries, get
from .core.state import Inversion
from .editors._drags import Drag, Mode, check_inside, parse_drags
from .errors import RetourError
from .io import read_image

Round = Sequence[Drag]


def drag(
    model: api.ModelLike,
    image: Any,
    drags: str | Drag | Round | Sequence[Round | str],
    *,
    prompt: str | None = None,
    target: str | None = None,
    mask: Any = None,
    mode: Mode | str = "drag",
    editor: str = "lazydrag",
    inverter: str | None = None,
    steps: int | None = None,
    guidance: float = 1.0,
    seed: int = 0,
    inverter_options: dict[str, Any] | None = None,
    **options: Any,
) -> api.Result:
    """Drag points of a picture to where they shall be.

    Args:
        model: a loaded model with joint attention, a name, a folder, a hub id or a pipeline.
        image: a path, PIL image, array, or tensor (3, H, W).
        drags: what to drag where, in pixels of the picture from its top left corner: "x,y>x,y;
            ...", one :class:`Drag` or several, which act together; or several such texts or lists,
            one for each round, each of which starts from the last one's picture.
        prompt: what the picture shows; None asks the caption proposer.
        target: what it shall show; None: the same. New words guide what appears.
        mask: where editing is allowed (white); for mode ``move``, what is moved. In later rounds of
            ``move`` it follows the object. Or a list, one for each round.
        mode: ``drag`` pulls elastically, ``move`` moves what the mask shows, scaled if a drag says.
        editor: a registered editor that takes drags.
        inverter: a registered inverter; None: the editor's own choice.
        steps: steps of the time grid; None takes the model's default.
        guidance: guidance scale; the method was made for 1, the prompt alone.
        seed: seed of all noise.
        inverter_options: options of the inverter.
        options: options of the editor.

    Returns:
        The last round's result; its record counts all rounds and lists them under `rounds`.

    Raises:
        RetourError: for input that cannot be used, before any work.
    """
    model = api.as_model(model)
    rounds = read_rounds(drags)
    masks = listed(mask)
    if len(masks) not in (1, len(rounds)):
        raise RetourError(
            f"{len(masks)} masks for {len(rounds)} rounds: give one, or one for each round"
        )
    takers = [e.name for e in entries("edit") if "drags" in {f.name for f in fields(e.options)}]
    if get("edit", editor).name not in takers:
        raise RetourError(f"editor {editor!r} drags no points: use {', '.join(takers)}")
    settings = {"mode": mode, "seed": seed, **options}
    for given in rounds:
        get("edit", editor).make(**settings, drags=given)
    name = api.usual_inverter(editor, model) if inverter is None else inverter
    api.refuse_impossible(model, get("invert", name), get("edit", editor))
    picture, area, records = read_image(image), masks[0], []
    if mode == "move" and area is None:
        raise RetourError("mode 'move' moves what the mask shows: give a mask (--mask)")
    for point in (p for given in rounds for d in given for p in (d.start, d.end)):
        check_inside(point, picture.size)
    for number, given in enumerate(rounds):
        if number and len(masks) > 1:
            area = masks[number]
        asked = {"editor": editor, "mask": area, "drags": given, **settings}

        def check(found: Inversion, asked: dict[str, Any] = asked) -> None:
            api.refuse_edit(found, found.prompts[0] if target is None else target, **asked)

        inversion = api.invert(
            model, picture, prompt, method=name, steps=steps, guidance=guidance, seed=seed,
            check=check, **(inverter_options or {}),
        )  # fmt: skip
        prompt = inversion.prompts[0]
        wanted = prompt if target is None else target
        result = api.edit(inversion, wanted, **asked)
        records.append(result.record)
        picture, prompt = result.original_size(), wanted
        if mode == "move" and area is not None and len(masks) == 1:
            area = moved_mask(read_image(area).convert("L"), given)
    costs = {k: sum(record[k] for record in records) for k in ("nfe", "seconds")}
    return replace(result, record={**result.record, **costs, "rounds": records})


def read_rounds(drags: str | Drag | Round | Sequence[Round | str]) -> list[tuple[Drag, ...]]:
    """Drags of each round."""
    if isinstance(drags, Drag):
        return [(drags,)]
    if isinstance(drags, str):
        return [_some(parse_drags(drags))]
    given: list[Any] = list(drags)
    if given and all(isinstance(d, Drag) for d in given):
        return [tuple(given)]
    if not given or any(isinstance(d, Drag) for d in given):
        raise RetourError(f"drags are a list of drags, or one list for each round, got {drags!r}")
    return [read_rounds(part)[0] for part in given]


def pair_points(
    handles: Sequence[str], goals: Sequence[str], scales: Sequence[str] = ()
) -> tuple[Drag, ...]:
    """Make drags of handles "x,y", as many goals, and scales: none, one for all, or one each."""
    if len(handles) != len(goals):
        raise RetourError(
            f"{len(handles)} handles (--from) and {len(goals)} goals (--to): give one for each"
        )
    if len(scales) not in (0, 1, len(handles)):
        raise RetourError(f"{len(scales)} scales for {len(handles)} drags: give one, or one each")
    ends = [f"*{s}" for s in scales] * (len(handles) if len(scales) == 1 else 1)
    tails = ends if ends else [""] * len(handles)
    parts = zip(handles, goals, tails, strict=True)
    return _some(parse_drags(";".join(f"{a}>{b}{c}" for a, b, c in parts)))


def _some(drags: tuple[Drag, ...]) -> tuple[Drag, ...]:
    if not drags:
        raise RetourError("there is nothing to drag: give at least one point and where it goes")
    return drags


def moved_mask(mask: Image.Image, drags: Sequence[Drag]) -> Image.Image:
    """Mask of what a mask showed, after it was moved: every pixel with its nearest handle."""
    down, across = numpy.indices((mask.height, mask.width)).astype(float)
    before = numpy.asarray(mask)
    ends = [(d, numpy.hypot(across - d.end[0], down - d.end[1])) for d in drags]
    nearest = numpy.argmin([distance for _, distance in ends], 0)
    after = numpy.zeros_like(before)
    for number, (d, _) in enumerate(ends):
        x = (across - d.end[0]) / d.scale[0] + d.start[0]
        y = (down - d.end[1]) / d.scale[1] + d.start[1]
        column, row = numpy.rint(x).astype(int), numpy.rint(y).astype(int)
        inside = (column >= 0) & (column < mask.width) & (row >= 0) & (row < mask.height)
        taken = inside & (nearest == number)
        after[taken] = before[row[taken], column[taken]]
    return Image.fromarray(after)
