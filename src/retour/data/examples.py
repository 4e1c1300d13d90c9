"""Draws the gallery's pictures from its scenes: `python -m retour.data.examples --data SPRITES`.

`examples/gallery.json` lists each picture's scene beside its prompt; a prompt that the scene does
not bear out is refused, so that the gallery's captions stay true.
"""

from __future__ import annotations

import argparse
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from PIL import Image

from retour.data.scenes import Form, Item, Scene, Studio
from retour.data.sprites import load
from retour.io import save_image


def scene_of(listing: dict[str, Any]) -> Scene:
    """Scene from its plain description."""
    items = tuple(Item(**item) for item in listing["items"])
    return Scene(listing["style"], listing["background"], items)


def draw(studio: Studio, listing: dict[str, Any], folder: Path) -> None:
    """Draw every picture of the listing into `folder`.

    Raises:
        ValueError: a prompt differs from what the scene shows.
    """
    for name, image in listing["images"].items():
        scene = scene_of(image["scene"])
        captions = {studio.caption(scene, Form(natural_colours=n)) for n in (False, True)}
        if image["prompt"] not in captions:
            raise ValueError(f"{name}: {image['prompt']!r} is none of {sorted(captions)}")
        save_image(Image.fromarray(studio.render(scene)), folder / f"{name}.png")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of the sprite cache")
    arguments = parser.parse_args()
    folder = Path(str(files("retour") / "examples"))
    listing = json.loads((folder / "gallery.json").read_text(encoding="utf-8"))
    draw(Studio(load(arguments.data)), listing, folder)


if __name__ == "__main__":
    main()
