"""Working off tasks: on this machine, or through a cluster, into a folder that can be resumed."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..core.cache import LIMIT, InversionCache
from ..core.model import Model
from ..core.progress import is_quiet
from ..errors import RetourError, check_range
from ..models.load import load
from .cases import Case, Spec
from .folder import Folder
from .plan import Task
from .scores import Meter
from .work import Piece, Worker

MAX_THREADS = 1024

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Setup:
    """How to make a worker, here or elsewhere.

    Attributes:
        model: name, folder or hub id.
        fingerprint: what the loaded model must have.
        meter: what is measured.
        device: where it runs; None: the default.
        dtype: type of its weights; None: the default.
        seed: seed of all noise.
        negative: negative prompt.
        cache: folder of the inversions; None keeps none.
        cache_limit: bytes that they may take.
        owner: id of the benchmark.
        threads: of torch.
    """

    model: str
    fingerprint: str
    meter: Meter
    device: str | None = None
    dtype: str | None = None
    seed: int = 0
    negative: str = ""
    cache: Path | None = None
    cache_limit: int = LIMIT
    owner: str = ""
    threads: int = 1

    def worker(self, model: Model | None = None) -> Worker:
        """A worker, around a loaded model or one that it loads."""
        if model is None:
            model = load(self.model, device=self.device, dtype=self.dtype)
        if model.fingerprint != self.fingerprint:
            raise RetourError(
                f"model {self.model!r} is {model.fingerprint} here, and {self.fingerprint} where "
                "the benchmark began: give every machine the same weights"
            )
        cache = None if self.cache is None else InversionCache(self.cache, self.cache_limit)
        return Worker(model, self.meter, self.seed, self.negative, cache, self.owner)


@dataclass(frozen=True)
class Order:
    """A task, its cases to be read, and which of its runs are still to do."""

    task: Task
    specs: tuple[Spec, ...]
    todo: tuple[str, ...]

    def cases(self) -> list[Case]:
        """Read the cases."""
        return [spec.case() for spec in self.specs]


Crew = Callable[[Sequence[Order]], Iterable[Piece]]


def alone(worker: Worker) -> Crew:
    """A crew of one, in this process."""

    def work(orders: Sequence[Order]) -> Iterator[Piece]:
        for order in orders:
            yield from worker.pieces(order.task, order.cases(), order.todo)

    return work


def work_off(
    folder: Folder,
    tasks: Sequence[Task],
    specs: Mapping[str, Spec],
    crew: Crew,
    keep: Callable[[Folder, Piece], Rows],
) -> Rows:
    """Do what is not done yet; return the rows of everything, task by task.

    Args:
        folder: opened for this plan.
        tasks: all of them.
        specs: cases by id.
        crew: who does it.
        keep: writes a finished piece and gives its rows as they were written.
    """
    done: dict[tuple[int, str], Rows] = {}
    orders = []
    for task in tasks:
        for run in task.runs:
            rows = folder.read(task.batch, run.label, task.items)
            if rows is not None:
                done[task.batch, run.label] = rows
        todo = tuple(r.label for r in task.runs if (task.batch, r.label) not in done)
        if todo:
            orders.append(Order(task, tuple(specs[i] for i in task.items), todo))
    total = sum(len(task.items) * len(task.runs) for task in tasks)
    with progress(total, sum(map(len, done.values()))) as bar:
        # Nothing to do asks for no crew: a cluster would be started for it.
        for piece in crew(orders) if orders else ():
            done[piece.batch, piece.run] = keep(folder, piece)
            bar(piece.run, len(piece.rows))
    return [row for task in tasks for run in task.runs for row in done[task.batch, run.label]]


@contextlib.contextmanager
def progress(total: int, begun: int) -> Iterator[Callable[[str, int], None]]:
    """A bar over all outputs, with the time that is left; on a terminal only."""
    if is_quiet() or not sys.stderr.isatty():
        yield lambda label, count: None
        return
    from tqdm import tqdm

    with tqdm(total=total, initial=begun, unit="image", dynamic_ncols=True) as bar:

        def advance(label: str, count: int) -> None:
            bar.set_postfix_str(label, refresh=False)
            bar.update(count)

        yield advance


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Compute with so many threads: their number can decide the last bits."""
    check_range("threads", count, 1, MAX_THREADS)
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
