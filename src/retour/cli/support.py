"""What several commands do: read options, take an inversion, print."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..errors import RetourError
from ..io import (
    ANIMATED,
    WRITABLE,
    check_writable,
    is_clip,
    plain,
    read_clip,
    read_picture,
)
from .arguments import DEFAULT_MODEL, INVERSION_SUFFIX

if TYPE_CHECKING:
    from ..core.model import Model
    from ..core.state import Inversion


MOST_NAMED = 4


def outputs(out: Path, count: int, reads: Sequence[Path | None]) -> list[Path]:
    """`out` itself, or `out-1`, `out-2`, ... for several targets; all checked before any work.

    None of them may be a file that is read.
    """
    many = [out.with_name(f"{out.stem}-{k + 1}{out.suffix}") for k in range(count)]
    paths = [out] if count == 1 else many
    for path in paths:
        check_writable(path, WRITABLE, reads)
    return paths


def key_values(options: Sequence[str] | None) -> dict[str, Any]:
    """Options written KEY=VALUE, by key."""
    pairs: dict[str, Any] = {}
    for option in [] if options is None else options:
        key, sign, value = option.partition("=")
        if not sign or not key:
            raise RetourError(f"method options are written KEY=VALUE, got {option!r}")
        pairs[key.replace("-", "_")] = value
    return pairs


def check_method(task: str, name: str, options: Sequence[str] | None) -> None:
    """Refuse an unknown method or option before any model is loaded."""
    from ..core.registry import get

    get(task, name).make(**key_values(options))


def check_source(source: str | None) -> None:
    """Refuse an empty source prompt; none at all is fine."""
    if source is not None and not source.strip():
        raise RetourError("the source prompt is empty: say what the picture shows, or leave it out")


def load_model(name: str, device: str | None, dtype: str | None) -> Model:
    """The model that the options name."""
    from ..models.load import load

    return load(name, device=device, dtype=dtype)


def inversion_of(
    image: Path,
    source: str | None,
    model: str | None,
    device: str | None,
    dtype: str | None,
    options: Sequence[str] | None,
    method: str | None,
    *,
    editor: str = "",
    usual: str | None = None,
    outs: Sequence[Path] = (),
    check: Callable[[Inversion], None] | None = None,
    later: Collection[str] = (),
    **settings: Any,
) -> Inversion:
    """Read an inversion file, or invert a picture (by default the `usual` way, or the editor's).

    A folder of frames or an animated picture is a clip, to a model of clips, which all of `outs`
    must be able to hold. `check` refuses what cannot follow, before the inversion is made. Settings
    are refused for an inversion that is there, but for those that matter `later`.
    """
    from .. import api
    from ..core.state import Inversion

    if image.suffix == INVERSION_SUFFIX:
        given = {"source": source, "inverter": method, "I": options or None}
        given |= {k: v for k, v in settings.items() if k not in later and v not in ("", 0)}
        _refuse_settings(image, [k for k, v in given.items() if v is not None])
        stored = Inversion.load(image)
        name = stored.model_name if model is None else model
        stored.attach(load_model(name, device, dtype), source=repr(str(image)))
        return stored
    check_source(source)
    method = usual if method is None else method
    if method is not None:
        check_method("invert", method, options)
    clip = is_clip(image)
    shown: Any = None if clip else read_picture(image).image
    loaded = load_model(DEFAULT_MODEL if model is None else model, device, dtype)
    if "video" in loaded.capabilities:
        for path in outs:
            check_writable(path, ANIMATED)
    if clip and "video" in loaded.capabilities:
        shown = read_clip(image)
    elif clip:
        shown = read_picture(image).image  # its first frame, with a warning; a folder is refused
    if method is None:
        method = api.usual_inverter(editor, loaded)
        check_method("invert", method, options)
    inversion = api.invert(
        loaded, shown, source, method=method, check=check, **settings, **key_values(options)
    )
    if source is None:
        say(f"source prompt (guessed): {inversion.prompts[0]!r}")
    return inversion


def _refuse_settings(image: Path, names: Sequence[str]) -> None:
    if names:
        listed = ", ".join(f"-{name}" if len(name) == 1 else f"--{name}" for name in names)
        raise RetourError(
            f"'{image}' is an inversion, made with settings of its own: leave out {listed}, "
            "or give the picture to have it inverted anew"
        )


def print_record(record: dict[str, Any], outs: Sequence[Path], as_json: bool) -> None:
    """Say what was written and what it cost, or print the whole record."""
    if as_json:
        print_json(plain({**record, "outputs": [str(path) for path in outs]}))
        return
    names = ", ".join(str(path) for path in outs[:MOST_NAMED])
    if len(outs) > MOST_NAMED:
        names += f" and {len(outs) - MOST_NAMED} more files"
    typer.echo(
        f"wrote {names} ({record['nfe']:.0f} network evaluations, {record['seconds']:.1f} s)"
    )


def say(text: str) -> None:
    """Print to standard error."""
    typer.echo(text, err=True)


def print_json(value: Any) -> None:
    """Print a value as JSON."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def print_table(head: Sequence[str], rows: Any) -> None:
    """Print rows of text under a head, in columns."""
    table = [tuple(head), *rows]
    widths = [max(len(row[k]) for row in table) for k in range(len(head))]
    for row in table:
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        typer.echo(line.rstrip())
