"""Words' heat maps over pictures: the result of `retour.explain`, drawn and written."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .errors import RetourError
from .io import atomic_write, save_image, save_json
from .pictures import RECORD_SUFFIX

# From cold to hot: dark violet, magenta, orange, pale yellow; even steps of lightness.
RAMP = ((13, 8, 60), (126, 30, 120), (212, 72, 66), (250, 164, 40), (252, 252, 180))
COLD, HOT = 0.45, 0.8  # How much of the picture the ramp covers at 0 and at 1.
CELL, TEXT, GAP, COLUMNS = 128, 18, 6, 8

Cell = tuple[str, Image.Image]
Scale = Literal["word", "all"]
SCALES = ("word", "all")


@dataclass(frozen=True)
class Panel:
    """The words of one prompt on one picture.

    Attributes:
        branch: ``source`` or ``target``.
        image: which picture of the batch.
        prompt: the prompt.
        picture: what the maps are laid over.
        words: the words shown.
        maps: (words, h, w) float32, the mean attention probability of each word.
    """

    branch: str
    image: int
    prompt: str
    picture: Image.Image
    words: tuple[str, ...]
    maps: Tensor

    def heat(self, word: int, scale: Scale = "word") -> Tensor:
        """One word's map in [0, 1]: from its own least to its own largest, or to all words'."""
        maps = self.maps[word] if scale == "word" else self.maps
        low, high = maps.min(), maps.max()
        return (self.maps[word] - low) / (high - low).clamp_min(torch.finfo(maps.dtype).tiny)

    def overlay(self, word: int, scale: Scale = "word") -> Image.Image:
        """One word's map over the picture, at the picture's size."""
        return overlay(self.picture, self.heat(word, scale))


@dataclass
class Explanation:
    """Maps of all words, and the record of the run.

    Attributes:
        panels: one for each picture of the source, then of the target if there was one.
        scale: how the overlays are normalised.
        record: facts of the run.
    """

    panels: list[Panel]
    scale: Scale
    record: dict[str, Any] = field(default_factory=dict)

    def sheet(self) -> Image.Image:
        """Every picture with each word under its map, and the largest probability of the map."""
        return sheet(
            [
                (
                    f"{panel.branch}: {panel.prompt}",
                    panel.picture,
                    [
                        (f"{word} {float(panel.maps[k].max()):.2g}", panel.overlay(k, self.scale))
                        for k, word in enumerate(panel.words)
                    ],
                )
                for panel in self.panels
            ]
        )

    def save(self, folder: str | PathLike[str]) -> list[Path]:
        """Write the sheet, one picture for each word, and the maps; return the paths.

        Writes ``sheet.png`` with its record beside it, ``BRANCH-IMAGE-NN-word.png`` for each word,
        and ``maps.safetensors``: tensors BRANCH-IMAGE (words, h, w), prompts and words being in the
        header as JSON under "retour".
        """
        out = check_folder(folder)
        out.mkdir(parents=True, exist_ok=True)
        pictures = {out / "sheet.png": self.sheet()}
        for panel in self.panels:
            for k, word in enumerate(panel.words):
                name = f"{panel.branch}-{panel.image}-{k + 1:02d}-{_slug(word)}.png"
                pictures[out / name] = panel.overlay(k, self.scale)
        for path, picture in pictures.items():
            save_image(picture, path, self.record)
        self._save_maps(out / "maps.safetensors")
        save_json(self.record, out / f"sheet{RECORD_SUFFIX}")
        return [*pictures, out / "maps.safetensors"]

    def _save_maps(self, path: Path) -> None:
        from safetensors.torch import save

        named = {f"{p.branch}-{p.image}": p for p in self.panels}
        told = {name: {"prompt": p.prompt, "words": p.words} for name, p in named.items()}
        maps = {name: p.maps.contiguous() for name, p in named.items()}
        payload = save(maps, metadata={"retour": json.dumps(told)})
        with atomic_write(path) as temporary:
            temporary.write_bytes(payload)


# --- Drawing --------------------------------------------------------------------------------------


def overlay(picture: Image.Image, heat: Tensor) -> Image.Image:
    """Lay a map (h, w) in [0, 1] over a picture of any size: greyed, hot places in colour."""
    size = (picture.height, picture.width)
    grown = torch.nn.functional.interpolate(heat[None, None].float(), size, mode="bilinear")
    value = grown[0, 0].clamp(0, 1).numpy()[..., None]
    grey = np.asarray(picture.convert("L").convert("RGB"), np.float32)
    stops = np.linspace(0, 1, len(RAMP))
    colour = [np.interp(value[..., 0], stops, [stop[c] for stop in RAMP]) for c in range(3)]
    cover = COLD + (HOT - COLD) * value
    mixed = (1 - cover) * grey + cover * np.stack(colour, -1)
    return Image.fromarray(mixed.round().astype(np.uint8))


def sheet(groups: Sequence[tuple[str, Image.Image, Sequence[Cell]]]) -> Image.Image:
    """Groups of labelled pictures, one below the other: a title, a first picture, the cells."""
    blocks = [_block(*group) for group in groups]
    page = Image.new(
        "RGB", (max(b.width for b in blocks), sum(b.height for b in blocks) + GAP), "white"
    )
    top = 0
    for block in blocks:
        page.paste(block, (0, top))
        top += block.height
    return page


def _block(title: str, first: Image.Image, cells: Sequence[Cell]) -> Image.Image:
    cells = [("", first), *cells]
    columns = min(COLUMNS, len(cells))
    rows = -(-len(cells) // columns)
    step = CELL + GAP, CELL + TEXT + GAP
    font = ImageFont.load_default(12)
    width = max(columns * step[0] + GAP, 2 * GAP + round(font.getlength(title)))
    block = Image.new("RGB", (width, rows * step[1] + TEXT + 2 * GAP), "white")
    draw = ImageDraw.Draw(block)
    draw.text((GAP, GAP), title, "black", font)
    for number, (label, picture) in enumerate(cells):
        left = GAP + number % columns * step[0]
        top = TEXT + 2 * GAP + number // columns * step[1]
        block.paste(_cell(picture), (left, top))
        draw.text((left, top + CELL + 1), label, "black", font)
    return block


def _cell(picture: Image.Image) -> Image.Image:
    """A picture within a square cell, its proportions kept."""
    scale = CELL / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    cell = Image.new("RGB", (CELL, CELL), "white")
    cell.paste(picture.resize(size, Image.Resampling.LANCZOS), ((CELL - size[0]) // 2, 0))
    return cell


# --- Files ----------------------------------------------------------------------------------------


def check_folder(folder: str | PathLike[str]) -> Path:
    """Refuse a folder that cannot be written to, before any work; it need not exist yet."""
    path = Path(folder)
    try:
        there = next(p for p in (path, *path.absolute().parents) if p.exists())
    except (OSError, ValueError) as error:
        raise RetourError(f"cannot write to '{folder}' ({error}): check the path") from None
    if not there.is_dir():
        raise RetourError(f"'{there}' is not a folder: choose another place to write to")
    if not os.access(there, os.W_OK | os.X_OK):
        raise RetourError(f"you may not write to the folder '{there}': choose another one")
    return path


def _slug(word: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", word.lower()).strip("-") or "word"
