"""A list of edits of a user's own pictures, from CSV or JSON lines, checked line by line.

Columns: `image` and `target`; and, where wanted, `source` (else the caption proposer says what the
picture shows), `inverter` (else the editor's own), `editor`, `steps`, `guidance`, `mask` and
`options`. Options are `key=value` pairs with blanks or semicolons between, in JSON lines also an
object; a key is the editor's, or `NAME.key` of the inverter or editor of that name (`inverter.key`
where both have the same). Pictures and masks are named from the folder that holds them, and nothing
outside of it is read.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..api import usual_inverter
from ..core.cache import content_hash, pixel_hash
from ..core.model import Model
from ..core.registry import get
from ..errors import RetourError, check_range, unknown
from ..io import plain, read_image
from .cases import Case
from .plan import MAX_GUIDANCE, MAX_STEPS, Run, make_run

COLUMNS = (
    *("image", "source", "target", "inverter", "editor", "steps", "guidance", "mask", "options"),
)
SUFFIXES = (".csv", ".jsonl")
SHOWN = 10


@dataclass(frozen=True)
class JobSpec:
    """One line of the list.

    Attributes:
        line: its number in the file.
        id: name of its output.
        image: the picture's file.
        size: (width, height) of the picture.
        pixels: hash of the picture, and of its mask.
        source: prompt of the input; None asks the caption proposer.
        target: prompt of the edit.
        mask: the mask's file; None for none.
        run: what is done.
    """

    line: int
    id: str
    image: Path
    size: tuple[int, int]
    pixels: tuple[str, ...]
    source: str | None
    target: str
    mask: Path | None
    run: Run

    def case(self) -> Case:
        """Read it."""
        image = read_image(self.image)
        mask = None if self.mask is None else read_mask(self.mask, self.size)
        return Case(self.id, "", "", self.source, self.target, image, mask)


def read_jobs(
    path: Path, folder: Path, model: Model, *, inverter: str | None, editor: str, **usual: Any
) -> list[JobSpec]:
    """Read and check a list of jobs.

    Args:
        path: the list, `.csv` or `.jsonl`.
        folder: holds the pictures.
        model: must serve every line.
        inverter: where a line names none; None: the editor's own.
        editor: where a line names none.
        usual: `steps` and `guidance` where a line names none.

    Raises:
        RetourError: the list cannot be read, or lines of it cannot be run; they are named.
    """
    if not folder.is_dir():
        raise RetourError(f"there is no folder '{folder}': name the one that holds the pictures")
    specs: list[JobSpec] = []
    bad: list[str] = []
    lines = list(_lines(path))
    for number, (line, values) in enumerate(lines, 1):
        try:
            if isinstance(values, RetourError):
                raise values
            given = {"inverter": inverter, "editor": editor, **usual, **_known(values)}
            specs.append(_spec(number, line, given, folder, model))
        except RetourError as error:
            bad.append(f"line {line}: {str(error).rstrip('.')}")
    if bad:
        more = f"; and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        raise RetourError(
            f"{len(bad)} of {len(lines)} jobs in '{path}' cannot run: "
            + "; ".join(bad[:SHOWN])
            + more
        )
    if not specs:
        raise RetourError(f"'{path}' holds no jobs: give at least one line with image and target")
    return _labelled(specs)


def _lines(path: Path) -> Iterator[tuple[int, Mapping[str, Any] | RetourError]]:
    """(line number, values by column) of every job; an error for a line that cannot be read."""
    if path.suffix.lower() not in SUFFIXES:
        raise RetourError(f"'{path}' is no list of jobs: name a .csv or .jsonl file")
    if not path.is_file():
        raise RetourError(f"there is no file '{path}': name the list of jobs")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RetourError(f"cannot read '{path}' ({error}): give a list in UTF-8") from None
    yield from _csv_lines(text, path) if path.suffix.lower() == ".csv" else _json_lines(text)


def _csv_lines(text: str, path: Path) -> Iterator[tuple[int, Mapping[str, Any] | RetourError]]:
    reader = csv.DictReader(text.splitlines(keepends=True), strict=True)
    try:
        names = [(name or "").strip() for name in reader.fieldnames or ()]
        missing = {"image", "target"} - set(names)
        if missing:
            raise RetourError(
                f"the first line of '{path}' names no column {' and '.join(sorted(missing))}: "
                f"begin with names among {', '.join(COLUMNS)}, with commas between"
            )
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise RetourError(f"the first line of '{path}' names {' and '.join(twice)} twice")
        for row in reader:
            if None in row:
                wide = RetourError("it has more values than columns: quote text with commas")
                yield reader.line_num, wide
            else:
                yield reader.line_num, {key.strip(): value for key, value in row.items()}
    except csv.Error as error:
        raise RetourError(f"line {reader.line_num} of '{path}' is no CSV ({error})") from None


def _json_lines(text: str) -> Iterator[tuple[int, Mapping[str, Any] | RetourError]]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield number, RetourError(f"it is no JSON ({error})")
            continue
        whole = isinstance(values, dict)
        yield number, values if whole else RetourError("it is no JSON object")


def _known(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values that were given; a column that nobody knows is refused."""
    for name in values:
        if name not in COLUMNS:
            raise unknown("column", name, COLUMNS)
    empty = (None, "")
    stripped = {k: v.strip() if isinstance(v, str) else v for k, v in values.items()}
    return {k: v for k, v in stripped.items() if v not in empty}


def _spec(number: int, line: int, given: Mapping[str, Any], folder: Path, model: Model) -> JobSpec:
    for name in ("image", "target"):
        if name not in given:
            raise RetourError(f"it has no {name}")
    for name in ("image", "source", "target", "inverter", "editor", "mask"):
        if not isinstance(given.get(name), (str, type(None))):
            raise RetourError(f"{name} is {given[name]!r}: give text")
    image = _inside(folder, given["image"])
    picture = read_image(image)
    pixels = [pixel_hash(picture)]
    mask = None if given.get("mask") is None else _inside(folder, given["mask"])
    if mask is not None:
        pixels.append(pixel_hash(Image.fromarray(read_mask(mask, picture.size))))
    run = _run(given, model, masked=mask is not None)
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", image.stem).strip("-")[:60]
    return JobSpec(
        line=line,
        id=f"{number:04d}-{stem}".rstrip("-"),
        image=image,
        size=picture.size,
        pixels=tuple(pixels),
        source=given.get("source"),
        target=given["target"],
        mask=mask,
        run=run,
    )


def _run(given: Mapping[str, Any], model: Model, *, masked: bool) -> Run:
    editor = get("edit", given["editor"]).name
    inverter = given.get("inverter") or usual_inverter(editor, model)
    up, down = _options(given.get("options", {}), inverter, editor)
    steps, guidance = given.get("steps"), given.get("guidance")
    run = make_run(
        model,
        inverter,
        editor,
        up,
        down,
        steps=None if steps is None else _whole(steps),
        guidance=None if guidance is None else _number(guidance),
    )
    if run.masked and not masked:
        raise RetourError(f"editor {editor!r} needs a mask: name one")
    return replace(run, masked=masked)


def _options(given: Any, inverter: str, editor: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of the inverter and of the editor."""
    up: dict[str, Any] = {}
    down: dict[str, Any] = {}
    for key, value in (given if isinstance(given, dict) else _pairs(given)).items():
        name, dot, rest = key.partition(".")
        option = (rest if dot else name).replace("-", "_")
        if not dot or name in ("editor", editor):
            down[option] = value
        elif name in ("inverter", inverter):
            up[option] = value
        else:
            raise RetourError(f"option {key!r} is of {name!r}, which this line does not run")
    return up, down


def _pairs(text: Any) -> dict[str, str]:
    if not isinstance(text, str):
        raise RetourError(f"options are {text!r}: write key=value, with blanks between")
    pairs = {}
    for part in re.split(r"[;\s]+", text.strip(" ;")):
        key, sign, value = part.partition("=")
        if not sign or not key:
            raise RetourError(f"options are written key=value, got {part!r}")
        pairs[key] = value
    return pairs


def _whole(value: Any) -> int:
    try:
        number = int(value) if isinstance(value, str) else value
    except ValueError:
        number = value
    if isinstance(number, bool) or not isinstance(number, int):
        raise RetourError(f"steps is {value!r}: give a whole number")
    check_range("steps", number, 1, MAX_STEPS)
    return number


def _number(value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise RetourError(f"guidance is {value!r}: give a number") from None
    check_range("guidance", number, 0, MAX_GUIDANCE)
    return number


def _inside(folder: Path, name: str) -> Path:
    path = folder / name
    try:
        resolved = path.resolve()
    except (OSError, ValueError, RuntimeError) as error:
        raise RetourError(f"{name!r} is no path ({error})") from None
    if not resolved.is_relative_to(folder.resolve()):
        raise RetourError(f"{name!r} lies outside of '{folder}': name pictures inside of it")
    return path


def read_mask(path: Path, size: tuple[int, int]) -> np.ndarray:
    """A mask file as (H, W) bool at a picture's size: at least half white counts."""
    mask = np.asarray(read_image(path).convert("L").resize(size)) > 127
    if not mask.any():
        raise RetourError(f"mask '{path.name}' is black everywhere: paint white what may change")
    return mask


def _labelled(specs: list[JobSpec]) -> list[JobSpec]:
    """Give different runs of the same pair different labels."""
    labels: dict[str, str] = {}
    taken: dict[str, int] = {}
    labelled = []
    for spec in specs:
        key = run_key(spec.run)
        if key not in labels:
            count = taken[spec.run.label] = taken.get(spec.run.label, 0) + 1
            labels[key] = spec.run.label if count == 1 else f"{spec.run.label}-{count}"
        labelled.append(replace(spec, run=replace(spec.run, label=labels[key])))
    return labelled


def run_key(run: Run) -> str:
    """Equal for runs that do the same, whatever their labels."""
    return content_hash(plain(replace(run, label="")))
