"""The demonstration and the README's gallery: real edits on the embedded models, on one sheet.

`examples/gallery.json` lists pictures with their prompts and the edits to make of them. All
pictures are inverted in one batch for each inverter, and all edits with equal options are made in
one batch.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from . import api
from .core.state import Inversion
from .errors import RetourError
from .io import read_image, save_image, save_json
from .models.load import load

CELL = 160
TEXT = 46
COLUMNS = 4


@dataclass(frozen=True)
class Edit:
    """One edit of the gallery.

    Attributes:
        image: name of the picture.
        kind: what is edited, for the caption.
        target: target prompt.
        model: embedded model.
        inverter: registered inverter.
        editor: registered editor.
        invert_options: options of the inverter.
        edit_options: options of the editor.
        guidance: guidance scale; None: the model's.
        demo: whether the short demonstration shows it too.
    """

    image: str
    kind: str
    target: str
    model: str = "emoji-unet"
    inverter: str = "direct"
    editor: str = "p2p"
    invert_options: dict[str, Any] = field(default_factory=dict)
    edit_options: dict[str, Any] = field(default_factory=dict)
    guidance: float | None = None
    demo: bool = False


@dataclass(frozen=True)
class Done:
    """An edit and its pictures."""

    edit: Edit
    prompt: str
    before: Image.Image
    after: Image.Image
    record: dict[str, Any]


def examples() -> tuple[dict[str, tuple[Image.Image, str]], list[Edit]]:
    """The pictures (name -> picture, prompt) and the edits of the gallery."""
    folder = Path(str(files("retour") / "examples"))
    listing = json.loads((folder / "gallery.json").read_text(encoding="utf-8"))
    pictures = {
        name: (read_image(folder / f"{name}.png"), image["prompt"])
        for name, image in listing["images"].items()
    }
    return pictures, [Edit(**edit) for edit in listing["edits"]]


def run(out: Path, *, full: bool = False) -> dict[str, Any]:
    """Make the edits, write every picture and the sheet into `out`; return the record."""
    begun = time.perf_counter()
    _make_folder(out)
    pictures, edits = examples()
    done = list(make([e for e in edits if full or e.demo], pictures))
    for number, item in enumerate(done):
        save_image(item.after, out / f"{number + 1:02d}-{item.edit.kind}.png", item.record)
    path = out / "contact-sheet.png"
    save_image(sheet(done), path)
    record = {
        "task": "demo",
        "sheet": str(path),
        "edits": len(done),
        "nfe": sum(item.record["nfe"] for item in done),
        "seconds": time.perf_counter() - begun,
    }
    save_json({**record, "runs": [item.record for item in done]}, out / "record.json")
    return record


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RetourError(
            f"cannot make the folder '{out}' ({error.strerror}): choose another"
        ) from None


def make(edits: Sequence[Edit], pictures: dict[str, tuple[Image.Image, str]]) -> Iterator[Done]:
    """Make the edits, one batch for each set of equal options, in the order given."""
    done: dict[int, Done] = {}
    for numbers in _groups(edits, ("model", "inverter", "invert_options", "guidance")):
        some = [edits[i] for i in numbers]
        names = sorted({e.image for e in some})
        inversion = _invert(some[0], [pictures[n] for n in names])
        for inner in _groups(some, ("editor", "edit_options")):
            batch = [some[i] for i in inner]
            result = _edit(inversion.take([names.index(e.image) for e in batch]), batch)
            for place, edit, image in zip(inner, batch, result.images, strict=True):
                picture, prompt = pictures[edit.image]
                done[numbers[place]] = Done(edit, prompt, picture, image, result.record)
    return iter(done[i] for i in range(len(edits)))


def _groups(edits: Sequence[Edit], keys: Sequence[str]) -> list[list[int]]:
    """Indices of the edits that share all of `keys`."""
    groups: dict[str, list[int]] = {}
    for number, edit in enumerate(edits):
        key = json.dumps([getattr(edit, k) for k in keys], sort_keys=True)
        groups.setdefault(key, []).append(number)
    return list(groups.values())


def _invert(edit: Edit, pictures: Sequence[tuple[Image.Image, str]]) -> Inversion:
    return api.invert(
        load(edit.model),
        [picture for picture, _ in pictures],
        [prompt for _, prompt in pictures],
        method=edit.inverter,
        guidance=edit.guidance,
        **edit.invert_options,
    )


def _edit(inversion: Inversion, edits: Sequence[Edit]) -> api.Result:
    return api.edit(
        inversion,
        [e.target for e in edits],
        editor=edits[0].editor,
        **edits[0].edit_options,
    )


# --- The sheet ------------------------------------------------------------------------------------


def sheet(done: Sequence[Done], columns: int = COLUMNS) -> Image.Image:
    """Before and after of every edit, with the words that changed."""
    rows = -(-len(done) // columns)
    width, height = 2 * CELL + 12, CELL + TEXT + 10
    page = Image.new("RGB", (columns * width + 12, rows * height + 12), "white")
    for number, item in enumerate(done):
        tile = _tile(item, width, height)
        page.paste(tile, (12 + number % columns * width, 12 + number // columns * height))
    return page


def _tile(item: Done, width: int, height: int) -> Image.Image:
    tile = Image.new("RGB", (width, height), "white")
    for place, image in enumerate((item.before, item.after)):
        large = image.resize((CELL - 2, CELL - 2), Image.Resampling.LANCZOS)
        tile.paste(large, (place * CELL, 0))
    draw = ImageDraw.Draw(tile)
    small = ImageFont.load_default(11)
    draw.text((0, CELL + 2), f"{item.edit.kind}: {change(item)}", "black", small)
    how = f"{item.edit.inverter} + {item.edit.editor}, {item.edit.model}"
    draw.text((0, CELL + 18), how, "gray", small)
    return tile


def change(item: Done) -> str:
    """What the target prompt says that the source does not, and the other way round."""
    before, after = item.prompt.split(), item.edit.target.split()
    gone = " ".join(w for w in before if w not in after)
    come = " ".join(w for w in after if w not in before)
    if not gone and not come:
        return str(item.edit.edit_options.get("reweight", "same words"))
    return f"{gone} -> {come}" if gone and come else f"+ {come}" if come else f"- {gone}"
