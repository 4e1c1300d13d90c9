"""What retour's own loop costs, over the bare network.

    python benchmarks/overhead.py [--model emoji-unet] [--batch 1,4] [--steps N] [--repeats 5]
                                  [--out FILE.json]

An inversion and an edit are run, and the inputs of every network call recorded; then the same
inputs are given to the bare diffusers module again. Both take turns, each time with other
pictures and prompts. The ratio of the two is 1 for a loop that costs nothing:

- loop: everything between the start and the end of all walks (solver, guidance, branches,
  hooks), over the bare calls
- whole: all of `invert` and `edit`, with VAE and text encoders, over the bare calls

and the excess is split into its parts. Ratios are medians over the repeats, by the wall clock
and by processor time of this process. Other work on the machine disturbs the wall clock more, so
on a CPU the verdict goes by processor time; on a shared one set OMP_NUM_THREADS=1 as well, since
waiting threads count as busy. House target: loop at most 1.05.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch

import retour
from retour import api
from retour.core import loop
from retour.core.model import Model
from retour.core.progress import quiet
from retour.evaluate.suite import Item, Suite
from retour.io import save_json
from retour.record import versions

CASES = {
    "ddim + reprompt": ("ddim", "reprompt"),
    "direct + reprompt": ("direct", "reprompt"),
    "direct + p2p": ("direct", "p2p"),
}
PARTS = ("encode", "decode", "embed", "tokens", "network")
TARGET = 1.05
Times = dict[str, tuple[float, float]]


class Stopwatch:
    """Sums wall and processor seconds under names; what nests is counted in both."""

    def __init__(self, device: torch.device):
        self.device = device
        self.sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])

    @contextmanager
    def timing(self, name: str) -> Iterator[None]:
        """Add the time spent inside to `name`."""
        begun = self._now()
        try:
            yield
        finally:
            for k, (new, old) in enumerate(zip(self._now(), begun, strict=True)):
                self.sums[name][k] += new - old

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, timed."""

        def run(*args: Any, **kwargs: Any) -> Any:
            with self.timing(name):
                return function(*args, **kwargs)

        return run

    def _now(self) -> tuple[float, float]:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter(), time.process_time()

    def times(self) -> Times:
        """Name -> (wall, processor) seconds."""
        return {name: (sums[0], sums[1]) for name, sums in self.sums.items()}


Call = tuple[tuple[Any, ...], dict[str, Any]]


@contextmanager
def recording(network: torch.nn.Module) -> Iterator[list[Call]]:
    """Collect the inputs of every call of a module."""
    calls: list[Call] = []

    def keep(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((args, kwargs))

    handle = network.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def walkers() -> list[Any]:
    """Modules of retour that call the loop by a name of their own."""
    import sys

    modules = [m for name, m in sys.modules.items() if name.startswith("retour")]
    return [m for m in modules if getattr(m, "walk", None) is loop.walk and m is not loop]


@contextmanager
def watching(model: Model, watch: Stopwatch) -> Iterator[None]:
    """Time the model's parts and the walks."""
    with ExitStack() as stack:
        for part in PARTS:
            timed = watch.timed(part, getattr(model, part))
            stack.enter_context(patch.object(model, part, timed))
        timed = watch.timed("loop", loop.walk)
        for module in walkers():
            stack.enter_context(patch.object(module, "walk", timed))
        yield


def run_case(model: Model, items: Sequence[Item], inverter: str, editor: str, steps: int) -> None:
    """One inversion and one edit of a batch."""
    inversion = api.invert(
        model, [i.image for i in items], [i.source for i in items], method=inverter, steps=steps
    )
    api.edit(inversion, [i.target for i in items], editor=editor)


@torch.no_grad()
def replay(network: torch.nn.Module, calls: Sequence[Call]) -> None:
    """The bare network on recorded inputs."""
    for args, kwargs in calls:
        network(*args, **kwargs)


def repeat(model: Any, items: Sequence[Item], inverter: str, editor: str, steps: int) -> Times:
    """Times of one run and of its bare calls."""
    watch = Stopwatch(model.device)
    with recording(model.net) as calls, watching(model, watch), watch.timing("whole"):
        run_case(model, items, inverter, editor, steps)
    with watch.timing("bare"):
        replay(model.net, calls)
    return watch.times()


def split(times: Times, clock: int) -> dict[str, float]:
    """Ratios to the bare calls, and the parts of the excess as shares of the bare time."""
    t = defaultdict(float, {name: pair[clock] for name, pair in times.items()})
    bare = t["bare"]
    named = t["loop"] + t["encode"] + t["decode"] + t["embed"]
    return {
        "loop": t["loop"] / bare,
        "whole": t["whole"] / bare,
        "network calls": t["network"] / bare - 1,
        "solver, guidance, controls": (t["loop"] - t["network"]) / bare,
        "VAE": (t["encode"] + t["decode"]) / bare,
        "text encoder": t["embed"] / bare,
        "the rest": (t["whole"] - named) / bare,
    }


def summary(repeats: Sequence[Times], clock: int) -> dict[str, float]:
    """Medians over repeats."""
    parts = [split(times, clock) for times in repeats]
    return {name: median(part[name] for part in parts) for name in parts[0]}


def measure(model: Any, batch: int, steps: int, repeats: int) -> dict[str, list[Times]]:
    """Case -> times of its repeats; cases take turns, and no prompt comes twice in a row."""
    suite = Suite.paired().select()
    found: dict[str, list[Times]] = {name: [] for name in CASES}
    for number in range(repeats * len(CASES)):
        name = list(CASES)[number % len(CASES)]
        start = number * batch % (len(suite) - batch + 1)
        items = suite.items[start : start + batch]
        found[name].append(repeat(model, items, *CASES[name], steps))
    return found


def line(name: str, wall: dict[str, float], cpu: dict[str, float], on_cpu: bool) -> str:
    """One case as text."""
    leading = cpu if on_cpu else wall
    verdict = "ok" if leading["loop"] <= TARGET else f"above {TARGET}"
    shares = {k: v for k, v in leading.items() if k not in ("loop", "whole")}
    return (
        f"{name:<27} loop {wall['loop']:.3f} wall, {cpu['loop']:.3f} cpu: {verdict};"
        f" whole {wall['whole']:.3f} wall, {cpu['whole']:.3f} cpu\n    over bare: "
        + ", ".join(f"{k} {100 * v:+.1f} %" for k, v in shares.items())
    )


def table(ratios: dict[tuple[int, str], dict[str, float]]) -> str:
    """Markdown: loop and whole of each case at each batch size."""
    batches = list(dict.fromkeys(batch for batch, _ in ratios))
    heads = [f"{part}, batch {batch}" for batch in batches for part in ("loop", "whole")]
    lines = ["| | " + " | ".join(heads) + " |", "| --- " * (len(heads) + 1) + "|"]
    for name in CASES:
        cells = (f"{ratios[b, name][part]:.3f}" for b in batches for part in ("loop", "whole"))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def options() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="emoji-unet")
    parser.add_argument("--batch", default="1,4", help="images at a time, with commas between")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    return parser.parse_args()


def main() -> None:
    """Measure, print, write."""
    given = options()
    model: Any = retour.load(given.model)
    print(f"{model.name} on {model.device}, {torch.get_num_threads()} threads, {given.steps} steps")
    report: dict[str, Any] = {"model": model.name, "steps": given.steps, "versions": versions()}
    on_cpu = model.device.type == "cpu"
    ratios = {}
    with quiet():
        run_case(model, Suite.paired().items[:1], "direct", "p2p", 2)
        for batch in (int(b) for b in given.batch.split(",")):
            for name, times in measure(model, batch, given.steps, given.repeats).items():
                wall, cpu = summary(times, 0), summary(times, 1)
                report[f"{name}, batch {batch}"] = {"wall": wall, "cpu": cpu, "repeats": times}
                ratios[batch, name] = cpu if on_cpu else wall
                print(line(f"{name}, batch {batch}", wall, cpu, on_cpu), flush=True)
    print("\n" + table(ratios))
    if given.out is not None:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        save_json(report, given.out)


if __name__ == "__main__":
    main()
