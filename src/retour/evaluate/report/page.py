"""The page: data and template brought together, and written in one piece.

The page needs no network, and says so to the browser: its content security policy allows its
own script and style (by their hashes) and data URIs, nothing else. All data is escaped: text by
the template, JSON blocks by writing `<`, `>` and `&` as escapes, so that nothing in them ends
a script element.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import RetourError, check_range
from ...io import atomic_write, check_writable, plain
from . import header, overlays, tables
from .folder import Bench
from .pictures import gallery
from .prompts import compare

if TYPE_CHECKING:
    from jinja2 import Environment

MAX_MIB = 32.0
MIB = 2**20
NAME = "report.html"
WRAPPER = 80  # Bytes around the pictures of one edit, at most.
TEMPLATE, STYLE = "page.html.jinja", "page.css"
SCRIPTS = (
    *("base.js", "table.js", "compare.js", "plot.js"),
    *("gallery.js", "viewer.js", "main.js"),
)
_ESCAPES = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}


@dataclass(frozen=True)
class Report:
    """A page that was written.

    Attributes:
        path: where it lies.
        size: its bytes.
        notes: sentences on what was left out.
    """

    path: Path
    size: int
    notes: tuple[str, ...]


def report(
    folder: str | PathLike[str],
    out: str | PathLike[str] | None = None,
    *,
    attention: int = 0,
    max_mib: float = MAX_MIB,
) -> Report:
    """Write one self-contained HTML page of a folder that `retour bench` has finished.

    Args:
        folder: what the bench wrote.
        out: the page; None writes `report.html` into the folder.
        attention: items to draw attention overlays of first (needs the model that ran).
        max_mib: how large the pictures may make the page.

    Raises:
        RetourError: the folder is damaged or unfinished, or the page cannot be written; nothing
            is left half-written.
    """
    check_range("the page's size in MiB", max_mib, 1)
    environment = _environment()
    bench = Bench.read(Path(folder))
    target = check_writable(Path(folder) / NAME if out is None else Path(out), {".html", ".htm"})
    if attention:
        overlays.draw(bench, attention)
    text, notes = render(environment, bench, max_mib)
    payload = text.encode("utf-8", "backslashreplace")
    with atomic_write(target) as temporary:
        temporary.write_bytes(payload)
    return Report(target, len(payload), notes)


def render(environment: Environment, bench: Bench, max_mib: float) -> tuple[str, tuple[str, ...]]:
    """The page's text, and the sentences on what it leaves out."""
    fixed = _fixed(bench)
    template = environment.get_template(TEMPLATE)
    notes = _notes(bench, 0, max_mib)
    bare = template.render(**fixed, **_shown({}), notes=notes)
    used = len(bare.encode("utf-8", "backslashreplace")) + WRAPPER * len(bench.edits)
    pictures = gallery(bench, int(max_mib * MIB) - used)
    notes = _notes(bench, len(pictures), max_mib)
    return template.render(**fixed, **_shown(pictures), notes=notes), notes


def _fixed(bench: Bench) -> dict[str, Any]:
    """Everything of the page but its pictures, for the template."""
    from markupsafe import Markup

    found = tables.columns(bench)
    data = page_data(bench, found)
    script, style = _own(SCRIPTS), _own([STYLE])
    return {
        "title": header.title(bench),
        "lead": header.lead(bench),
        "facts": header.facts(bench),
        "versions": header.versions(bench),
        "command": header.command(bench),
        "columns": found,
        "runs": bench.runs,
        "cells": data["cells"][""],
        "kinds": data["kinds"],
        "data": Markup(escaped(data)),
        "script": Markup(script),
        "style": Markup(style),
        "policy": policy(script, style),
    }


def _shown(pictures: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """The pictures, and which layers there are of them."""
    from markupsafe import Markup

    return {
        "pictures": [(k, Markup(escaped(shown))) for k, shown in pictures.items()],
        "layers": {
            "masks": any(shown["mask"] for shown in pictures.values()),
            "attention": any(any(shown["attention"]) for shown in pictures.values()),
        },
    }


def page_data(bench: Bench, found: Sequence[tables.Column]) -> dict[str, Any]:
    """Everything but the pictures, as JSON values; key "" of a kind stands for all edits."""
    kinds = [("", len(bench.edits))]
    kinds += [(kind, int(bench.of_kind(kind).sum())) for kind in bench.kinds]
    columns = tuple(found)
    return {
        "columns": [asdict(column) for column in columns],
        "runs": [{**asdict(run), "reference": run.reference} for run in bench.runs],
        "kinds": [{"key": key, "name": spoken(key), "count": count} for key, count in kinds],
        "cells": {key: tables.cells(bench, columns, key or None) for key, _ in kinds},
        "differences": {key: tables.differences(bench, columns, key or None) for key, _ in kinds},
        "items": [_item(bench, columns, k) for k in range(len(bench.edits))],
        "axes": tables.default_axes(bench, columns),
    }


def _item(bench: Bench, columns: Sequence[tables.Column], item: int) -> dict[str, Any]:
    edit = bench.edits[item]
    source, target = compare(edit.source, edit.target)
    values = [
        [tables.json_number(float(bench.values[column.key][run, item])) for column in columns]
        for run in range(len(bench.runs))
    ]
    return {
        **{"id": edit.id, "kind": edit.kind, "split": edit.split},
        **{"source": source, "target": target, "values": values},
    }


def spoken(kind: str) -> str:
    """Name of a kind of edit as it is read."""
    return kind.replace("change_attribute_", "change_").replace("_", " ") if kind else "all"


def _notes(bench: Bench, shown: int, max_mib: float) -> tuple[str, ...]:
    notes = []
    if shown < len(bench.edits):
        notes.append(
            f"Pictures of {len(bench.edits) - shown} of {len(bench.edits)} edits are left out, to "
            f"keep the page below {max_mib:g} MiB; the figures are of all of them."
        )
    if len(bench.runs) > tables.MAX_RUNS_COMPARED:
        notes.append(
            f"Paired differences are left out: there are {len(bench.runs)} runs, and they are "
            f"shown for {tables.MAX_RUNS_COMPARED} at most."
        )
    return tuple(notes)


# --- Text -----------------------------------------------------------------------------------------


def escaped(value: Any) -> str:
    """JSON that may stand inside a script element."""
    text = json.dumps(plain(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.translate(_ESCAPES)


def policy(script: str, style: str) -> str:
    """The content security policy: this script, this style, and pictures within the page."""
    allowed = {"script-src": script, "style-src": style}
    hashes = [f"{where} 'sha256-{_sha256(text)}'" for where, text in allowed.items()]
    rest = ["img-src data:", "base-uri 'none'", "form-action 'none'"]
    return "; ".join(["default-src 'none'", *hashes, *rest])


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _own(names: Sequence[str]) -> str:
    folder = files(__package__)
    return "\n".join(folder.joinpath(name).read_text(encoding="utf-8") for name in names)


def _environment() -> Environment:
    try:
        from jinja2 import DictLoader, Environment, StrictUndefined
    except ImportError:
        raise RetourError(
            'a report is made with jinja2: install it with `pip install "retour[report]"`.'
        ) from None
    environment = Environment(
        loader=DictLoader({TEMPLATE: _own([TEMPLATE])}),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["figure"] = figure
    environment.filters["spoken"] = spoken
    return environment


def figure(value: float | str | None, digits: int) -> str:
    """A number as the page shows it; the script's `figure` says the same."""
    if value is None:
        return "n/a"
    if isinstance(value, str):
        return "∞" if value == "inf" else "−∞"
    return f"{value:.{digits}f}".replace("-", "−")
