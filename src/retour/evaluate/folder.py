"""The folder that a benchmark fills: its plan, its finished pieces, its pictures.

A piece is kept when all its pictures are there: they are written first, then `parts/BATCH-RUN
.parquet`, each under a temporary name and then renamed. A process killed at any moment leaves whole
pieces and, at most, temporary files, which the next one removes. What is not a whole piece of this
plan is done again.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from ..core.cache import content_hash
from ..errors import RetourError
from ..io import atomic_write, plain, save_image, save_json
from .cases import Case
from .work import COSTS, COUNTS, TEXTS, Piece, mask_image

if TYPE_CHECKING:
    import pyarrow

PLAN, RESULTS, SUMMARY, LOCK = "plan.json", "results.parquet", "summary.json", ".lock"
CACHE = "cache"
FOLDERS = ("parts", "inputs", "truth", "masks", "images")
TEMPORARY = re.compile(r"\.[0-9a-f]{16}\.[a-z]+")

# What may differ between the command that began a folder and the one that goes on with it.
FREE = ("id", "created", "command", "threads")


@dataclass(frozen=True)
class Folder:
    """A benchmark's folder.

    Attributes:
        path: where it is.
        metrics: names of the float columns between the facts and the costs.
        more: further columns at the end, name -> type ("string" or "int64").
    """

    path: Path
    metrics: tuple[str, ...] = ()
    more: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        need_pyarrow()

    @contextlib.contextmanager
    def opened(self, plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Make the folder, or go on with one of the same plan; gives the plan that holds.

        Raises:
            RetourError: it cannot be written, holds another plan, or another process works in it.
        """
        held = read_plan(self.path)
        if held is not None:
            refuse_other(self.path, held, plan)
        elif self.path.is_dir() and any(p.name != LOCK for p in self.path.iterdir()):
            raise RetourError(f"'{self.path}' holds other files and no {PLAN}: choose a new folder")
        try:
            for name in FOLDERS:
                (self.path / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RetourError(
                f"cannot write to '{self.path}' ({error.strerror}): choose another folder"
            ) from None
        with locked(self.path / LOCK):
            self._sweep()
            if held is None:
                save_json(plan, self.path / PLAN)
            yield plan if held is None else held

    def _sweep(self) -> None:
        """Remove what a killed process had not renamed yet."""
        for path in self.path.rglob(".*"):
            if TEMPORARY.fullmatch(path.name) and path.is_file():
                path.unlink()

    def part(self, batch: int, run: str) -> Path:
        """File of a piece."""
        return self.path / "parts" / f"{batch:05d}-{run}.parquet"

    def write(self, piece: Piece, pictures: Sequence[Image.Image]) -> None:
        """Keep a piece, its outputs as the given pictures."""
        (self.path / "images" / piece.run).mkdir(exist_ok=True)
        for row, image in zip(piece.rows, pictures, strict=True):
            save_image(image, self.path / row["image"], piece.record or None)
        self.write_table(piece.rows, self.part(piece.batch, piece.run))

    def read(self, batch: int, run: str, items: Sequence[str]) -> list[dict[str, Any]] | None:
        """Rows of a finished piece; None if it is not there, or not whole."""
        import pyarrow
        import pyarrow.parquet

        path = self.part(batch, run)
        if not path.is_file():
            return None
        try:
            table = pyarrow.parquet.read_table(path, partitioning=None)
        except (OSError, pyarrow.ArrowException):
            return None
        rows = table.to_pylist()
        names = [(row.get("run"), row.get("item")) for row in rows]
        whole = table.schema.equals(self.schema()) and names == [(run, item) for item in items]
        pictures = [self.path / "images" / run / f"{item}.png" for item in items]
        return rows if whole and all(p.is_file() for p in pictures) else None

    def write_case(self, case: Case) -> None:
        """Keep a case's input, and its true edited image and mask where they are known."""
        found = {"inputs": case.image, "truth": case.truth}
        found["masks"] = None if case.mask is None else mask_image(case).convert("L")
        for name, image in found.items():
            path = self.path / name / f"{case.id}.png"
            if image is not None and not path.is_file():
                save_image(image, path)

    def write_table(self, rows: Sequence[Mapping[str, Any]], path: Path) -> None:
        """Write rows as Parquet."""
        import pyarrow
        import pyarrow.parquet

        table = pyarrow.Table.from_pylist(list(rows), schema=self.schema())
        with atomic_write(path) as temporary:
            pyarrow.parquet.write_table(table, temporary)

    def schema(self) -> pyarrow.Schema:
        """Columns of the rows, in order."""
        import pyarrow

        floats = dict.fromkeys(("guidance", *self.metrics, *COSTS), "float64")
        types = dict.fromkeys(TEXTS, "string") | dict.fromkeys(COUNTS, "int64") | floats
        facts = [name for name in TEXTS if name != "image"]
        order = [*facts, "steps", "guidance", "batch", *self.metrics, *COSTS, "image"]
        fields = [(name, types[name]) for name in order] + list(self.more.items())
        return pyarrow.schema([(name, getattr(pyarrow, kind)()) for name, kind in fields])


def read_plan(path: Path) -> dict[str, Any] | None:
    """The plan of a folder; None if it has none.

    Raises:
        RetourError: there is one that cannot be read.
    """
    try:
        plan = json.loads((path / PLAN).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        if path.exists() and not path.is_dir():
            raise RetourError(f"'{path}' is a file: choose a folder") from None
        return None
    except (OSError, ValueError) as error:
        raise RetourError(f"cannot read '{path / PLAN}' ({error}): choose another folder") from None
    if not isinstance(plan, dict):
        raise RetourError(f"'{path / PLAN}' is no plan of a benchmark: choose another folder")
    return plan


def refuse_other(path: Path, held: Mapping[str, Any], plan: Mapping[str, Any]) -> None:
    """Refuse to go on with a folder whose plan is another one; says what differs."""
    wanted = plain(dict(plan))
    keys = [key for key in dict.fromkeys([*held, *wanted]) if key not in FREE]
    differing = [k for k in keys if content_hash(held.get(k)) != content_hash(wanted.get(k))]
    if differing:
        raise RetourError(
            f"'{path}' holds another plan ({', '.join(differing)} "
            f"{'differs' if len(differing) == 1 else 'differ'}): "
            "repeat the command that began it, or choose another folder"
        )


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock that ends with this process, however it ends."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RetourError(
                f"another process works in '{path.parent}': wait for it, or choose another folder"
            ) from None
        yield


def need_pyarrow() -> None:
    """Refuse to begin without the package that writes the results."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise RetourError(
            'results are written with pyarrow, which is not installed: pip install "retour[eval]"'
        ) from None
