"""The paired benchmark set, which ships with retour in two splits.

    python -m retour.data.paired --data SPRITES --out src/retour/paired/public
    python -m retour.data.paired --data SPRITES --out src/retour/paired/test --seed 2027 \\
        --apart src/retour/paired/public

Edits of emoji scenes whose true edited image and exact mask are known, in PIE-Bench's format
(see :mod:`retour.evaluate.suite`). Every kind of edit has the same number of pairs, every style
too. What is drawn at random is accepted only if people can see it: silhouettes stand out from
the background, the change is strong, a restyled object keeps its outline and colours, and
nothing shows a sprite that training did not see. Defaults of methods were chosen while looking at
pairs of the first split; the second one shows none of its edits.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection
from pathlib import Path

import numpy as np
from PIL import Image

from retour.data._builder import PER_STYLE, SEED, Builder
from retour.data._pie import TYPE_IDS, describe
from retour.data.scenes import EDIT_KINDS, Split, Studio, make_split
from retour.data.sprites import load
from retour.evaluate.suite import EDITED, IMAGES, KINDS, MAPPING, Suite
from retour.io import atomic_write


def write_image(pixels: np.ndarray, path: Path) -> None:
    """Write an image (H, W, 3) uint8 as a small PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        Image.fromarray(pixels).save(temporary, "PNG", optimize=True)


def build(
    studio: Studio,
    split: Split,
    out: Path,
    seed: int = SEED,
    per_style: int = PER_STYLE,
    apart: Collection[tuple[str, str]] = (),
) -> int:
    """Write the whole set to `out` and return the number of its pairs."""
    builder, lines = Builder(studio, split, seed, apart=apart), []
    for kind in EDIT_KINDS:
        pairs = list(builder.pairs(kind, per_style))
        type_id = TYPE_IDS[kind]
        folder = f"{type_id}_{KINDS[type_id]}_{len(pairs)}"
        for number, pair in enumerate(pairs):
            name = f"{int(type_id):03d}{number:09d}"
            write_image(pair.source_image, out / IMAGES / folder / f"{name}.png")
            write_image(pair.target_image, out / EDITED / folder / f"{name}.png")
            entry = json.dumps(describe(studio, pair, name, folder), separators=(",", ":"))
            lines.append(f'"{name}": {entry}')
    with atomic_write(out / MAPPING) as temporary:
        temporary.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    return len(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m retour.data.paired", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of the sprite cache")
    parser.add_argument("--out", type=Path, required=True, help="folder of the set")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--apart", type=Path, help="folder of a set: its edits shall not come")
    options = parser.parse_args()
    studio = Studio(load(options.data))
    other = () if options.apart is None else Suite.load(options.apart)
    apart = {(item.source, item.target) for item in other}
    split = make_split(studio.sprites)
    written = build(studio, split, options.out, options.seed, apart=apart)
    print(f"{written} pairs in {options.out}")


if __name__ == "__main__":
    main()
