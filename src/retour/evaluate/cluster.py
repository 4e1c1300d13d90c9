"""The same work on a Ray cluster (extra `cluster`).

Models are kept in actors: one for each GPU when the model's device is `cuda`, else one for as many
CPUs as it has threads. A task is one image batch with one inverter and its editors; whoever is free
takes the next one. An actor that dies (killed, out of memory, its machine gone) is replaced, and
its task given to another, up to `ATTEMPTS` times. Results are those of the loop on one machine, bit
for bit, on machines that compute alike: every task is done by one model, at the same batch, with
the same number of threads.

Pictures travel with the tasks, so that no shared disk is needed; the cache of inversions is used
by those actors that see its folder.
"""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import RetourError
from .cases import Case
from .engine import Crew, Order, Setup, torch_threads
from .plan import Task
from .work import Piece, Worker

LOCAL = "local"
ATTEMPTS = 3


class Hand:
    """An actor: a model that waits for tasks."""

    def __init__(self, setup: Setup):
        self.setup = setup
        self._worker: Worker | None = None

    def pieces(self, task: Task, cases: list[Case], todo: Sequence[str]) -> list[Piece]:
        """Do a task; the model is loaded for the first one."""
        with torch_threads(self.setup.threads):
            if self._worker is None:
                seen = self.setup.cache is not None and self.setup.cache.is_dir()
                self._worker = (self.setup if seen else replace(self.setup, cache=None)).worker()
            return list(self._worker.pieces(task, cases, todo))


def cluster(setup: Setup, address: str = LOCAL, workers: int | None = None) -> Crew:
    """A crew on Ray.

    Args:
        setup: of every worker.
        address: of a Ray cluster (`auto`, `ray://host:10001`, ...); `local` starts one here, unless
            Ray runs in this process already.
        workers: how many; None: as many as the cluster has GPUs, or CPUs for.

    Raises:
        RetourError: Ray is not installed, or there is no cluster at that address.
    """
    ray = need_ray()

    def work(orders: Sequence[Order]) -> Iterator[Piece]:
        with connected(address):
            on_gpu = str(setup.device).startswith("cuda")
            needs = {"num_cpus": setup.threads, "num_gpus": int(on_gpu)}
            count = min(len(orders), _workers(ray, needs) if workers is None else workers)
            # Ray shows every actor its own GPU alone.
            theirs = replace(setup, device="cuda") if on_gpu else setup
            yield from _Crew(ray, theirs, needs, count).work(orders)

    return work


@dataclass
class _Crew:
    ray: Any
    setup: Setup
    needs: dict[str, int]
    count: int
    hands: list[Any] = field(default_factory=list)
    running: dict[Any, tuple[Any, Order]] = field(default_factory=dict)
    failures: dict[tuple[int, str], int] = field(default_factory=dict)

    def work(self, orders: Sequence[Order]) -> Iterator[Piece]:
        waiting = deque(orders)
        idle = [self._hire() for _ in range(self.count)]
        try:
            while waiting or self.running:
                while waiting and idle:
                    self._give(idle.pop(), waiting.popleft())
                (done,), _ = self.ray.wait(list(self.running), num_returns=1)
                hand, order = self.running.pop(done)
                pieces = self._result(done, order)
                if pieces is None:
                    waiting.appendleft(order)
                    self._dismiss(hand)
                    hand = self._hire()
                else:
                    yield from pieces
                idle.append(hand)
        finally:
            for hand in list(self.hands):
                self._dismiss(hand)

    def _hire(self) -> Any:
        self.hands.append(self.ray.remote(**self.needs)(Hand).remote(self.setup))
        return self.hands[-1]

    def _dismiss(self, hand: Any) -> None:
        self.hands.remove(hand)
        with contextlib.suppress(self.ray.exceptions.RayError):
            self.ray.kill(hand)

    def _give(self, hand: Any, order: Order) -> None:
        reference = hand.pieces.remote(order.task, order.cases(), order.todo)
        self.running[reference] = hand, order

    def _result(self, reference: Any, order: Order) -> list[Piece] | None:
        """Pieces of a task; None if its worker died and it shall be tried again."""
        errors = self.ray.exceptions
        try:
            pieces: list[Piece] = self.ray.get(reference)
        except errors.RayTaskError as error:
            cause = getattr(error, "cause", error)
            if isinstance(cause, RetourError):
                raise RetourError(str(cause)) from None
            raise
        except errors.RayError as error:
            key = order.task.batch, order.task.runs[0].label
            self.failures[key] = self.failures.get(key, 0) + 1
            if self.failures[key] >= ATTEMPTS:
                last = str(error).strip().splitlines()[-1:]
                raise RetourError(
                    f"{ATTEMPTS} workers died on batch {key[0]} of {key[1]} "
                    f"({': '.join([type(error).__name__, *last])}): use smaller batches, or fewer "
                    "workers a machine"
                ) from None
            return None
        return pieces


@contextlib.contextmanager
def connected(address: str) -> Iterator[None]:
    """Ray at an address; what was started here is stopped again."""
    ray = need_ray()
    if ray.is_initialized():
        yield
        return
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address == LOCAL:
        # An address in the environment would lead elsewhere.
        options |= {"address": "local", "include_dashboard": False}
    else:
        options["address"] = address
    try:
        ray.init(**options)
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise RetourError(
            f"there is no Ray cluster at {address!r} ({reason}): start one, set "
            "RAY_AUTH_MODE=token if it asks for a token, or leave the address out to use this "
            "machine"
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


def _workers(ray: Any, needs: dict[str, int]) -> int:
    """How many workers the cluster has room for."""
    there = ray.cluster_resources()
    if needs["num_gpus"]:
        room = int(there.get("GPU", 0))
        if room < 1:
            raise RetourError(
                "the cluster has no GPU, and the model's device is 'cuda': choose device 'cpu'"
            )
        return room
    return max(1, int(there.get("CPU", 1)) // needs["num_cpus"])


def need_ray() -> Any:
    """Ray, or a refusal that says how to get it."""
    try:
        import ray
        import ray.exceptions
    except ImportError:
        raise RetourError(
            'a cluster needs Ray, which is not installed: pip install "retour[cluster]"'
        ) from None
    return ray
