"""One strip of pictures for every inverter: the picture, its way back, and an edit.

    python benchmarks/returns.py [--model emoji-unet] [--inverters NAMES] [--steps 20]
                                 [--out docs/images/inverters]

Pictures and target prompts are those of `retour demo`. Each inverter takes them to noise with their
captions; shown are the input, what comes back at the model's guidance without an edit, and the edit
by the first of `EDITORS` that goes with the inverter. Writes NAME.png for each.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

import retour
from retour import api, demo
from retour.core.model import Model
from retour.core.progress import quiet
from retour.core.registry import Entry, get
from retour.errors import RetourError
from retour.io import save_image

EDITORS = ("p2p", "reprompt", "infedit")
PICTURES = 4
CELL, GAP, BETWEEN = 96, 2, 14
COLOURS = 128


def chosen() -> tuple[list[Image.Image], list[str], list[str]]:
    """Pictures with their captions and targets."""
    pictures, edits = demo.examples()
    targets: dict[str, str] = {}
    for edit in edits:
        if edit.demo:
            targets.setdefault(edit.image, edit.target)
    names = list(targets)[:PICTURES]
    shown = [pictures[name] for name in names]
    return [p for p, _ in shown], [c for _, c in shown], [targets[name] for name in names]


def editor_for(entry: Entry, model: Model) -> str:
    """The first editor that goes with an inverter."""
    for name in EDITORS:
        try:
            api.refuse_impossible(model, entry, get("edit", name))
        except RetourError:
            continue
        return name
    raise RetourError(f"none of {', '.join(EDITORS)} goes with {entry.name}")


def strip(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Pictures side by side, those of one row together."""
    wide = sum(len(row) * (CELL + GAP) + BETWEEN for row in rows) - BETWEEN
    page = Image.new("RGB", (wide, CELL), "white")
    x = 0
    for row in rows:
        for image in row:
            page.paste(image.resize((CELL, CELL), Image.Resampling.LANCZOS), (x, 0))
            x += CELL + GAP
        x += BETWEEN
    return page


def make(entry: Entry, model: Model, steps: int) -> Image.Image:
    """The strip of one inverter."""
    images, captions, targets = chosen()
    inversion = api.invert(model, images, captions, method=entry.name, steps=steps)
    back = api.reconstruct(inversion)
    edited = api.edit(inversion, targets, editor=editor_for(entry, model))
    return strip(list(zip(images, back.images, edited.images, strict=True)))


def main() -> None:
    """Make the strips."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="emoji-unet")
    parser.add_argument("--inverters", help="names, with commas between; all that fit by default")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("docs/images/inverters"))
    given = parser.parse_args()
    model = retour.load(given.model)
    fitting = [e for e in retour.methods(task="invert") if e.needs <= model.capabilities]
    names = given.inverters.split(",") if given.inverters else [e.name for e in fitting]
    given.out.mkdir(parents=True, exist_ok=True)
    with quiet():
        for name in names:
            path = given.out / f"{name}.png"
            save_image(make(get("invert", name), model, given.steps).quantize(COLOURS), path)
            print(path, flush=True)


if __name__ == "__main__":
    main()
