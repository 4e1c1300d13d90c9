"""The benchmark: a grid of inverters and editors on a set of edits, in a folder of results.

    bench("runs/first", inverters="ddim,direct", editors="p2p,reprompt")

Every pair meets every item, batch by batch, with the same prompts, steps, guidance and seed. The
folder holds `plan.json` (everything that decides the results), `results.parquet` (one row for each
run and item), `summary.json` (means with 95 % intervals, paired differences of any two runs) and
all pictures. Called again with the same arguments it goes on where it was stopped, also after
`kill -9`; results are those of an uninterrupted run, bit for bit, all but seconds and memory (on a
GPU as far as its kernels repeat themselves).

Cost: for each item, one inversion for each inverter and one edit for each pair; `retour methods`
says how many network evaluations these take.
"""

from __future__ import annotations

import secrets
import shlex
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from os import PathLike, environ
from pathlib import Path
from typing import Any

import torch

from ..api import as_model
from ..core.cache import LIMIT
from ..core.model import Model
from ..errors import RetourError, check_range, check_seed
from ..io import plain, save_json
from ..models.load import embedded, load
from ..record import versions
from .cases import SuiteSpec, check_id, cut, suite_fingerprint
from .engine import MAX_THREADS, Crew, Rows, Setup, alone, torch_threads, work_off
from .folder import CACHE, RESULTS, SUMMARY, Folder, read_plan
from .metrics import Backbones, Convention
from .plan import PLAIN, Run, check_grid, choose_pairs, make_runs, make_tasks, names
from .scores import Meter
from .suite import PUBLIC, SPLITS, Suite
from .summary import markdown, summarise
from .work import Piece

FORMAT = "retour-bench/1"
STEPS = 20
BATCH = 16
PIE = "pie"
PIE_FOLDER = "RETOUR_PIE_BENCH"
Names = str | Iterable[str] | None


@dataclass(frozen=True)
class Bench:
    """A finished benchmark.

    Attributes:
        folder: where everything lies.
        plan: what was run.
        rows: one for each run and item; columns as in `results.parquet`.
        summary: means, intervals and paired differences; see `summarise`.
        metrics: what each metric column is.
    """

    folder: Path
    plan: dict[str, Any]
    rows: Rows
    summary: dict[str, Any]
    metrics: dict[str, dict[str, str]]

    def heading(self) -> str:
        """One line that says what was measured."""
        model, runs = self.plan["model"], self.plan["runs"]
        steps = sorted({run["steps"] for run in runs if run["steps"] is not None})
        guidance = {run["guidance"] for run in runs if run["guidance"] is not None}
        return (
            f"{len(self.plan['items'])} edits of {self.plan['suite']['name']!r}, {model['name']} "
            f"({model['fingerprint']}), {', '.join(map(str, steps))} steps, guidance "
            f"{', '.join(f'{value:g}' for value in guidance)}; means with 95 % intervals, "
            "NFE and seconds an image, its inversion included"
        )

    def describe(self) -> dict[str, Any]:
        """Folder, plan and summary as plain values."""
        return plain({"folder": str(self.folder), "plan": self.plan, "summary": self.summary})

    def table(self) -> str:
        """The summary as a Markdown table."""
        return markdown(self.summary, self.metrics)


def bench(
    out: str | PathLike[str],
    *,
    suite: str | PathLike[str] | Suite = SPLITS[PUBLIC],
    inverters: Names = None,
    editors: Names = None,
    pairs: Names = None,
    model: str | Model = "emoji-unet",
    steps: int | Sequence[int] = STEPS,
    guidance: float | None = None,
    negative: str = "",
    seed: int = 0,
    batch: int = BATCH,
    limit: int | None = None,
    kinds: Names = None,
    border: bool | None = None,
    metrics: Names = None,
    convention: Convention = "strict",
    backbones: Backbones | None = None,
    inverter_options: Mapping[str, Any] | None = None,
    editor_options: Mapping[str, Any] | None = None,
    device: str | None = None,
    dtype: str | None = None,
    threads: int | None = None,
    cache: str | PathLike[str] | None = None,
    cache_limit: int = LIMIT,
    cluster: str | None = None,
    workers: int | None = None,
    command: str | None = None,
) -> Bench:
    """Run a benchmark, or go on with one.

    Args:
        out: its folder; a new or empty one, or one that the same arguments began.
        suite: `paired`, the set that ships with retour; `paired-test`, its second split, by whose
            edits no default was chosen; `pie`, the real PIE-Bench in the folder that the
            environment variable RETOUR_PIE_BENCH names; a folder in PIE-Bench's format; or a
            loaded set.
        inverters: names, each run with each of the editors; none: every editor with its own.
        editors: names.
        pairs: further `inverter+editor`, or editors alone.
        model: name, folder or hub id; or a loaded model, unless a cluster runs it.
        steps: one number of steps, or several to run with each.
        guidance: of all runs; None takes the model's default.
        negative: negative prompt.
        seed: seed of all noise.
        batch: images a batch.
        limit: number of items, taken evenly from all kinds of edit.
        kinds: of edit; None takes all.
        border: PIE-Bench's rule that the outermost pixels are always editable; None: for `pie`.
        metrics: columns to measure; None takes all that there are weights for.
        convention: of the metrics, `strict` or `pie_compat`.
        backbones: networks of the metrics; None takes those that ship with retour.
        inverter_options: for every inverter; a key `NAME.key` is for that one alone.
        editor_options: the same of the editors.
        device: where to run.
        dtype: type of the weights.
        threads: of torch; None: those of the folder's plan, or torch's own (on a cluster, 1).
        cache: folder of inversions to share between benchmarks; None: one inside `out`, which goes
            when the benchmark is complete.
        cache_limit: bytes that it may take.
        cluster: address of a Ray cluster, `local` to start one here; None: this process.
        workers: of the cluster; None: as many as it has room for.
        command: the command line, for the plan.

    Raises:
        RetourError: for anything that cannot be run, before any work.
    """
    check_workers(cluster, workers)
    chosen = choose_pairs(inverters, editors, pairs)
    counts = [steps] if isinstance(steps, int) else list(steps)
    check_grid(counts, guidance)
    check_range("batch", batch, 1)
    if limit is not None:
        check_range("limit", limit, 1)
    wanted = tuple(names(metrics)) or None
    meter = Meter(wanted, convention, Backbones() if backbones is None else backbones)
    folder = Folder(Path(out), meter.names)
    data = _suite(suite, border).select(names(kinds) or None, limit)
    if not len(data):
        raise RetourError(f"there is nothing to measure: {data.name!r} is empty")
    specs = {check_id(item.id): SuiteSpec(item) for item in data}
    meter.prepare()
    loaded = load_model(model, device, dtype, cluster)
    scale = loaded.default_guidance if guidance is None else float(guidance)
    runs = [*PLAIN, *make_runs(loaded, chosen, counts, scale, inverter_options, editor_options)]
    batches = cut(((item.id, item.image.size) for item in data), loaded, batch)
    plan = {
        "format": FORMAT,
        "id": secrets.token_hex(8),
        "suite": {"name": data.name, "fingerprint": suite_fingerprint(data)},
        "items": [item for ids in batches for item in ids],
        "batches": batches,
        **describe(loaded, runs, seed, negative, threads, cluster, folder.path),
        "metrics": meter.facts(),
        "command": typed() if command is None else command,
    }
    with folder.opened(plan) as held, torch_threads(held["threads"]):
        for spec in specs.values():
            if not (folder.path / "inputs" / f"{spec.id}.png").is_file():
                folder.write_case(spec.case())
        setup = Setup(
            model=source_of(model),
            fingerprint=loaded.fingerprint,
            meter=meter,
            device=str(loaded.device) if device is None else device,
            dtype=dtype,
            seed=seed,
            negative=negative,
            cache=(folder.path / CACHE if cache is None else Path(cache)).resolve(),
            cache_limit=cache_limit,
            owner=held["id"],
            threads=held["threads"],
        )
        rows = work_off(
            folder, make_tasks(batches, runs), specs, crew(setup, loaded, cluster, workers), _keep
        )
        rows = _ordered(rows, runs, held["items"])
        summary = {**summarise(rows, meter.names), "metrics": meter.facts()}
        folder.write_table(rows, folder.path / RESULTS)
        save_json(summary, folder.path / SUMMARY)
        shutil.rmtree(folder.path / CACHE, ignore_errors=True)
    return Bench(folder.path, held, rows, summary, meter.facts())


def describe(
    model: Model,
    runs: Sequence[Run],
    seed: int,
    negative: str,
    threads: int | None,
    cluster: str | None,
    folder: Path,
) -> dict[str, Any]:
    """The part of a plan that says what computes; threads are those that began the folder."""
    check_seed("seed", seed)
    if threads is not None:
        check_range("threads", threads, 1, MAX_THREADS)
    held = read_plan(folder) or {}
    usual = held.get("threads", torch.get_num_threads() if cluster is None else 1)
    return {
        "model": {
            "name": model.name,
            "fingerprint": model.fingerprint,
            "dtype": str(getattr(model, "dtype", "")),
            "device": model.device.type,
        },
        "runs": [plain(asdict(run)) for run in runs],
        "seed": seed,
        "negative": negative,
        "threads": usual if threads is None else threads,
        "versions": versions(),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def source_of(model: str | Model) -> str:
    """What other processes load the model by."""
    if not isinstance(model, str):
        return model.name
    # An embedded name is no folder, whatever lies in the one this process happens to work in.
    return str(Path(model).resolve()) if model not in embedded() and Path(model).is_dir() else model


def typed() -> str:
    """The command line of this process, for the plan."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def check_workers(cluster: str | None, workers: int | None) -> None:
    """Refuse workers without a cluster, and a cluster without workers."""
    if workers is None:
        return
    if cluster is None:
        raise RetourError(
            f"workers is {workers}, and they are a cluster's: add --cluster (in Python "
            "cluster='local'), or leave them out"
        )
    check_range("workers", workers, 1)


def crew(setup: Setup, model: Model, address: str | None, workers: int | None) -> Crew:
    """Who works: this process, or a cluster."""
    if address is None:
        return alone(setup.worker(model))
    from .cluster import cluster

    return cluster(setup, address, workers)


def _keep(folder: Folder, piece: Piece) -> Rows:
    folder.write(piece, piece.images)
    return piece.rows


def _ordered(rows: Rows, runs: Sequence[Run], items: Sequence[str]) -> Rows:
    """Run by run, items in the plan's order."""
    found = {(row["run"], row["item"]): row for row in rows}
    return [found[run.label, item] for run in runs for item in items]


def _suite(given: str | PathLike[str] | Suite, border: bool | None) -> Suite:
    if isinstance(given, Suite):
        return given
    for split, name in SPLITS.items():
        if given == name:
            return Suite.paired(split)
    if given != PIE:
        return Suite.load(given, border=bool(border))
    place = environ.get(PIE_FOLDER)
    if place is None:
        raise RetourError(
            f"suite 'pie' needs PIE-Bench's own folder: set {PIE_FOLDER} to it, or name the folder"
        )
    return Suite.load(place, border=border is not False)


def load_model(
    given: str | Model, device: str | None, dtype: str | None, cluster: str | None
) -> Model:
    """The model, on this machine also where a cluster runs it: its facts are needed."""
    if not isinstance(given, str):
        if cluster is not None:
            raise RetourError("a cluster loads the model by itself: give its name or folder")
        return as_model(given)
    if cluster is None or not str(device).startswith("cuda") or torch.cuda.is_available():
        return load(given, device=device, dtype=dtype)
    if dtype is None:
        raise RetourError("this machine has no GPU to tell the type of the weights by: give dtype")
    return load(given, device="cpu", dtype=dtype)
