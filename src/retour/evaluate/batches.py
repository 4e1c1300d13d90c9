"""Edit many pictures of one's own: the benchmark's engine without its metrics.

Lines of the list that do the same are edited together, in batches of pictures that fit one canvas.
The output folder holds `images/`, one picture a line with its record inside, `results.parquet` and
`results.jsonl` (one line each: what was done, costs, the whole record). Called again with the same
arguments it goes on where it was stopped, also after `kill -9`.
"""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

from ..core.cache import LIMIT
from ..core.model import Model
from ..errors import check_range
from ..io import atomic_write, plain
from .cases import cut
from .engine import Rows, Setup, torch_threads, work_off
from .folder import CACHE, RESULTS, Folder
from .jobs import JobSpec, read_jobs, run_key
from .plan import MAX_GUIDANCE, MAX_STEPS, Task
from .runner import BATCH, check_workers, crew, describe, load_model, source_of, typed
from .scores import Meter
from .work import Piece

FORMAT = "retour-batch/1"
LINES = "results.jsonl"
MORE = {"line": "int64", "input": "string", "record": "string"}


@dataclass(frozen=True)
class Batch:
    """A finished list of jobs.

    Attributes:
        folder: where everything lies.
        plan: what was run.
        rows: one for each line of the list, in its order; columns as in `results.parquet`.
    """

    folder: Path
    plan: dict[str, Any]
    rows: Rows


def batch(
    folder: str | PathLike[str],
    jobs: str | PathLike[str],
    out: str | PathLike[str],
    *,
    model: str | Model = "emoji-unet",
    inverter: str | None = None,
    editor: str = "p2p",
    steps: int | None = None,
    guidance: float | None = None,
    negative: str = "",
    seed: int = 0,
    batch: int = BATCH,
    keep_size: bool = False,
    device: str | None = None,
    dtype: str | None = None,
    threads: int | None = None,
    cache_limit: int = LIMIT,
    cluster: str | None = None,
    workers: int | None = None,
    command: str | None = None,
) -> Batch:
    """Edit the pictures of a folder as a list says, or go on with that.

    Args:
        folder: holds the pictures and masks.
        jobs: the list, see :mod:`retour.evaluate.jobs`.
        out: where to write; a new or empty folder, or one that the same arguments began.
        model: name, folder or hub id; or a loaded model, unless a cluster runs it.
        inverter: where a line names none; None: the editor's own.
        editor: where a line names none.
        steps: where a line names none; None takes the model's default.
        guidance: where a line names none; None takes the model's default.
        negative: negative prompt.
        seed: seed of all noise.
        batch: images a batch.
        keep_size: write at the inputs' sizes rather than at the model's.
        device: where to run.
        dtype: type of the weights.
        threads: of torch; None: as `bench`.
        cache_limit: bytes that the inversions in `out` may take.
        cluster: address of a Ray cluster, `local` to start one here; None: this process.
        workers: of the cluster.
        command: the command line, for the plan.

    Raises:
        RetourError: for anything that cannot be run, before any work; lines are named.
    """
    check_workers(cluster, workers)
    if steps is not None:
        check_range("steps", steps, 1, MAX_STEPS)
    if guidance is not None:
        check_range("guidance", guidance, 0, MAX_GUIDANCE)
    check_range("batch", batch, 1)
    place = Folder(Path(out), more=MORE)
    loaded = load_model(model, device, dtype, cluster)
    listed = read_jobs(
        Path(jobs),
        Path(folder),
        loaded,
        inverter=inverter,
        editor=editor,
        steps=steps,
        guidance=guidance,
    )
    specs = {spec.id: spec for spec in listed}
    tasks = _tasks(listed, loaded, batch)
    runs = list({run.label: run for task in tasks for run in task.runs}.values())
    plan = {
        "format": FORMAT,
        "id": secrets.token_hex(8),
        "jobs": [_described(spec) for spec in listed],
        "batches": [list(task.items) for task in tasks],
        **describe(loaded, runs, seed, negative, threads, cluster, place.path),
        "keep_size": keep_size,
        "command": typed() if command is None else command,
    }

    def keep(folder: Folder, piece: Piece) -> Rows:
        rows = [_row(row, specs[row["item"]], piece, k) for k, row in enumerate(piece.rows)]
        folder.write(replace(piece, rows=rows), piece.originals if keep_size else piece.images)
        return rows

    with place.opened(plan) as held, torch_threads(held["threads"]):
        setup = Setup(
            model=source_of(model),
            fingerprint=loaded.fingerprint,
            meter=Meter(()),
            device=str(loaded.device) if device is None else device,
            dtype=dtype,
            seed=seed,
            negative=negative,
            cache=(place.path / CACHE).resolve(),
            cache_limit=cache_limit,
            owner=held["id"],
            threads=held["threads"],
        )
        rows = work_off(place, tasks, specs, crew(setup, loaded, cluster, workers), keep)
        rows.sort(key=lambda row: row["line"])
        place.write_table(rows, place.path / RESULTS)
        _write_lines(rows, place.path / LINES)
        shutil.rmtree(place.path / CACHE, ignore_errors=True)
    return Batch(place.path, held, rows)


def _tasks(specs: Sequence[JobSpec], model: Model, size: int) -> list[Task]:
    groups: dict[str, list[JobSpec]] = {}
    for spec in specs:
        groups.setdefault(run_key(spec.run), []).append(spec)
    parts = [
        (group[0].run, ids)
        for group in groups.values()
        for ids in cut(((spec.id, spec.size) for spec in group), model, size)
    ]
    return [Task(k, tuple(ids), (run,)) for k, (run, ids) in enumerate(parts)]


def _described(spec: JobSpec) -> dict[str, Any]:
    kept = {k: v for k, v in asdict(spec).items() if k not in ("image", "mask", "run")}
    return {**plain(kept), "run": spec.run.label}


def _row(row: Mapping[str, Any], spec: JobSpec, piece: Piece, index: int) -> dict[str, Any]:
    record = {"line": spec.line, "input": spec.image.name, "index": index, **piece.record}
    text = json.dumps(plain(record), allow_nan=False)
    return {**row, "line": spec.line, "input": spec.image.name, "record": text}


def _write_lines(rows: Rows, path: Path) -> None:
    lines = [plain({**row, "record": json.loads(row["record"])}) for row in rows]
    text = "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines)
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
