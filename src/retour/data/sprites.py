"""The sprite cache: emoji of three open styles, 64 x 64 RGBA, in one atlas and a JSON index.

Sources (npm packages): Fluent 3D (MIT, Microsoft), Noto (Apache-2.0, Google), Twemoji (CC-BY-4.0,
Twitter and contributors), joined by code point with the labels of emojibase-data (MIT). Skin tones,
people, symbols, flags and components are dropped; only concepts drawn in all three styles are kept.

    python -m retour.data.sprites --out DIR [--tarballs DIR]
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from importlib.resources import files
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = 64
COLUMNS = 64
GROUPS = {
    0: "smileys", 1: "people", 3: "animals", 4: "food", 5: "travel", 6: "activities", 7: "objects",
}  # fmt: skip
LABELS = ("emojibase-data", "17.0.0", "package/en/data.json")
STYLES: dict[str, tuple[str, str, str]] = {
    "3d": ("@lobehub/fluent-emoji-3d", "1.1.0", "package/assets/"),
    "noto": ("emoji-datasource-google", "16.0.0", "package/img/google/64/"),
    "twemoji": ("emoji-datasource-twitter", "16.0.0", "package/img/twitter/64/"),
}


@dataclass(frozen=True)
class Sprites:
    """Sprites (64, 64, 4) uint8 by (concept, style), and the emoji group of each concept."""

    images: dict[tuple[str, str], np.ndarray]
    groups: dict[str, str] = field(default_factory=dict)

    @cached_property
    def concepts(self) -> list[str]:
        """Every concept, sorted."""
        return sorted({concept for concept, _ in self.images})

    @cached_property
    def styles(self) -> list[str]:
        """Every style, sorted."""
        return sorted({style for _, style in self.images})


def tarball_name(package: str, version: str) -> str:
    """File name that `npm pack` gives to a package."""
    return f"{package.lstrip('@').replace('/', '-')}-{version}.tgz"


def find_tarball(package: str, version: str, folder: Path) -> Path:
    """Path of a package's tarball in `folder`, packed by npm when it is not there yet."""
    path = folder / tarball_name(package, version)
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = ["npm", "pack", "--loglevel=error", f"{package}@{version}"]
        subprocess.run(command, cwd=folder, check=True)
    return path


def plain_code(code: str) -> str:
    """Code points in lower case without variation selectors, the key of the join."""
    return "-".join(part for part in code.lower().split("-") if part != "fe0f")


def read_member(archive: tarfile.TarFile, member: tarfile.TarInfo | str) -> bytes:
    """Content of a regular file in an archive."""
    file = archive.extractfile(member)
    if file is None:
        raise ValueError(f"{member!r} is not a regular file of the archive")
    return file.read()


def read_labels(tarball: Path) -> dict[str, tuple[str, str]]:
    """Code -> (label, group) of every emoji in a group we keep."""
    with tarfile.open(tarball) as archive:
        entries = json.loads(read_member(archive, LABELS[2]))
    kept = (entry for entry in entries if entry.get("group") in GROUPS)
    return {plain_code(e["hexcode"]): (e["label"], GROUPS[e["group"]]) for e in kept}


def read_images(tarball: Path, prefix: str, codes: set[str]) -> Iterator[tuple[str, Image.Image]]:
    """Images of the wanted codes in a tarball, as (code, RGBA image)."""
    with tarfile.open(tarball) as archive:
        for member in archive:
            code = plain_code(Path(member.name).stem)
            if member.name.startswith(prefix) and code in codes:
                data = io.BytesIO(read_member(archive, member))
                yield code, Image.open(data).convert("RGBA")


def fit(image: Image.Image, size: int = SIZE) -> np.ndarray:
    """Crop an RGBA image to its paint and centre it, longest side `size`: (size, size, 4) uint8."""
    image = image.crop(image.getchannel("A").point(lambda a: 255 * (a > 8)).getbbox())
    scale = size / max(image.size)
    shape = [max(1, round(side * scale)) for side in image.size]
    image = image.convert("RGBa").resize(shape, Image.Resampling.LANCZOS).convert("RGBA")
    canvas = Image.new("RGBA", (size, size))
    canvas.paste(image, ((size - shape[0]) // 2, (size - shape[1]) // 2))
    return np.asarray(canvas)


def collect(tarballs: Path) -> tuple[list[dict[str, str]], list[np.ndarray]]:
    """Index rows and sprites of every concept that has all styles, in the order of the labels."""
    labels = read_labels(find_tarball(*LABELS[:2], tarballs))
    found = {
        style: {
            code: fit(image)
            for code, image in read_images(
                find_tarball(name, version, tarballs), prefix, set(labels)
            )
        }
        for style, (name, version, prefix) in STYLES.items()
    }
    codes = [code for code in labels if all(code in images for images in found.values())]
    rows = [
        {"label": labels[code][0], "group": labels[code][1], "style": style, "code": code}
        for code in codes
        for style in STYLES
    ]
    return rows, [found[row["style"]][row["code"]] for row in rows]


def save(folder: Path, rows: list[dict[str, str]], images: list[np.ndarray]) -> None:
    """Write `sprites.webp` (lossless atlas) and `sprites.json` (its rows) into `folder`."""
    height = -(-len(images) // COLUMNS)
    atlas = np.zeros((height * SIZE, COLUMNS * SIZE, 4), np.uint8)
    for i, image in enumerate(images):
        y, x = divmod(i, COLUMNS)
        atlas[y * SIZE : (y + 1) * SIZE, x * SIZE : (x + 1) * SIZE] = image
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as name:
        Image.fromarray(atlas).save(
            Path(name) / "sprites.webp", lossless=True, quality=100, method=4
        )
        (Path(name) / "sprites.json").write_text(json.dumps({"size": SIZE, "rows": rows}))
        for part in ("sprites.webp", "sprites.json"):
            os.replace(Path(name) / part, folder / part)


def core_nouns() -> dict[str, str]:
    """Emoji label -> caption noun of the core vocabulary."""
    lines = (files("retour.data") / "core.tsv").read_text("utf-8").splitlines()
    pairs = (line.split("\t") for line in lines if line and not line.startswith("#"))
    return {pair[0]: pair[-1] for pair in pairs}


def nouns_for(labels: list[str], concepts: str) -> dict[str, str]:
    """Label -> noun of the vocabulary `concepts`: "core", or "all" (other labels as they are)."""
    if concepts not in ("core", "all"):
        raise ValueError(f"concepts must be 'core' or 'all', not {concepts!r}")
    nouns = core_nouns()
    if concepts == "core":
        return nouns
    taken = {noun.rstrip("*") for noun in nouns.values()}
    rest = {label: label.lower() for label in labels if label not in nouns}
    return nouns | {label: noun for label, noun in rest.items() if noun not in taken}


def load(folder: str | Path, concepts: str = "core") -> Sprites:
    """Sprites of a cache made by `save`, under the nouns of the vocabulary `concepts`."""
    folder = Path(folder)
    rows = json.loads((folder / "sprites.json").read_text())["rows"]
    atlas = np.asarray(Image.open(folder / "sprites.webp").convert("RGBA"))
    nouns = nouns_for([row["label"] for row in rows], concepts)
    images, groups = {}, {}
    for i, row in enumerate(rows):
        if row["label"] in nouns:
            y, x = divmod(i, COLUMNS)
            cell = atlas[y * SIZE : (y + 1) * SIZE, x * SIZE : (x + 1) * SIZE]
            images[nouns[row["label"]], row["style"]] = cell
            groups[nouns[row["label"]]] = row["group"]
    return Sprites(images, groups)


def main() -> None:
    """Build the cache from the command line."""
    parser = argparse.ArgumentParser(prog="python -m retour.data.sprites", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the cache")
    parser.add_argument("--tarballs", type=Path, help="folder with (or for) the npm tarballs")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        rows, images = collect(options.tarballs or Path(scratch))
    save(options.out, rows, images)


if __name__ == "__main__":
    main()
